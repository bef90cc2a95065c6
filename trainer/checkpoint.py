"""Save and load a run on torch's distributed checkpoint, so that no crash loses the last good one and none loads damaged.

Save: every rank writes, syncs and hashes its files in ``checkpoints/.tmp-step_X``; rank 0 writes the manifest last and
renames the directory. A directory named ``step_X`` is therefore complete or was damaged later, which its manifest shows.
Load: the manifest is verified first (ranks share the hashing), ``.metadata`` goes through an inert unpickler, tensors
through ``weights_only``; any number of ranks and any sharding can read what any other wrote.

Not here: what the state is (Engine, TrainState) and when to save (Trainer).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from models.errors import RunFailed, UserError
from trainer.checkpoint_disk import check_room, checkpoint_bytes
from trainer.checkpoint_ranks import CheckpointRanks, describe
from trainer.checkpoint_reader import check_same_tensors, load_tensors, read_checkpoint_metadata
from trainer.checkpoint_state import (
    STATE_NAME,
    Stateful,
    json_bytes,
    plain_digests,
    put_back,
    random_state,
    rank_state_name,
    restore_random_state,
    split_leaves,
    split_state,
    state_dicts,
)
from trainer.checkpoint_writer import local_copies, write_tensors
from trainer.config import CheckpointSection
from trainer.manifest import (
    FileEntry,
    Manifest,
    ManifestError,
    hash_files,
    problems_of_files,
    read_manifest,
    split_by_size,
    structure_problems,
    write_manifest,
)
from trainer.run_dir import RunDir, fsync_directory, write_atomic

# dcp says this at every save and load of one process; a filter set around the call would not be safe in a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Refused:
    """A checkpoint that is not used, and why."""

    path: Path
    problems: list[str]
    """One line each, beginning with a file name."""

    def __str__(self) -> str:
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return f"{self.path.name}: {self.problems[0]}{more}"


@dataclass(frozen=True)
class GoodCheckpoint:
    """The newest checkpoint of which every byte is as it was written."""

    step: int
    path: Path
    refused: list[Refused]
    """Newer ones that were passed over, newest first."""


@dataclass(frozen=True)
class Loaded:
    """What a load gave besides the state."""

    step: int
    manifest: Manifest
    random_state_restored: bool
    """False when another number of ranks wrote the checkpoint."""
    notes: list[str]
    """Settings inside the state that only one side knew."""


@dataclass(frozen=True)
class _Content:
    """Everything of one save, taken at one moment."""

    step: int
    tensors: dict[str, torch.Tensor]
    """The live ones; of them only shapes and shards are used if there are copies."""
    copies: dict[str, torch.Tensor] | None
    """This rank's values at that moment, for a save in the background."""
    documents: dict[str, bytes]
    """This rank's JSON files."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run. All ranks make it and call its methods together, in the same order."""

    def __init__(
        self, run_dir: RunDir, config: CheckpointSection, *, config_hash: str = "", process_group: dist.ProcessGroup | None = None
    ) -> None:
        """``process_group``: a gloo group of all ranks that nothing else uses; None makes one (collective)."""
        self.run_dir = run_dir
        self.config = config
        self.config_hash = config_hash
        self.ranks = CheckpointRanks(process_group)
        self._background: threading.Thread | None = None
        self._error: BaseException | None = None

    # ---- housekeeping

    def clean(self) -> list[str]:
        """Remove what an interrupted save or deletion left; the names removed. Call once at start, holding the run's lock."""

        def remove() -> list[str]:
            self.run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
            left = sorted(self.run_dir.checkpoints.glob(".tmp-*")) + sorted(self.run_dir.checkpoints.glob(".trash-*"))
            for path in left:
                shutil.rmtree(path)
            return [path.name for path in left]

        return self.ranks.first_does("clean up checkpoints", remove)

    def _retain(self, newest: int) -> None:
        """Delete what the settings do not keep. Renamed first, so that a half-deleted one is never taken for a checkpoint."""
        steps = [step for step in self.run_dir.checkpoint_steps() if step <= newest]
        every = self.config.keep_every_steps
        for step in steps[: -self.config.keep_last]:
            if every and step % every == 0:
                continue
            path = self.run_dir.checkpoint(step)
            trash = path.with_name(f".trash-{path.name}")
            try:
                shutil.rmtree(trash, ignore_errors=True)
                path.rename(trash)
                shutil.rmtree(trash)
            except OSError as error:  # costs disk space, not the run
                warnings.warn(f"cannot delete old checkpoint {path}: {describe(error)}", RuntimeWarning, stacklevel=2)

    # ---- save

    def save(self, step: int, state: Mapping[str, Stateful | dict[str, Any]], *, block: bool = False) -> None:
        """Save ``state`` (entry name to Stateful or nested dict) as the checkpoint of ``step``.

        With ``checkpoint.asynchronous`` it returns when the values are copied to the CPU and writes in the background;
        ``block`` waits all the same. Two saves never overlap: this waits for the one before and raises its error.
        Raises RunFailed on all ranks, with older checkpoints intact, if the step exists already or writing fails;
        ValueError for state that is neither tensor nor JSON.
        """
        self.wait()
        name = self.run_dir.checkpoint(step).name
        tensors, rest = split_state(state)
        self.ranks.first_does(f"save {name}", lambda: self._open_temporary(step, checkpoint_bytes(tensors)))
        try:
            content = self._collect(step, tensors, rest)
        except BaseException:
            self._discard(step)
            raise
        if not self.config.asynchronous:
            self._write(content)
            return
        self._background = threading.Thread(target=self._write_in_background, args=(content,), name=f"save-{name}", daemon=True)
        self._background.start()
        if block:
            self.wait()

    @property
    def failure(self) -> BaseException | None:
        """Error of a finished background save that nobody has seen yet; looks only, so call it at every step."""
        return self._error

    def wait(self) -> None:
        """Wait for the background save, if any; raises its error."""
        if self._background is not None:
            self._background.join()
            self._background = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish the background save; call before the process group is destroyed. Raises its error."""
        self.wait()

    def _temporary(self, step: int) -> Path:
        path = self.run_dir.checkpoint(step)
        return path.with_name(f".tmp-{path.name}")

    def _open_temporary(self, step: int, needed: int) -> None:
        path = self.run_dir.checkpoint(step)
        if path.exists():
            raise RunFailed(f"checkpoint {path} exists already and is not overwritten; move it away to save step {step} again")
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, path.name, needed)
        self._temporary(step).mkdir()

    def _collect(self, step: int, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> _Content:
        documents = {rank_state_name(self.ranks.rank): json_bytes(random_state())}
        if self.ranks.rank == 0:
            documents[STATE_NAME] = json_bytes(rest)
        return _Content(step, tensors, local_copies(tensors) if self.config.asynchronous else None, documents)

    def _write_in_background(self, content: _Content) -> None:
        try:
            self._write(content)
        except BaseException as error:
            self._error = error

    def _write(self, content: _Content) -> None:
        what = f"save {self.run_dir.checkpoint(content.step).name}"
        folder = self._temporary(content.step)
        try:
            self._check_replicas(content)
            self.ranks.each(what, lambda: [write_atomic(folder / name, data) for name, data in content.documents.items()])
            self.ranks.each(what, lambda: self._write_tensors(folder, content))
            hashed = self.ranks.together(what, lambda: hash_files(folder, self._own_files(folder, content)))
            files = {name: entry for part in hashed for name, entry in part.items()}
            self.ranks.first_does(what, lambda: self._publish(content.step, files))
        except BaseException:
            self._discard(content.step)
            raise
        if self.config.verify:
            self._verify(content.step)
        if self.ranks.rank == 0:
            self._retain(content.step)

    def _check_replicas(self, content: _Content) -> None:
        """A plain tensor is stored once: if ranks hold different values, the checkpoint would not be the run's state."""
        if self.ranks.size == 1:
            return
        by_rank = self.ranks.gather(plain_digests(content.tensors, content.copies))
        for rank, digests in enumerate(by_rank):
            for name in sorted(digests.keys() | by_rank[0].keys()):
                if digests.get(name) != by_rank[0].get(name):
                    raise RunFailed(
                        f"cannot save: '{name}' is a plain tensor but differs between rank 0 and rank {rank}; "
                        f"give per-rank state as a DTensor (this run is no longer the same on all ranks)"
                    )

    def _write_tensors(self, folder: Path, content: _Content) -> None:
        write_tensors(self._storage_writer(folder), content.tensors, content.copies, self.ranks.group)

    def _storage_writer(self, folder: Path) -> FileSystemWriter:
        """What writes the tensors; every file synced."""
        return FileSystemWriter(folder, sync_files=True, overwrite=False)

    def _own_files(self, folder: Path, content: _Content) -> list[str]:
        shards = [path.name for path in folder.glob(f"__{self.ranks.rank}_*")]
        return [*content.documents, *shards, *([".metadata"] if self.ranks.rank == 0 else [])]

    def _publish(self, step: int, files: dict[str, FileEntry]) -> None:
        folder, final = self._temporary(step), self.run_dir.checkpoint(step)
        seen = {path.name: path.stat().st_size for path in folder.iterdir()}
        for name in sorted(seen.keys() | files.keys()):
            if name not in files or seen.get(name) != files[name].size:
                raise RunFailed(
                    f"rank 0 and the writing rank see {folder}/{name} differently: run.root must be one file system for all ranks"
                )
        write_manifest(folder, Manifest(step, self.ranks.size, self.config_hash, _versions(), files))
        if final.exists():
            raise RunFailed(f"checkpoint {final} appeared while step {step} was being saved; is another process training this run?")
        folder.rename(final)
        fsync_directory(final.parent)

    def _verify(self, step: int) -> None:
        """Read back what was published; until that is good, no older checkpoint goes."""
        path = self.run_dir.checkpoint(step)
        if problems := self.problems(path, from_disk=True):
            self.ranks.first_does(f"set {path.name} aside", lambda: _set_aside(path))
            raise RunFailed(
                f"{Refused(path, problems)}: it does not read back as it was written, and is set aside; older checkpoints are intact. "
                f"Look at the file system of {path.parent}, then: longstride resume {self.run_dir.path}"
            )

    def _discard(self, step: int) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(self._temporary(step), ignore_errors=True)

    # ---- load

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first, as rank 0 sees them."""
        return self.ranks.first_does("list checkpoints", self.run_dir.checkpoint_steps)

    def latest_good(self, *, set_aside: bool = False) -> GoodCheckpoint | None:
        """The newest checkpoint that verifies; None if there is none at all.

        ``set_aside`` renames the damaged newer ones to ``.damaged-step_X`` so that their steps can be saved again; use it
        when training goes on, not when only reading. Raises UserError when checkpoints exist but none is good: a run
        never starts from zero by itself.
        """
        refused: list[Refused] = []
        for step in reversed(self.steps()):
            path = self.run_dir.checkpoint(step)
            problems = self.problems(path)
            if not problems:
                if set_aside and refused:
                    self.ranks.first_does("set damaged checkpoints aside", lambda: [_set_aside(bad.path) for bad in refused])
                return GoodCheckpoint(step, path, refused)
            refused.append(Refused(path, problems))
        if refused:
            raise UserError(
                f"no checkpoint in {self.run_dir.checkpoints} is intact: {'; '.join(map(str, refused))}. "
                f"Restore one from a copy, or begin again under another run.name."
            )
        return None

    def problems(self, path: Path, *, from_disk: bool = False) -> list[str]:
        """What is wrong with one checkpoint, by file name, checked by all ranks together; empty if it is good. ``from_disk``: not as
        the kernel still remembers it."""
        manifest, problems = self.ranks.first_does(f"verify {path.name}", lambda: _structure(path))
        if manifest is None:
            return problems
        mine = split_by_size(manifest.files, self.ranks.size)[self.ranks.rank]
        found = self.ranks.together(f"verify {path.name}", lambda: problems_of_files(path, mine, from_disk=from_disk))
        problems = [*problems, *(line for lines in found for line in lines)]
        return problems or self.ranks.first_does(f"verify {path.name}", lambda: _metadata_problems(path))

    def load(self, source: GoodCheckpoint | Path, state: Mapping[str, Stateful | dict[str, Any]]) -> Loaded:
        """Put a checkpoint's values into ``state``, whatever the number of ranks and sharding that wrote it.

        Only the entries that ``state`` names are read (``{"model": ...}`` for evaluation). A path is verified first; a
        GoodCheckpoint has been. Raises UserError naming the key that is missing, left over, or of another shape or dtype.
        """
        path = source if isinstance(source, Path) else source.path
        if isinstance(source, Path) and (problems := self.problems(path)):
            raise UserError(f"checkpoint {path} is damaged: {Refused(path, problems)}")
        nested = state_dicts(state)
        tensors, _ = split_leaves(nested)

        def read() -> tuple[Manifest, Any, Any]:
            manifest, metadata = read_checkpoint_metadata(path)
            check_same_tensors(path, tensors, metadata, entries=set(state))
            load_tensors(path, tensors, metadata)
            saved = json.loads((path / STATE_NAME).read_bytes())
            same_size = manifest.world_size == self.ranks.size
            return manifest, saved, json.loads((path / rank_state_name(self.ranks.rank)).read_bytes()) if same_size else None

        manifest, saved, mine = self.ranks.each(f"load {path}", read)
        joined, notes = put_back(nested, {entry: saved[entry] for entry in state if entry in saved})
        for entry, target in state.items():
            if isinstance(target, dict):
                target.update(joined[entry])
            else:
                target.load_state_dict(joined[entry])
        if mine is not None:
            restore_random_state(mine)
        return Loaded(manifest.step, manifest, mine is not None, notes)


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("longstride")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"longstride": own, "torch": torch.__version__, "python": platform.python_version()}


def _structure(path: Path) -> tuple[Manifest | None, list[str]]:
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        return None, [str(error)]
    return manifest, structure_problems(path, manifest)


def _metadata_problems(path: Path) -> list[str]:
    try:
        read_checkpoint_metadata(path)
    except UserError as error:
        return [str(error)]
    return []


def _set_aside(path: Path) -> None:
    for number in range(1, 10_000):
        target = path.with_name(f".damaged-{path.name}" + (f"-{number}" if number > 1 else ""))
        if not target.exists():
            path.rename(target)
            return
