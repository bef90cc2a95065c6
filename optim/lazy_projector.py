"""Q-GaLore's lazy refresh: a matrix whose leading direction has settled is renewed less and less often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from optim.methods import GatherRows, Rows, StateSpec, Steps, Sum
from optim.projectors import Refresh, Side, SingularProjector

_MULTIPLE, _SKIPS, _COUNT, _SEEN = 0, 1, 2, 3
"""Where in the state ``lazy`` are: the gap in units of the projector's, refreshes still to be left out, renewals seen, similarities."""


@dataclass(frozen=True)
class LazyProjector:
    """Layer-adaptive refresh (Q-GaLore, arXiv 2407.08296, section 3.2): each renewal measures the cosine between the old and the new first
    basis vector; once ``window`` of them have a mean of ``threshold`` or more, the gap of this matrix is multiplied by ``growth``.

    The decision is read from the state only where the projector's own schedule would renew, so that no other step waits for the device.
    """

    projector: SingularProjector
    threshold: float = 0.4
    window: int = 5
    growth: int = 2
    packed: bool = False
    """Keep the basis in four bits, as Q-GaLore does; the step that renews it uses it as it was found."""

    @property
    def rank(self) -> int:
        return self.projector.rank

    @property
    def refresh(self) -> Refresh:
        return self.projector.refresh

    def side(self, shape: tuple[int, int]) -> Side:
        return self.projector.side(shape)

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        kept = dict(self.projector.states(shape))
        if self.packed:
            kept["basis"] = replace(kept["basis"], codec="basis")
        return {**kept, "lazy": StateSpec((_SEEN + self.window,), "whole")}

    def basis(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        lazy = states["lazy"]
        due = self.refresh.due(step, key)
        if due and step > 1 and lazy[_SKIPS] > 0:
            lazy[_SKIPS] -= 1
            return (yield from self._stored(states, rows, gradient_in.shape[1]))
        old = (yield from self._stored(states, rows, gradient_in.shape[1]))[:, 0].clone() if due and step > 1 else None
        basis = yield from self.projector.basis(gradient_in, states, rows, step, key)
        if old is not None:
            cosine = (old * basis[:, 0]).sum().reshape(1)
            if self.side((rows.total, gradient_in.shape[1])) == "left":
                cosine = yield Sum(cosine)
            self._note(cosine, lazy)
        return basis

    def _stored(self, states: dict[str, Tensor], rows: Rows, columns: int) -> Steps:
        dealt = self.projector.shard_basis and self.side((rows.total, columns)) == "right"
        return (yield GatherRows(states["basis"], columns)) if dealt else states["basis"]

    def _note(self, cosine: Tensor, lazy: Tensor) -> None:
        """Takes a similarity up and decides how many refreshes come to nothing now."""
        count = int(lazy[_COUNT])
        lazy[_SEEN + count % self.window] = cosine[0]
        lazy[_COUNT] = count + 1
        multiple = max(1, int(lazy[_MULTIPLE]))
        if count + 1 >= self.window and lazy[_SEEN:].mean() >= self.threshold:
            multiple *= self.growth
        lazy[_MULTIPLE] = multiple
        lazy[_SKIPS] = multiple - 1
