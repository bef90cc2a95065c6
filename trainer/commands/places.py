"""Where this checkout is, and where a run is that someone names. Imports little: ``longstride runs`` must answer at once."""

from __future__ import annotations

from pathlib import Path

from models.errors import UserError
from trainer.run_dir import RunDir

HOME = Path(__file__).resolve().parents[2]
"""The folder of longstride.py, the rooms and configs/."""


def find_run(name: str, root: str) -> RunDir:
    """The run called ``name`` in ``root``, or at the path ``name``. Raises UserError naming the runs there are."""
    for path in (Path(root) / name, Path(name)):
        if (path / "config.yaml").is_file():
            return RunDir(path)
    known = sorted(path.parent.name for path in Path(root).glob("*/config.yaml"))
    there = (
        f"runs in {root}: {', '.join(known[-8:])}" + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        if known
        else f"there are no runs in directory {root}; give its path, or --root DIR"
    )
    raise UserError(f"no run '{name}' ({Path(root) / name / 'config.yaml'} does not exist)\n{there}")
