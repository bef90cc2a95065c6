"""What a source is made of: documents, documents that cannot be used, and the interface between them and the readers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from models.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text that is trained on as a whole."""

    text: str
    origin: str
    """Where it stands: file, and row or byte offset."""
    identity: str | None = None
    """What decides whether it is held out; None: the text, so equal texts always fall on the same side."""
    train_only: bool = False
    """Never held out."""
    prefix: int = 0
    """How long its prefix is, in what the data count it in (``prefixes.py``)."""
    cluster: int | None = None
    """Of the lowest level (``clusters.py``); None where the data name none."""
    prefix_record: tuple[int, int] | None = None
    """The prefix's tokens and UTF-8 bytes, once they are known; None where the data have no prefixes."""


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used; stops the run or is counted (``data.on_bad_document``)."""

    reason: str
    """What it is counted under: empty, invalid_utf8, invalid_json, missing_text, bad_prefix, bad_cluster or unreadable."""
    origin: str
    """File, and line or row."""
    detail: str

    def error(self) -> UserError:
        """The error of ``on_bad_document: error``."""
        return UserError(f"{self.origin}: {self.detail}\nrepair it, or set data.on_bad_document=skip to leave such documents out")


Item = Document | BadDocument

Unit = tuple
"""A part of a source, named by plain values: it can be sent to another process and read there on its own."""


class Source(Protocol):
    """An ordered collection of documents. Sources are small, picklable and hold no open file."""

    def units(self) -> Sequence[Unit]:
        """The parts, in document order; the same list whenever the source is unchanged. Raises UserError if there are none."""
        ...

    def read(self, unit: Unit, position: int = 0) -> Iterator[tuple[int, Item]]:
        """Documents of a part from a position on, each with its own position; reading from there gives it again first."""
        ...

    def size_bytes(self) -> int:
        """Size on disk, as a measure of the work."""
        ...

    def fingerprint(self) -> Any:
        """JSON-able value that changes whenever any document may have changed."""
        ...


def check_text(text: Any, origin: str, missing: str) -> Item:
    """A Document, or the reason why ``text`` cannot be one; ``missing`` says what is wrong when it is no string."""
    if not isinstance(text, str):
        return BadDocument("missing_text", origin, missing)
    if not text.strip():
        return BadDocument("empty", origin, "the document is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell a lone surrogate, which no UTF-8 text can hold
        return BadDocument(
            "invalid_utf8", origin, f"invalid Unicode: lone surrogate {error.object[error.start]!r} at character {error.start}"
        )
    return Document(text, origin)
