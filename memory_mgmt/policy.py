"""What happens to each layer's activations between forward and backward: kept, swapped to host memory, kept in eight bits, or recomputed.

A layer's activations fall into four classes; each is split over the rank's tokens. The planner chooses a ``Policy``, the apply step
installs it, the plan file stores it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

ActivationClass = Literal["input", "projections", "mixer", "feed_forward"]
CLASSES: tuple[ActivationClass, ...] = ("input", "projections", "mixer", "feed_forward")
"""input: the residual stream that enters the block. projections: queries, keys and values after rotation (a memory layer: its output,
where mixer and feed_forward are both recomputed; else nothing). mixer: the attention's output and log-sum-exp, recomputed all or not
at all (a memory layer: everything inside it). feed_forward: the residual stream after the mixer, gate and up. What is element-wise from
these, both norms and the product of gate and up, is recomputed in any layer that does not keep everything."""
QUANTISABLE: tuple[ActivationClass, ...] = ("feed_forward",)
"""Classes that may be kept in eight bits: an error in them goes into the gradients as it is. In queries, keys and values (or an input
from which they are made again) the exponentials of attention would magnify it, against a log-sum-exp that is exact."""

_TOLERANCE = 1e-9


class Tokens(NamedTuple):
    """How many of a rank's tokens go which way; in this order along the sequence."""

    swapped: int
    kept: int
    quantised: int
    recomputed: int

    @property
    def held(self) -> int:
        """The first token of which nothing is held."""
        return self.swapped + self.kept + self.quantised


@dataclass(frozen=True)
class Split:
    """Shares of a rank's tokens; they add up to 1. The first tokens are swapped, the next kept, then those kept in eight bits
    (``quantise``), the last recomputed."""

    keep: float = 1.0
    swap: float = 0.0
    recompute: float = 0.0
    quantise: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.keep, self.swap, self.recompute, self.quantise)
        if min(parts) < -_TOLERANCE or abs(sum(parts) - 1) > 1e-6:
            words = f"keep {self.keep}, swap {self.swap}, recompute {self.recompute} and quantise {self.quantise}"
            raise ValueError(f"{words} are not shares that add up to 1")

    def tokens(self, n_tokens: int, tile_tokens: int) -> Tokens:
        """The parts of ``n_tokens``, cut at multiples of ``tile_tokens`` (0: anywhere).

        Rounding never keeps more than the shares say: kept tokens round down, then those in eight bits, recomputed ones up.
        """
        step = tile_tokens or 1

        def down(share: float) -> int:
            return int(share * n_tokens + 1e-6) // step * step

        swapped = min(n_tokens, round(self.swap * n_tokens / step) * step)
        held = max(swapped, down(self.swap + self.keep + self.quantise) if self.recompute > _TOLERANCE else n_tokens)
        kept = min(held, max(swapped, down(self.swap + self.keep))) if self.quantise > _TOLERANCE else held
        return Tokens(swapped, kept - swapped, held - kept, n_tokens - held)


KEEP = Split()
SWAP = Split(0.0, 1.0, 0.0)
RECOMPUTE = Split(0.0, 0.0, 1.0)
QUANTISE = Split(0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class LayerPolicy:
    """One split per class of a layer's activations. ``input`` cannot be recomputed except inside a group (``Policy.group_blocks``);
    only classes in ``QUANTISABLE`` can be kept in eight bits (ValueError)."""

    input: Split = KEEP
    projections: Split = KEEP
    mixer: Split = KEEP
    feed_forward: Split = KEEP

    def __post_init__(self) -> None:
        for name in CLASSES:
            if self.of(name).quantise > 0 and name not in QUANTISABLE:
                raise ValueError(f"{name} cannot be kept in eight bits; only {', '.join(QUANTISABLE)} can")

    def of(self, name: ActivationClass) -> Split:
        """The split of a class."""
        return getattr(self, name)


KEEP_ALL = LayerPolicy()
RECOMPUTE_BLOCK = LayerPolicy(KEEP, RECOMPUTE, RECOMPUTE, RECOMPUTE)
"""Only the block's input is kept."""
KEEP_MIXER = LayerPolicy(KEEP, RECOMPUTE, KEEP, RECOMPUTE)
"""The block's input and the mixer's output are kept."""


@dataclass(frozen=True)
class Policy:
    """The choice for a whole model."""

    layers: tuple[LayerPolicy, ...]
    group_blocks: int = 1
    """Blocks per checkpoint group: only the first block's input of each group is kept, the others are recomputed from it."""
    loss_tile_tokens: int = 4096
    ffn_tile_tokens: int = 0
    memory_tile_tokens: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; equal layers are written once."""
        runs: list[dict[str, Any]] = []
        for layer in self.layers:
            entry = asdict(layer)
            if runs and runs[-1]["policy"] == entry:
                runs[-1]["count"] += 1
            else:
                runs.append({"count": 1, "policy": entry})
        rest = {key: value for key, value in asdict(self).items() if key != "layers"}
        return {"layers": runs, **rest}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Policy:
        """Read what ``to_dict`` made. Raises ValueError for anything else."""
        try:
            rest = {key: value for key, value in data.items() if key != "layers"}
            layers: list[LayerPolicy] = []
            for run in data["layers"]:
                splits = {name: Split(**run["policy"][name]) for name in CLASSES}
                layers += [LayerPolicy(**splits)] * int(run["count"])
            return Policy(tuple(layers), **rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a memory policy: {error}") from None
