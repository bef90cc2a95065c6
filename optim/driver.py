"""The optimizer that composes methods, storage and placement: a ``torch.optim.Optimizer`` for plain tensors and FSDP2's DTensors.

Every parameter has a lane: a rule (elementwise, on this rank's part) or a method for matrices (``optim/methods.py``, which asks for what it
needs from the other ranks), and a codec for each state. Only tensors are in ``state``; they lie as their parameter lies, so a checkpoint
can be loaded on any number of ranks. States exist from the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from optim import fused_low_rank
from optim.clip import local_part
from optim.elementwise import ElementwiseAdam, Rule
from optim.exchange import run_together, with_weight
from optim.fused import BITS, WHOLE, fused_step_, whole_step_
from optim.lane import Lane
from optim.methods import Projecting, Steps
from optim.pieces import piece_elements, row_chunks
from optim.redealt import Redealt, to_parts, to_rows
from optim.row_sparse import RowSparse, update_touched
from optim.stacking import Workspace, as_rows, deal_rows, rows_together, stacks
from optim.updates import Update, formed, move_
from optim.writers import EXACT

if TYPE_CHECKING:
    from optim.plan import PlannedParameter

CHUNK_ELEMENTS = 1 << 20
"""Of a tensor that an elementwise rule works on at a time: what it decodes and makes on top is a few times so much."""
TOGETHER_ELEMENTS = 1 << 24
"""Of matrices of this rank whose steps run side by side; bounds their float32 updates."""


class ComposedOptimizer(torch.optim.Optimizer):
    """See the module.

    Args:
        groups: parameter groups as of any torch optimizer; ``lr`` and ``weight_decay`` (default 0) are read at every step.
        lanes: one per parameter of the groups.
        lr: of the groups that have none.
    Raises ValueError for a parameter that has no lane, or lies in a way that is not known (``Placed.of``).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lanes: Sequence[Lane], lr: float) -> None:
        self.lanes = {lane.parameter: lane for lane in lanes}
        self._work: Workspace | None = None
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.lanes:
                    raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no lane")
                self._make_states(self.lanes[parameter])
        self._know_the_alike()

    def _know_the_alike(self) -> None:
        kinds: dict[Hashable, int] = {}
        by_rule: dict[Hashable, list[Lane]] = {}
        for lane in self.lanes.values():
            lane.kind = kinds.setdefault(lane.alike(), len(kinds))
            by_rule.setdefault(lane.rule, []).append(lane)
        for lanes in by_rule.values():
            until = [0.0, *itertools.accumulate(lane.renewal_cost for lane in lanes)]
            for lane, before in zip(lanes, until, strict=False):
                lane.take_turn(before, until[-1])

    def plan(self, *, strict: bool = False) -> list[PlannedParameter]:
        """What each parameter gets (``optim/plan.py``); ``strict``: raises ValueError where that is not what was asked for."""
        from optim.plan import plan  # it knows this class

        return plan(self, strict=strict)

    def side_by_side(self, group: dict[str, Any]) -> Iterator[tuple[dist.ProcessGroup | None, list[Lane]]]:
        """The methods of one parameter group in the batches in which they run when all have gradients, with the ranks that share them."""
        return together([self.lanes[parameter] for parameter in group["params"] if self.lanes[parameter].is_method])

    def _make_states(self, lane: Lane) -> None:
        state = self.state[lane.parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name, spec in lane.stored().items():
            state[name] = lane.placed.zeros(spec, lane.parameter.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer; states keep their dtypes, where torch would round them to the parameter's."""
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        for group in self.param_groups:
            for parameter, number in zip(group["params"], saved, strict=False):
                for name, spec in self.lanes[parameter].stored().items():
                    self.state[parameter][name] = state_dict["state"][number][name].to(parameter.device, spec.dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` may compute it. Every rank must have gradients for the same ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_lanes(group, [self.lanes[parameter] for parameter in group["params"]])
        return loss

    @torch.no_grad()
    def step_lanes(self, group: Mapping[str, Any], lanes: Sequence[Lane]) -> None:
        """Update those of ``lanes``, all of one parameter group, that have a gradient. Every rank must come with the same ones."""
        lanes = [lane for lane in lanes if lane.has_gradient]
        lr, decay = group["lr"], group["weight_decay"]
        for lane in lanes:
            if isinstance(lane.rule, RowSparse):
                self._table(lane, lane.rule, lr, decay)
        elementwise = [lane for lane in lanes if not lane.is_method and not isinstance(lane.rule, RowSparse)]
        if elementwise:
            work = self._workspace(elementwise[0].parameter.device)
            elementwise = self._whole_moments(elementwise, lr, decay)
            for lane in elementwise:
                if lane.path != "eager":
                    self._update_rows(lane, self._next([lane])[0], work, lr, decay)
            elementwise = [lane for lane in elementwise if lane.path == "eager"]
            for some in stacks(elementwise, Lane.stack, Lane.local_size, work.elements):
                self._elementwise(some, work, lr, decay)
        for shard_group, some in together([lane for lane in lanes if lane.is_method]):
            self._matrices(some, shard_group, lr, decay)

    def may_sum(self, lane: Lane) -> bool:
        """Whether the next step of ``lane`` can be taken from summed coordinates: its method is linear up to them and keeps its basis."""
        following = int(self.state[lane.parameter]["step"] + 1)
        return hasattr(lane.rule, "coordinates") and not cast(Projecting, lane.rule).renews(following, lane.key)

    @torch.no_grad()
    def sum_coordinates(self, lanes: Sequence[Lane]) -> None:
        """Move the gradients of ``lanes``, all of which ``may_sum``, into ``summed``. Every rank must come with the same lanes."""
        for shard_group, some in together(lanes):
            steps = []
            for lane in some:
                states = _decoded(lane, self._stored(lane), None)
                following = int(self.state[lane.parameter]["step"] + 1)
                rule = cast(Projecting, lane.rule)
                steps.append(rule.coordinates(lane.gradient(), states, lane.placed.rows, following, lane.key))
            for i, coordinates in run_together(steps, shard_group):
                summed = some[i].summed
                some[i].summed = coordinates if summed is None else summed.add_(coordinates)
                some[i].parameter.grad = None

    def _workspace(self, device: torch.device) -> Workspace:
        """On CPU kept from step to step, some MiB; accelerators' allocators keep it themselves."""
        elements = min(CHUNK_ELEMENTS, piece_elements(device))
        if device.type != "cpu" or self._work is None or self._work.elements != elements:
            work = Workspace(elements)
            self._work = work if device.type == "cpu" else None
            return work
        return self._work

    def kept_temporaries(self) -> list[Tensor]:
        """What lives from step to step and is no state: work memory, random bases that are remembered."""
        projectors = {id(one): one for lane in self.lanes.values() if (one := getattr(lane.rule, "projector", None)) is not None}
        remembered = [basis for one in projectors.values() for _, basis in getattr(one, "memory", {}).values()]
        return [*remembered, *(self._work.buffers() if self._work is not None else ())]

    def _next(self, lanes: Sequence[Lane]) -> list[int]:
        counters = [self.state[lane.parameter]["step"] for lane in lanes]
        numbers = [int(counter) + 1 for counter in counters]
        for counter, number in zip(counters, numbers, strict=True):
            counter.fill_(number)
        return numbers

    def _elementwise(self, lanes: Sequence[Lane], work: Workspace, lr: float, decay: float) -> None:
        """Of lanes that are alike, as one tensor."""
        numbers = self._next(lanes)
        if len(set(numbers)) > 1 or len(lanes) == 1:  # some had no gradient before
            for lane, number in zip(lanes, numbers, strict=True):
                self._update_rows(lane, number, work, lr, decay)
            return
        parameters = [as_rows(local_part(lane.parameter)) for lane in lanes]
        stored = [{name: as_rows(tensor) for name, tensor in self._stored(lane).items()} for lane in lanes]
        counts = [parameter.shape[0] for parameter in parameters]
        together = rows_together(stored)
        gradients = [as_rows(local_part(cast(Tensor, lane.parameter.grad))) for lane in lanes]
        gradient = work.take("gradient", (sum(counts), *parameters[0].shape[1:]), parameters[0])
        update = _updated(lanes[0], together, torch.cat(gradients, out=gradient), numbers[0], work)
        weights = torch.cat(parameters, out=work.take("weight", update.shape, parameters[0]))
        move_(weights, update, lr, decay)
        deal_rows({"weight": weights, **together}, [{"weight": one, **kept} for one, kept in zip(parameters, stored, strict=True)])

    def _whole_moments(self, lanes: Sequence[Lane], lr: float, decay: float) -> list[Lane]:
        """Those whose moments and weights are float32, by a kernel, all of one rule in one call. The others are returned."""
        mine = [lane for lane in lanes if not lane.codecs and lane.writer is EXACT and _has_kernel(lane)]
        alike: dict[tuple[Any, int], list[Lane]] = {}
        for lane, number in zip(mine, self._next(mine), strict=True):
            alike.setdefault((lane.rule, number), []).append(lane)
        for (rule, number), some in alike.items():
            weights = [local_part(lane.parameter) for lane in some]
            gradients = [local_part(cast(Tensor, lane.parameter.grad)).contiguous() for lane in some]
            whole_step_(weights, gradients, [self._stored(lane) for lane in some], rule.adam, number, lr, decay)
        taken = {id(lane) for lane in mine}
        return [lane for lane in lanes if id(lane) not in taken]

    def _fused_rows(self, lane: Lane, step: int, work: Workspace, lr: float, decay: float, within: slice) -> None:
        """``_update_rows`` by a kernel; what no kernel writes, weights of few bits, some rows at a time."""
        weight, gradient = (as_rows(local_part(cast(Tensor, one)))[within] for one in (lane.parameter, lane.parameter.grad))
        stored, first = {name: as_rows(tensor) for name, tensor in self._stored(lane).items()}, within.start or 0
        adam, bits = cast(ElementwiseAdam, lane.rule).adam, BITS[lane.codecs["exp_avg"].name] if lane.codecs else WHOLE
        if lane.writer is EXACT and weight.is_contiguous():
            fused_step_(weight, gradient.contiguous(), stored, adam, bits, step, lr, decay, True)
            return
        for rows in row_chunks(gradient.shape[0], gradient[:1].numel(), work.elements, gradient):
            update = work.take("gradient", gradient[rows].shape, gradient, torch.float32).copy_(gradient[rows])
            kept = {name: tensor[rows] for name, tensor in stored.items()}
            fused_step_(update, update, kept, adam, bits, step, lr, decay, False)
            lane.write_(slice(first + rows.start, first + rows.stop), kept, update, lr, decay, step)

    def _update_rows(self, lane: Lane, step: int, work: Workspace, lr: float, decay: float, within: slice = slice(None)) -> None:
        """Of one lane, some rows at a time. ``within``: those that are updated, where ``_stored`` has the states of no others."""
        if lane.path != "eager":
            self._fused_rows(lane, step, work, lr, decay, within)
            return
        gradient, first = as_rows(local_part(cast(Tensor, lane.parameter.grad)))[within], within.start or 0
        stored = {name: as_rows(tensor) for name, tensor in self._stored(lane).items()}
        for rows in row_chunks(gradient.shape[0], gradient[:1].numel(), work.elements, gradient):
            # The rule may overwrite its gradient; the parameter's own stays as it is.
            part = work.take("gradient", gradient[rows].shape, gradient, lane.dtype).copy_(gradient[rows])
            kept = {name: tensor[rows] for name, tensor in stored.items()}
            lane.write_(slice(first + rows.start, first + rows.stop), kept, _updated(lane, kept, part, step, work), lr, decay, step)

    def _table(self, lane: Lane, rule: RowSparse, lr: float, decay: float) -> None:
        self._next([lane])

        def update(weight: Tensor, kept: dict[str, Tensor], gradient: Tensor) -> None:
            states = _decoded(lane, kept, weight.shape)
            change = rule.update(gradient.to(lane.dtype, copy=True), states, 0)
            _encode(lane, kept, states)
            weight.mul_(1 - lr * decay).sub_(change, alpha=lr)  # tables are float32: Lane

        gradient = local_part(cast(Tensor, lane.parameter.grad))
        update_touched(
            local_part(lane.parameter), self._stored(lane), gradient, update, CHUNK_ELEMENTS, by_columns=lane.placed.columns is not None
        )

    def _matrices(self, lanes: Sequence[Lane], group: dist.ProcessGroup | None, lr: float, decay: float) -> None:
        by_kernel: dict[Any, list[Lane]] = {}
        others: list[Lane] = []
        for lane in lanes:
            (by_kernel.setdefault(lane.rule, []) if lane.summed is None and _has_kernel(lane) else others).append(lane)
        for some in by_kernel.values():
            self._fused_matrices(some, lr, decay)
        lanes = others
        states, steps = [], cast(list[Steps], [])
        for lane, gradient in zip(lanes, _gradients(lanes, group), strict=True):
            stored = self._stored(lane)
            states.append((stored, _decoded(lane, stored, None)))
            step = lane.method_step(gradient, states[-1][1], self._next([lane])[0])
            steps.append(with_weight(step, partial(lane.weight, stored)))
        made = [{name: state._version for name, state in decoded.items()} for _, decoded in states]
        for i, update in _updates(lanes, run_together(steps, group), group):
            stored, decoded = states[i]
            # What no one wrote, such as a basis between refreshes, keeps its bits.
            _encode(lanes[i], stored, {name: state for name, state in decoded.items() if state._version != made[i][name]})
            lanes[i].write_(
                slice(0, len(local_part(lanes[i].parameter))), stored, update, lr, decay, int(self.state[lanes[i].parameter]["step"])
            )

    def _fused_matrices(self, lanes: Sequence[Lane], lr: float, decay: float) -> None:
        """Of matrices of one method that this rank has whole, by a kernel."""
        method = cast(fused_low_rank.Known, fused_low_rank.known(lanes[0].rule))
        numbers, stored, gradients = self._next(lanes), [self._stored(lane) for lane in lanes], [lane.gradient() for lane in lanes]
        states = [_decoded(lane, kept, None) if lane.codecs else kept for lane, kept in zip(lanes, stored, strict=True)]
        made = [
            {name: state._version for name, state in one.items()} if lane.codecs else {} for lane, one in zip(lanes, states, strict=True)
        ]
        bases = [
            method.basis(gradient, one, lane.placed.rows, number, lane.key).contiguous()
            for lane, gradient, one, number in zip(lanes, gradients, states, numbers, strict=True)
        ]
        weights = [local_part(lane.parameter) for lane in lanes]
        lefts = [method.left(lane.placed.shape) for lane in lanes]
        size = fused_low_rank.scratch_elements(weights, bases, lefts, method.lift)
        scratch = weights[0].new_empty(size)  # not of the workspace: of large matrices it is too much to keep
        gradients = [gradient.contiguous() for gradient in gradients]
        fused_low_rank.step_(method, weights, gradients, bases, states, numbers, lefts, scratch, lr, decay)
        for lane, kept, one, before in zip(lanes, stored, states, made, strict=True):
            if lane.codecs:
                written = {name for name, state in one.items() if state._version != before[name]} | {"exp_avg", "exp_avg_sq"}
                _encode(lane, kept, {name: one[name] for name in written})

    def _stored(self, lane: Lane) -> dict[str, Tensor]:
        """This rank's parts of what is kept."""
        state = self.state[lane.parameter]
        return {name: local_part(state[name]) for name in lane.stored()}


def _has_kernel(lane: Lane) -> bool:
    """In C++, which takes contiguous memory."""
    return lane.path == "C++" and local_part(lane.parameter).is_contiguous()


def together(lanes: Sequence[Lane]) -> Iterator[tuple[dist.ProcessGroup | None, list[Lane]]]:
    """Lanes whose matrices the same ranks share, at most ``TOGETHER_ELEMENTS`` of each rank at a time; the same on every rank."""
    groups: dict[dist.ProcessGroup | None, list[Lane]] = {}
    for lane in lanes:
        groups.setdefault(lane.placed.group, []).append(lane)
    for group, members in groups.items():
        some: list[Lane] = []
        size = 0
        for lane in members:
            largest = -(-torch.Size(lane.placed.shape).numel() // lane.placed.rows.ranks)
            if some and size + largest > TOGETHER_ELEMENTS:
                yield group, some
                some, size = [], 0
            some.append(lane)
            size += largest
        if some:
            yield group, some


def _gradients(lanes: Sequence[Lane], group: dist.ProcessGroup | None) -> list[Tensor | None]:
    """This rank's rows of every lane's gradient; None of one that was summed in coordinates."""
    found = [lane.gradient() if lane.summed is None else None for lane in lanes]
    matrices = [lane.redealt for lane in lanes if lane.redealt is not None]
    if not matrices or group is None:
        return found
    rows = iter(to_rows([cast(Tensor, one) for one, lane in zip(found, lanes, strict=True) if lane.redealt is not None], matrices, group))
    return [one if lane.redealt is None else next(rows) for one, lane in zip(found, lanes, strict=True)]


def _updates(lanes: Sequence[Lane], ended: Iterator[tuple[int, Update]], group: dist.ProcessGroup | None) -> Iterator[tuple[int, Update]]:
    """Every update as it ends, in the rows that the parameter has; those of matrices that are dealt anew together, when all are there."""
    anew: list[tuple[int, Tensor]] = []
    for i, update in ended:
        if lanes[i].redealt is None or group is None:
            yield i, update
        else:
            anew.append((i, formed(update)))
    if anew:
        assert group is not None
        parts = to_parts([update for _, update in anew], [cast(Redealt, lanes[i].redealt) for i, _ in anew], group)
        yield from zip([i for i, _ in anew], parts, strict=True)


def _updated(lane: Lane, stored: dict[str, Tensor], gradient: Tensor, step: int, work: Workspace) -> Tensor:
    """What an elementwise rule makes of rows that are updated as those of ``lane``; ``stored`` is written, ``gradient`` may be."""
    states = _decoded(lane, stored, gradient.shape, work)
    update = cast(Rule, lane.rule).update(gradient, states, step)
    _encode(lane, stored, states, work)
    return update


def _decoded(lane: Lane, stored: dict[str, Tensor], shape: torch.Size | None, work: Workspace | None = None) -> dict[str, Tensor]:
    """The states to work on; ``shape``: of every state (elementwise), None: each its own."""
    states = {}
    for name, spec in lane.specs.items():
        if name in lane.codecs:
            parts = {part: stored[kept] for part, kept in lane.parts[name].items()}
            own, device = shape or torch.Size(lane.placed.local_shape(spec)), next(iter(parts.values()))
            out = work.take(name, own, device, torch.float32) if work else None
            states[name] = lane.codecs[name].decode(parts, own, out, work.scratch(device) if work else None)
        else:
            states[name] = stored[name]
    return states


def _encode(lane: Lane, stored: dict[str, Tensor], states: dict[str, Tensor], work: Workspace | None = None) -> None:
    for name, codec in lane.codecs.items():
        if name in states:
            parts = {part: stored[kept] for part, kept in lane.parts[name].items()}
            codec.encode_(states[name], parts, work.scratch(states[name]) if work else None)
