"""The only counters that survive a restart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainer.guards import History


@dataclass
class TrainState:
    """Where a run stands after ``step`` completed optimizer steps. JSON-able; the one mutable object besides the engine.

    ``cursor`` is the data position *after* those steps, as the loader handed it out. No random state is kept: the only
    consumer of randomness is the initialisation, which is a pure function of the seed and the parameter's name.
    """

    step: int = 0
    tokens: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    grad_norm: float | None = None
    """Global gradient norm of the last step before clipping: what ``optim.fused_clip: previous`` reads in the next one."""

    history: History = field(default_factory=History)
    """What spikes are told by."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrainState:
        """The state ``to_json`` wrote."""
        history = History.from_json(value.get("history", {}))
        return TrainState(int(value["step"]), int(value["tokens"]), dict(value["cursor"]), value.get("grad_norm"), history)

    def become(self, other: TrainState) -> None:
        """Stand where ``other`` stands."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))
