"""Weights in safetensors files, read and written one tensor at a time, so that a model never has to be in memory whole.

A file is eight bytes of header length, a JSON header (name -> dtype, shape, begin and end in the data), the data. Nothing in it is code. A
model is one file ``model.safetensors``, or several with ``model.safetensors.index.json`` that says which file holds which tensor.

Try alone: ``python -c "from trainer.interchange.safetensors_files import open_weights; print(open_weights('DIR').names)"``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "pytorch_model.pt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in here; other names are of integers or of quantised weights."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """Where one tensor is."""

    file: Path
    dtype: str
    """As the file spells it: F32, BF16, ..."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    size: int
    """Bytes."""


class Weights:
    """The tensors of a model directory by name; a tensor is read when it is asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    @property
    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self.entries)

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for one that is not of floating-point weights."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(f"{entry.file}: '{name}' is stored as {entry.dtype}; weights are read as {', '.join(DTYPES)} (not quantised)")
        return DTYPES[entry.dtype]

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU. Raises UserError where the file has become shorter than it was."""
        entry, dtype = self.entries[name], self.dtype(name)
        data = bytearray(entry.size)
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            if stream.readinto(data) != entry.size:
                raise UserError(f"{entry.file}: ends inside '{name}'; copy it again")
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape) if entry.size else torch.empty(entry.shape, dtype=dtype)


def open_weights(folder: Path | str) -> Weights:
    """The weights of a model directory. Raises UserError naming the file: pickles only, none, damaged, or out of the folder."""
    path = Path(folder)
    if (path / INDEX).is_file():
        return Weights(_indexed(path))
    if (path / SINGLE).is_file():
        return Weights(read_header(path / SINGLE))
    pickles = [name for name in PICKLES if (path / name).exists()]
    if pickles:
        raise UserError(
            f"{path / pickles[0]}: is a pickle, which can run code when it is read, and is not opened\n"
            "save the model as safetensors where you trust it: model.save_pretrained(DIR, safe_serialization=True)"
        )
    raise UserError(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _indexed(folder: Path) -> dict[str, Entry]:
    file = folder / INDEX
    places = _json(file, file.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(value, str) for value in places.values()):
        raise UserError(f"{file}: has no 'weight_map' from names to files")
    headers: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{file}: names {name!r}, which is not a file of its folder")
        headers[name] = read_header(folder / name)
    missing = [(name, place) for name, place in places.items() if name not in headers[place]]
    if missing:
        raise UserError(f"{folder / missing[0][1]}: has no '{missing[0][0]}', which {INDEX} says it holds")
    return {name: headers[place][name] for name, place in places.items()}


def read_header(file: Path) -> dict[str, Entry]:
    """What one file says it holds, every claim checked against its size. Raises UserError naming the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{file}: is no safetensors file, or cut short (its header would be {length} bytes long)")
            header = _json(file, stream.read(length))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise UserError(f"{file}: '{name}' does not begin where the tensor before it ends; the file is damaged")
        end += entry.size
    if end != size:
        raise UserError(f"{file}: is {size} bytes long, its header describes {end}; copy it again")
    return entries


def _entry(file: Path, name: str, value: Any, data: int) -> Entry:
    bad = UserError(f"{file}: its header says nothing sensible about {name[:80]!r}; the file is damaged")
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise bad from None
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) or begin > end:
        raise bad
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise bad
    return Entry(file, dtype, tuple(shape), data + begin, end - begin)


def _json(file: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is damaged, its JSON cannot be read") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is damaged, it holds no JSON object")
    return content


# --- writing


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, tensors: Sequence[Planned], read: Callable[[Planned], torch.Tensor], shard_bytes: int) -> list[Path]:
    """Write ``tensors`` into ``folder``, each taken from ``read`` when its turn comes, in files of at most ``shard_bytes`` (one tensor at
    least), every file synced. With more than one file the index is written last. Returns the files."""
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, read)
    if count == 1:
        return [folder / SINGLE]
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
    write_synced(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return [*(folder / name for name in names), folder / INDEX]


def _write_file(file: Path, tensors: Sequence[Planned], read: Callable[[Planned], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.size]}
        begin += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = read(tensor)
            if values.dtype != tensor.dtype or tuple(values.shape) != tensor.shape:
                raise ValueError(f"{tensor.name}: {values.dtype} {tuple(values.shape)} given, {tensor.dtype} {tensor.shape} planned")
            stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def write_synced(file: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
