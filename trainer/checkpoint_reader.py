"""Read the tensors of a checkpoint directory: strictly the ones asked for, with no unpickling of anything."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from models.errors import UserError
from trainer.manifest import Manifest, ManifestError, read_manifest
from trainer.restricted_unpickle import RefusedMetadata, read_metadata

METADATA_NAME = ".metadata"


class _Reader(FileSystemReader):
    """Reader that is given metadata that were checked, so that torch never unpickles the file itself."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


class _TensorPlanner(DefaultLoadPlanner):
    """Planner for a flat dict of tensors; pickled objects (torch would load them unrestricted) are refused."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"checkpoint entry '{read_item.dest_index.fqn}' is a pickled object; only tensors are loaded")


def read_checkpoint_metadata(path: Path) -> tuple[Manifest, Metadata]:
    """Manifest and tensor metadata of a checkpoint directory; raises UserError naming the file that is not acceptable."""
    try:
        manifest = read_manifest(path)
        return manifest, read_metadata((path / METADATA_NAME).read_bytes(), set(manifest.files))
    except ManifestError as error:
        raise UserError(str(error)) from None
    except RefusedMetadata as error:
        raise UserError(f"{METADATA_NAME} is refused: it {error}") from None
    except OSError as error:
        raise UserError(f"{METADATA_NAME}: {error.strerror or error}") from None


def check_same_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Metadata, entries: set[str]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model and optimizer that ask.

    Only keys below ``entries`` are compared. torch would skip left-over keys and cast another dtype without a word.
    """
    stored = {key: value for key, value in metadata.state_dict_metadata.items() if key.partition(".")[0] in entries}
    differences = [f"'{key}' is not in the checkpoint" for key in sorted(tensors.keys() - stored.keys())]
    differences += [f"'{key}' is in the checkpoint but not in this run" for key in sorted(stored.keys() - tensors.keys())]
    for key in sorted(tensors.keys() & stored.keys()):
        wanted, found = tensors[key], stored[key]
        assert isinstance(found, TensorStorageMetadata)
        if wanted.shape != found.size:
            differences.append(f"'{key}' has shape {tuple(found.size)} in the checkpoint and {tuple(wanted.shape)} in this run")
        elif wanted.dtype != found.properties.dtype:
            differences.append(f"'{key}' is {found.properties.dtype} in the checkpoint and {wanted.dtype} in this run")
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise UserError(
            f"checkpoint {path} does not fit: {differences[0]}{more}. "
            f"Use the model.*, optim.* and train.precision settings of the run that saved it."
        )


def load_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Metadata) -> None:
    """Copy stored values into ``tensors`` in place: each rank reads the pieces that overlap its shards, alone."""
    load(tensors, storage_reader=_Reader(path, metadata), planner=_TensorPlanner(), no_dist=True)
