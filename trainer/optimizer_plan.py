"""The plan of a configuration's optimizer: what each parameter gets and what its states take, on one rank. Imports no torch: a process of
its own builds the model without memory and asks ``optim/plan.py``.

Try alone: ``longstride plan quickstart optim.preset=apollo_mini --optimizer``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from memory_mgmt.plan import MemoryPlan
from models.errors import UserError
from trainer.config import RunConfig

HOME = Path(__file__).resolve().parent.parent
SECONDS = 300


@dataclass(frozen=True)
class OptimizerPlan:
    """Of one rank, that with the most."""

    bytes: int
    """Of its states."""
    by_kind: str
    """A table with a line for parameters that are updated and kept alike."""
    by_parameter: str
    """A table with a line for each parameter."""
    rows: list[dict[str, Any]]
    """The same for programs (``optim.plan.PlannedParameter``)."""

    def to_json(self, memory: MemoryPlan) -> str:
        """Both plans, for programs."""
        return json.dumps({"memory": json.loads(memory.to_json()), "optimizer": self.rows}, indent=2) + "\n"


def optimizer_plan(config: RunConfig, vocab_size: int) -> OptimizerPlan:
    """Of ``config`` with ``vocab_size`` rows of the embedding; no degree may be ``auto``, nor the preset.

    Raises UserError where the optimizer refuses the model, with its reason.
    """
    parallel = config.parallel
    request = {
        "config": config.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "shards": parallel.dp_shard * parallel.cp,
        "tp": parallel.tp,
    }
    return _answer(json.dumps(request))


@lru_cache(maxsize=16)
def _answer(request: str) -> OptimizerPlan:
    command = [sys.executable, "-m", "trainer.optimizer_plan_process"]
    done = subprocess.run(command, cwd=HOME, input=request, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode == 2:
        raise UserError(f"optim: {done.stderr.strip()}")
    if done.returncode != 0:
        raise RuntimeError(f"planning the optimizer failed:\n{done.stderr}")
    return OptimizerPlan(**json.loads(done.stdout))
