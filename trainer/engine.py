"""One model, its optimizer and its ranks: forward and backward over the micro-batches of a step, then the update.

The engine owns every tensor of a run. It knows nothing of data sources, files or schedules. Losses are sums over tokens,
divided once by the number of valid tokens of the whole step on all ranks, so a rank without a valid token is legal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from memory_mgmt.optimizer_on_host import OnHost
from memory_mgmt.parameter_offload import OffloadedParameters
from models.batch import IGNORE_INDEX, Batch
from models.int8_weight import stored
from models.memory.protocol import State
from models.parts import Part
from models.segments import Segment
from models.tables import columns_of
from models.transformer import Transformer
from optim.clip import clip_grad_norm
from optim.driver import ComposedOptimizer
from optim.fused_backward import FusedBackward
from parallel.columns import as_whole
from parallel.fsdp import reshard
from parallel.mesh import Mesh
from parallel.sequence import Layout, shard_batch
from parallel.tensor_parallel import as_saved, sum_copies
from trainer.carried_states import CarriedStates
from trainer.replay import Around, SegmentRunner
from trainer.tensor_pieces import local_parts

Precision = Literal["bf16", "fp32", "fp64"]
POSITION_BUCKET_TOKENS = 65_536
"""Width of the buckets in which losses are reported by position in the sequence."""


@dataclass(frozen=True)
class LossSums:
    """Summed negative log likelihood in nats and token counts over all ranks, in all and per position bucket."""

    nll: float
    valid_tokens: int
    bucket_nll: tuple[float, ...]
    bucket_tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean loss per valid token in nats; nan without valid tokens."""
        return self.nll / self.valid_tokens if self.valid_tokens else float("nan")

    @property
    def loss_by_position(self) -> list[float | None]:
        """Mean loss of each bucket of ``POSITION_BUCKET_TOKENS``; None where it holds no valid token."""
        return [nll / count if count else None for nll, count in zip(self.bucket_nll, self.bucket_tokens, strict=True)]

    def position_lines(self) -> list[str]:
        """``loss_by_position`` for people, one line per bucket; nothing for sequences that fit in one bucket."""
        if len(self.bucket_nll) == 1:
            return []
        lines = []
        for i, loss in enumerate(self.loss_by_position):
            start, end = i * POSITION_BUCKET_TOKENS, (i + 1) * POSITION_BUCKET_TOKENS
            lines.append(f"  positions {start:>9,} to {end:>9,}: " + ("no tokens" if loss is None else f"loss {loss:.4f}"))
        return lines


def forward(model: Transformer, shard: Batch, device: torch.device, precision: Precision, segment: Segment | None = None) -> Any:
    """nll_BT of one shard on ``device``, with bf16 autocast if ``precision`` says so; ``segment`` as for `Transformer.forward`."""
    # No cache: it would keep a bf16 copy of every (gathered) weight until the end of the forward pass.
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    autocast = bf16 if precision == "bf16" else contextlib.nullcontext()
    with autocast:
        return model(shard.to(device), segment)


class _RunningSums:
    """Loss and token counts per position bucket, [2, buckets] float64 on the device."""

    def __init__(self, seq_len: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, -(-seq_len // POSITION_BUCKET_TOKENS), dtype=torch.float64, device=device)

    def add(self, nll_BT: torch.Tensor, shard: Batch) -> None:
        device = self.sums.device
        index_T = torch.cat([torch.arange(start, end, device=device) for start, end in shard.bounds.ranges])
        bucket_T = index_T // POSITION_BUCKET_TOKENS
        valid_BT = (shard.labels_BT != IGNORE_INDEX).to(device)
        self.sums[0].index_add_(0, bucket_T, nll_BT.detach().double().sum(0))
        self.sums[1].index_add_(0, bucket_T, valid_BT.double().sum(0))

    def total(self, distributed: bool, group: dist.ProcessGroup | None = None) -> LossSums:
        if distributed:
            dist.all_reduce(self.sums, group=group)
        nll, count = self.sums.tolist()
        return LossSums(sum(nll), int(sum(count)), tuple(nll), tuple(int(c) for c in count))


@torch.no_grad()
def evaluate(
    model: Transformer,
    shards: Iterable[Batch],
    device: torch.device,
    precision: Precision,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> LossSums:
    """Loss over ``shards`` (this rank's parts; at least one, equally many on every rank) without gradients.

    ``distributed``: sum over all ranks of ``group`` (None: of the default process group).
    """
    sums: _RunningSums | None = None
    model.eval()
    for shard in shards:
        sums = sums or _RunningSums(shard.bounds.seq_len, device)
        sums.add(forward(model, shard, device, precision), shard)
    model.train()
    if isinstance(model, FSDPModule):
        reshard(model)  # the head and the root stay gathered for a backward pass that does not come
    if sums is None:
        raise ValueError("evaluate needs at least one batch")
    return sums.total(distributed, group)


def _whole(value: torch.Tensor, parameter: torch.Tensor, part: Part | None) -> torch.Tensor:
    """What belongs to ``parameter``; of a table shared by columns as a DTensor where it has columns, of a ``part`` as one of the whole."""
    if part is not None:
        return as_saved(value, part)
    columns = columns_of(parameter)
    return value if columns is None or value.ndim < 2 else as_whole(value.detach(), columns)


class Engine:
    """See the module. ``mesh`` None means one process without a process group. ``fused``: updates inside the backward pass, and clips;
    ``clip_norm`` is not read then."""

    by_parameter = True
    """Whether gradients and states are tensors of their parameter's shape, sharded or not."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer | OnHost,
        mesh: Mesh | None,
        device: torch.device,
        precision: Precision,
        layout: Layout,
        clip_norm: float | None,
        fused: FusedBackward | None = None,
        offloaded: OffloadedParameters | None = None,
        carried: CarriedStates | None = None,
        runner: SegmentRunner | None = None,
    ) -> None:
        self.model = model
        self.fused = fused
        # Taken once, while they are sharded: after a forward pass without a backward pass FSDP2's root module shows its gathered
        # parameters under the same names, and those have no optimizer state.
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
        self.mesh = mesh
        self.device = device
        self.precision: Precision = precision
        self.layout: Layout = layout
        self.clip_norm = clip_norm
        self.offloaded = offloaded
        """Where the parameters' values are, if that is host memory."""
        self.carried = carried
        """Memory states that go from sequence to sequence, if they do."""
        self.runner = runner
        """Runs the segments of a sequence where a memory stands around the stack."""

    @property
    def rank(self) -> int:
        """This process among all ranks of the run."""
        return dist.get_rank() if self.mesh is not None else 0

    def forward_backward(self, micro_batches: list[Batch], lr: float | None = None) -> LossSums:
        """Add to every parameter's gradient that of the step's mean loss; ``micro_batches`` hold whole sequences, the same
        on all sequence-parallel ranks of one data-parallel rank. Every rank must give equally many.

        A fused engine updates every parameter in the last micro-batch's backward pass, with learning rate ``lr``, which it needs here."""
        shards = [self._shard(batch) for batch in micro_batches]
        valid_tokens = self._count_valid(shards)
        sums = _RunningSums(micro_batches[0].bounds.seq_len, self.device)
        for number, shard in enumerate(shards if self.fused is None else shards[:-1]):
            with self._handed_on(number, shard):
                nll_BT = self._both_ways(shard, max(valid_tokens, 1))
            sums.add(nll_BT, shard)
        if self.fused is None:
            return self._total(sums)
        if lr is None:
            raise ValueError("a fused engine updates in the backward pass: give forward_backward the learning rate")
        self._set_rates(lr)
        with self._handed_on(len(shards) - 1, shards[-1]):
            return self._last_pass(self.fused, shards[-1], valid_tokens, sums)

    def _total(self, sums: _RunningSums) -> LossSums:
        return sums.total(self.mesh is not None, self.mesh.data_group if self.mesh is not None else None)

    def _handed_on(self, number: int, shard: Batch) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.carried is None else self.carried.handed_on(number, shard)

    def _last_pass(self, fused: FusedBackward, shard: Batch, valid_tokens: int, sums: _RunningSums) -> LossSums:
        """The last micro-batch of a fused step. The loss of the step is summed over ranks before its backward pass instead of after it: one
        that is not finite then moves no parameter, and no collective is added."""
        found: list[LossSums] = []

        @contextlib.contextmanager
        def around(nll_BT: torch.Tensor) -> Iterator[None]:
            sums.add(nll_BT, shard)
            found.append(self._total(sums))
            # Without update() the pass only adds to gradients, which step() drops.
            with fused.update() if math.isfinite(found[0].nll) else contextlib.nullcontext():
                yield

        self._both_ways(shard, max(valid_tokens, 1), around)
        if not math.isfinite(found[0].nll):
            fused.norm = torch.full((), float("nan"), dtype=torch.float64, device=self.device)
        return found[0]

    def _both_ways(self, shard: Batch, divisor: int, around: Around | None = None) -> torch.Tensor:
        """nll_BT of a pass, forward and backward: dividing before the backward pass keeps gradients in range; their sum over ranks then is
        the gradient of the mean. ``around``: given the losses, what is done around the (last) backward pass."""
        if self.runner is not None:
            return self.runner(self._one_segment, shard.to(self.device), divisor, around)
        nll_BT = forward(self.model, shard, self.device, self.precision)
        with around(nll_BT) if around is not None else contextlib.nullcontext():
            (nll_BT.sum() / divisor).backward()
        return nll_BT

    def _one_segment(self, shard: Batch, segment: Segment) -> tuple[torch.Tensor, State]:
        return forward(self.model, shard, self.device, self.precision, segment)

    def step(self, lr: float, accept: Callable[[float], bool] = math.isfinite) -> float:
        """Clip, update every parameter with learning rate ``lr``, clear gradients. Returns the global norm before clipping.

        ``accept`` is asked about that norm, on every rank, and nothing is updated when it says no, which it must of what is not finite.
        In a fused engine everything is updated already, also by what was not finite, unless the loss was not: then nothing is.
        """
        if self.fused is not None:
            self.fused.discard()
            return float("nan") if self.fused.norm is None else float(self.fused.norm)
        norm = float(self._clip())
        if accept(norm):
            self._set_rates(lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> torch.Tensor:
        """The norm before clipping, of every gradient once."""
        if self.mesh is None or self.mesh.dims.tp == 1:
            return clip_grad_norm(self.parameters.values(), self.clip_norm, self.mesh.shard_group if self.mesh is not None else None)
        parts = self.model.parts  # tables have the gradients of all ranks' tokens already, in columns of their own
        copies = [parameter for name, parameter in self.parameters.items() if name not in parts and columns_of(parameter) is None]
        sum_copies(copies, self.mesh.tp_group)
        elsewhere = copies if self.mesh.tp_rank else ()
        return clip_grad_norm(self.parameters.values(), self.clip_norm, self.mesh.model_group, elsewhere)

    def _set_rates(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["fixed_lr"] if "fixed_lr" in group else lr * group.get("lr_factor", 1.0)

    def evaluate(self, batches: Iterable[Batch]) -> LossSums:
        """Loss over whole-sequence ``batches`` without gradients; every rank must give equally many, at least one."""
        shards = (self._shard(batch) for batch in batches)
        group = self.mesh.data_group if self.mesh is not None else None
        return evaluate(self.model, shards, self.device, self.precision, self.mesh is not None, group)

    def state_dict(self) -> dict[str, Any]:
        """Tensors only (DTensors when sharded): parameters and optimizer states by fully qualified parameter name. They are the live
        ones: a checkpoint is loaded by writing into them."""
        optim: dict[str, torch.Tensor] = {}
        states, parts = self.optimizer.state, self.model.parts
        for name, parameter in self.parameters.items():
            lane = self.optimizer.lanes[parameter] if isinstance(self.optimizer, ComposedOptimizer) else None
            part = parts.get(name) if lane is None or lane.redealt is None else None  # states of whole matrices know no parts
            for key, value in states[parameter].items():
                optim[f"{name}.{key}"] = _whole(value, parameter, part)
        model = self.parameters if self.offloaded is None else self.offloaded.tensors
        saved = {name: _whole(stored(parameter), parameter, parts.get(name)) for name, parameter in model.items()}
        return {"model": saved, "optim": optim}

    def loaded(self) -> None:
        """To be called on all ranks when a checkpoint was written into what ``state_dict`` gave last. Nothing is to be done here."""

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter and optimizer state is, on all ranks (collective)."""
        state = self.state_dict()
        parts = [part for entry in state.values() for tensor in entry.values() for part in local_parts(tensor)]
        largest = [torch.linalg.vector_norm(part, float("inf")) for part in parts if part.is_floating_point() and part.numel()]
        bad = torch.tensor(float(not all(map(math.isfinite, torch.stack([each.double().cpu() for each in largest]).tolist()))))
        if self.mesh is not None:
            bad = bad.to(self.device)
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not float(bad)

    def memory_states(self) -> dict[str, Any]:
        """What memories carry to the next step, to be saved beside `state_dict`: copies, put back by ``carried.take_over``. All ranks must
        call it. Empty where nothing is carried."""
        return {} if self.carried is None else {"memory": self.carried.gathered()}

    def _shard(self, batch: Batch) -> Batch:
        if self.mesh is None or self.mesh.dims.cp == 1:
            return batch
        return shard_batch(batch, self.layout, self.mesh.cp_rank, self.mesh.dims.cp)

    def _count_valid(self, shards: list[Batch]) -> int:
        """Valid tokens of the whole step over all ranks."""
        count = torch.tensor(sum(int((shard.labels_BT != IGNORE_INDEX).sum()) for shard in shards), device=self.device)
        if self.mesh is not None:
            dist.all_reduce(count, group=self.mesh.data_group)
        return int(count)
