"""Text to token ids: the built-in byte-level tokenizer, or a Hugging Face tokenizer from a local path.

Imports no torch, so that the processes that tokenise start quickly. Try alone:
``python -c "from trainer.data.tokenizers import load_tokenizer; print(load_tokenizer('bytes').encode_batch(['abc']))"``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.errors import UserError

_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "<|eos|>", "[EOS]")
"""End-of-document tokens looked for when no file beside tokenizer.json names one."""


class Tokenizer(Protocol):
    """What the data room asks of a tokenizer. Encoding adds no special token; the token store appends ``eos_id``."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends every document."""
    pad_id: int
    """Fills the unused end of the last sequence of an epoch; never a label."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, 1-d int64 arrays."""
        ...

    def character_ends(self, text: str) -> np.ndarray:
        """For every id of ``text``, how many of its first characters hold all that the id stands for; 1-d int64."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        ...

    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they produce the same ids; part of the cache key."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, ``<eos>`` = 256, ``<pad>`` = 257."""

    vocab_size = 258
    eos_id = 256
    pad_id = 257

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One id per UTF-8 byte."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]

    def character_ends(self, text: str) -> np.ndarray:
        """See `Tokenizer.character_ends`: every byte of a character stands for all of it."""
        begins = (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) & 0xC0) != 0x80
        return np.cumsum(begins, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; broken sequences (a text cut inside a character) become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """The same on every machine."""
        return "bytes-1"


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` read with the ``tokenizers`` package.

    A special token spelled out in a document is encoded as plain text, so no document can forge its own end. Truncation
    and padding stored in the file are switched off: whole documents are encoded.
    """

    def __init__(self, path: str) -> None:
        file = _tokenizer_file(path)
        raw = file.read_bytes()
        try:
            import tokenizers

            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the Rust extension raises bare Exception
            raise UserError(f"data.tokenizer: {file} is not a Hugging Face tokenizer.json: {_first_line(error)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"data.tokenizer: {file} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _find_eos(file, vocabulary)
        self.pad_id = self.eos_id
        self._hash = hashlib.sha256(raw + f"|eos={self.eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids text by text: parallelism comes from processes, not from the extension's threads."""
        encode = self._tokenizer.encode_batch_fast  # does not track character offsets: half the time
        return [np.asarray(encode([text], add_special_tokens=False)[0].ids, dtype=np.int64) for text in texts]

    def character_ends(self, text: str) -> np.ndarray:
        """See `Tokenizer.character_ends`: by the offsets that the file's own normaliser and splitter keep."""
        offsets = self._tokenizer.encode_batch([text], add_special_tokens=False)[0].offsets
        return np.array([end for _, end in offsets], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Hash of tokenizer.json and of the end-of-document id."""
        return f"hf-1-{self._hash}"


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``: ``bytes``, a folder with tokenizer.json, or the file itself.

    Raises UserError naming data.tokenizer when the path is missing, not a tokenizer, or has no end-of-document token.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def _tokenizer_file(path: str) -> Path:
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        what = "has no tokenizer.json" if given.is_dir() else "does not exist"
        raise UserError(f"data.tokenizer: {given} {what}; give 'bytes', a tokenizer.json or the local folder that holds one")
    return file


def _find_eos(file: Path, vocabulary: dict[str, int]) -> int:
    """Id of the end-of-document token: as configured beside tokenizer.json, else the one known name in the vocabulary."""
    for sibling in ("tokenizer_config.json", "special_tokens_map.json"):
        named = _read_json(file.parent / sibling).get("eos_token")
        token = named.get("content") if isinstance(named, dict) else named
        if token is not None:
            if token not in vocabulary:
                raise UserError(f"data.tokenizer: eos_token {token!r} of {file.parent / sibling} is not in the vocabulary of {file}")
            return vocabulary[token]
    found = [name for name in _EOS_NAMES if name in vocabulary]
    if len(found) != 1:
        what = f"several end-of-document tokens ({', '.join(found)})" if found else "no end-of-document token that is known by name"
        raise UserError(f"data.tokenizer: {file} has {what}; name one as eos_token in {file.parent / 'tokenizer_config.json'}")
    return vocabulary[found[0]]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"data.tokenizer: {path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
