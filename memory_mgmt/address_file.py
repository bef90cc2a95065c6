"""The public CSV format of address problems: ``id,lower,upper,size[,...]``, one buffer per line; a plan adds the column ``offset``."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from memory_mgmt.address_problem import Lifetime
from models.errors import UserError

NEEDED = ("id", "lower", "upper", "size")


def read_lifetimes(path: Path) -> tuple[list[Lifetime], list[str], list[list[str]]]:
    """The lifetimes, the header and the rows as they are. A column ``group`` is read as the group, where it is not empty.

    Raises UserError naming file, line and remedy.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give the path of a CSV file with columns {','.join(NEEDED)}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as CSV text ({reason}); check the path and save it as UTF-8 CSV") from None
    for name in NEEDED:
        if header.count(name) != 1:
            raise UserError(f"{path}:1: column {name} must be there once; the first line must read {','.join(NEEDED)}[,...]")
    at = {name: header.index(name) for name in (*NEEDED, "group") if name in header}
    return [_lifetime(path, line, row, header, at) for line, row in lines], header, [row for _, row in lines]


def _lifetime(path: Path, line: int, row: list[str], header: list[str], at: dict[str, int]) -> Lifetime:
    if len(row) != len(header):
        raise UserError(f"{path}:{line}: {len(row)} fields where the header has {len(header)}; add or remove fields")
    numbers = {}
    for name in NEEDED[1:]:
        text = row[at[name]].strip()
        try:
            numbers[name] = int(text)
        except ValueError:
            raise UserError(f"{path}:{line}: {name} is {text!r}; write a whole number") from None
        if abs(numbers[name]) >= 2**62:
            raise UserError(f"{path}:{line}: {name} {text} does not fit in 62 bits; use a larger unit")
    if numbers["upper"] <= numbers["lower"]:
        raise UserError(f"{path}:{line}: upper {numbers['upper']} is not after lower {numbers['lower']}; a life is [lower, upper)")
    if numbers["size"] < 0:
        raise UserError(f"{path}:{line}: size {numbers['size']} is negative; write the bytes, 0 or more")
    group = row[at["group"]].strip() if "group" in at else ""
    return Lifetime(row[at["id"]], numbers["lower"], numbers["upper"], numbers["size"], group or None)


def write_plan(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], offsets: Sequence[int]) -> None:
    """Writes the rows with their offsets, an ``offset`` column already there replaced. The file appears whole or not at all.

    Raises UserError when it cannot be written.
    """
    keep = [k for k, name in enumerate(header) if name != "offset"]
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", newline="", encoding="utf-8", delete=False) as file:
            temporary = Path(file.name)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*(header[k] for k in keep), "offset"])
            writer.writerows([*(row[k] for k in keep), offset] for row, offset in zip(rows, offsets, strict=True))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); give --out a path in a folder that exists and is writable"
        ) from None
