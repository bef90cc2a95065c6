"""Read the ``.metadata`` pickle of torch's distributed checkpoint without running anything that it says.

``torch.distributed.checkpoint`` unpickles this file with no restriction: whoever can write a checkpoint can run code where
it is loaded (pytorch#189308). Here every class that the file may name is replaced by an inert record that only stores what
it is given; any other name is refused before it is imported. The records are then checked one by one and turned into the
real metadata. What is not needed to read tensors (paths of the writer, planner data) is dropped.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import PurePosixPath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


class RefusedMetadata(Exception):
    """The metadata names something it may not name, or does not describe tensors of this checkpoint."""


class _Record:
    """Stands in for one class of the pickle: keeps constructor arguments and state, does nothing.

    ``__setstate__`` is defined so that the pickle's BUILD on an instance ends here, and BUILD on the class fails.
    """

    __slots__ = ("args", "state")

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        record = object.__new__(cls)
        record.args = args
        record.state = None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # indices are keys of a dict, and hashed before their state is set: by identity
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Metadata(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Bytes(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Properties(_Record):
    __slots__ = ()


class _Index(_Record):
    __slots__ = ()


class _Storage(_Record):
    __slots__ = ()


class _Size(_Record):
    __slots__ = ()


class _Dropped(_Record):
    __slots__ = ()


_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[tuple[str, str], type[_Record]] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "StorageMeta"): _Dropped,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Dropped,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Dropped,
    ("pathlib", "PosixPath"): _Dropped,
    ("pathlib", "PurePosixPath"): _Dropped,
    ("pathlib._local", "PosixPath"): _Dropped,  # where Python 3.13 keeps it
    ("builtins", "getattr"): _Dropped,  # how Python before 3.11.4 pickles the member of an enum; nothing is looked up here
}
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise RefusedMetadata(f"names {module_name}.{global_name}, which checkpoint metadata never does") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise RefusedMetadata("holds a reference to something outside itself")


def read_metadata(data: bytes, file_names: set[str]) -> Metadata:
    """The metadata in ``data`` (the bytes of ``.metadata``); runs nothing that they name.

    ``file_names`` are the checkpoint's own files: metadata that points anywhere else is refused, as is a tensor that
    the stored pieces do not cover. Raises RefusedMetadata with the reason.
    """
    try:
        root = _InertUnpickler(io.BytesIO(data)).load()
        fields = _fields(root, _Metadata)
        tensors = {_text(key): _tensor(key, value) for key, value in _mapping(fields["state_dict_metadata"]).items()}
        storage = dict(_stored_piece(key, value, file_names) for key, value in _mapping(fields["storage_data"]).items())
    except RefusedMetadata:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise RefusedMetadata(f"not readable ({type(error).__name__})") from None
    for key, tensor in tensors.items():
        _check_cover(key, tensor, storage)
    return Metadata(state_dict_metadata=dict(tensors), storage_data=storage)


def _fields(record: Any, kind: type[_Record]) -> dict[str, Any]:
    if type(record) is not kind or not isinstance(record.state, dict):
        raise RefusedMetadata(f"has a {type(record).__name__.strip('_')} where a {kind.__name__.strip('_')} belongs")
    return record.state


def _mapping(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise RefusedMetadata("is not a table of tensors")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise RefusedMetadata("has a name that is not text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RefusedMetadata("has a size or offset that is not a whole number")
    return value


def _size(value: Any) -> torch.Size:
    if type(value) is not _Size or len(value.args) != 1 or type(value.args[0]) is not tuple:
        raise RefusedMetadata("has a shape that is not a tuple of sizes")
    return torch.Size([_whole(size) for size in value.args[0]])


def _tensor(key: Any, value: Any) -> TensorStorageMetadata:
    if type(value) is _Bytes:
        raise RefusedMetadata(f"stores '{key}' as a pickled object; only tensors are read")
    fields = _fields(value, _Tensor)
    properties = fields["properties"]
    if type(properties) is not _Properties or type(properties.state) is not tuple or not isinstance(properties.state[0], torch.dtype):
        raise RefusedMetadata(f"gives no dtype for '{key}'")
    chunks = [_fields(chunk, _Chunk) for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=properties.state[0]),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _stored_piece(key: Any, value: Any, file_names: set[str]) -> tuple[MetadataIndex, _StorageInfo]:
    index, place = _fields(key, _Index), _fields(value, _Storage)
    offset, hint = index.get("offset"), index.get("index")
    name = _text(place["relative_path"])
    if name not in file_names or PurePosixPath(name).name != name:
        raise RefusedMetadata(f"points to {name!r}, which is not a file of this checkpoint")
    if place.get("transform_descriptors"):
        raise RefusedMetadata(f"asks for a transformation of '{index['fqn']}'")
    return (
        MetadataIndex(_text(index["fqn"]), None if offset is None else _size(offset), None if hint is None else _whole(hint)),
        _StorageInfo(name, _whole(place["offset"]), _whole(place["length"])),
    )


def _check_cover(key: str, tensor: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """Every element stored, every piece somewhere: a hole would leave old values in the model."""
    pieces = [chunk for chunk in tensor.chunks if math.prod(chunk.sizes) or not tensor.size]  # ranks beyond the last row hold none
    stored = {chunk.offsets: chunk for chunk in pieces if MetadataIndex(key, chunk.offsets) in storage}
    if any(len(chunk.offsets) != len(tensor.size) or len(chunk.sizes) != len(tensor.size) for chunk in stored.values()):
        raise RefusedMetadata(f"describes pieces of '{key}' with another number of dimensions")
    if sum(math.prod(chunk.sizes) for chunk in stored.values()) != math.prod(tensor.size):
        raise RefusedMetadata(f"does not hold the whole of '{key}'")
