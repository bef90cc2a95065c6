"""Trace one steady training step of a configuration: the real engine on fake tensors and a fake process group.

Runs inside ``trainer/trace_process.py``. Equal layers are traced once and extended (``memory_mgmt/trace_extend.py``); where the
traced layers do not repeat exactly, the whole model is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_on_host import OnHost
from memory_mgmt.parameter_offload import OffloadedParameters
from memory_mgmt.policy import CLASSES, Policy
from memory_mgmt.policy_settings import policy_of
from memory_mgmt.trace import Trace
from memory_mgmt.trace_extend import MARGIN, NotRepeating, Shortening, extend, shorten
from memory_mgmt.trace_recorder import StepRecorder, layer_of
from models.batch import Batch, Bounds
from models.kernels import planned_for
from optim.driver import ComposedOptimizer
from optim.row_sparse import RowSparse
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh
from parallel.outbox import forget
from trainer.build import engine_for, shaped_model
from trainer.config import RunConfig
from trainer.engine import Engine

WARM_UP_TOKENS = 128
"""Tokens per range of the step before the one that counts: there sharding rules of parameters are worked out on whole fake tensors, which
a real run does not hold. They do not depend on the length of a sequence."""


def trace_request(request: dict[str, Any]) -> Trace:
    """The trace that ``request`` asks for (``TraceRequest.to_dict``)."""
    config = RunConfig.model_validate(request["config"])
    given = Policy.from_dict(request["policy"]) if request["policy"] is not None else None
    policy = given or policy_of(config.memory, config.model.layer_kinds)
    note = "asked for" if request["whole"] else "too few equal layers"
    capability = request["capability"] and tuple(request["capability"])
    with _process_group(request["world_size"], config), planned_for(capability, config.train.deterministic):
        for cut in [] if request["whole"] else _cuts(config, policy):
            try:
                return extend(_record(*_shortened(config, policy, cut), request), cut)
            except NotRepeating as reason:
                note = str(reason)
        trace = _record(config, policy, request).trace()
        trace.notes["not_extended"] = note
        return trace


def _cuts(config: RunConfig, policy: Policy) -> list[Shortening]:
    """Cuts to try, the one that traces least first. With several passes, with shards or with swapping a layer reaches further."""
    if "hierarchical" in config.model.feedforward_kinds or len(config.model.table_shapes) > 1:
        return []  # layers have rows of a table, or tables, of their own
    kinds, swaps = _repeating(_kinds(config), policy), _swaps(policy) or config.parallel.kv_residence == "host"
    margins = (MARGIN, MARGIN + 1) if swaps else (MARGIN - 1, MARGIN, MARGIN + 1)
    cuts = [shorten(kinds, multiple, margin) for multiple in ((2,) if swaps else (1, 2)) for margin in margins]
    # A reach counts layers: two periods of two are as good as three of one.
    return [cut for cut in cuts if cut.copies and cut.margin * cut.period >= MARGIN]


def _swaps(policy: Policy) -> bool:
    """Whether layers take turns with the two buffers of the way back from host memory."""
    return any(layer.of(name).swap > 0 for layer in policy.layers for name in CLASSES)


def _repeating(kinds: Sequence[Hashable], policy: Policy) -> list[Hashable]:
    """What must be equal for two layers to be equal; groups of blocks repeat as a whole."""
    return [(kind, layer, i % policy.group_blocks) for i, (kind, layer) in enumerate(zip(kinds, policy.layers, strict=True))]


def _kinds(config: RunConfig) -> list[Hashable]:
    return list(zip(config.model.layer_kinds, config.model.feedforward_kinds, strict=True))


def _shortened(config: RunConfig, policy: Policy, cut: Shortening) -> tuple[RunConfig, Policy]:
    kinds = tuple(config.model.layer_kinds[i] for i in cut.traced)
    wide = tuple(config.model.feedforward_kinds[i] for i in cut.traced)
    model = config.model.model_copy(update={"layers": kinds, "n_layers": None, "feedforward": wide})
    shorter = replace(policy, layers=tuple(policy.layers[i] for i in cut.traced))
    return config.model_copy(update={"model": model}), shorter


def _record(config: RunConfig, policy: Policy, request: dict[str, Any]) -> StepRecorder:
    device_type, world_size = request["device_type"], request["world_size"]
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    # The mesh is real: it reads rank numbers out of tensors.
    mesh = build_mesh(ParallelDims.from_config(config.parallel, world_size), device_type) if dist.is_initialized() else None
    recorder = StepRecorder(device_type, request["threads"])
    with _threads(request["threads"]), FakeTensorMode():
        store = HostStore(device, fake_empty=recorder.host_empty)
        with torch.device(device):
            model = shaped_model(_traced_in_place(config), request["vocab_size"], mesh, policy, store)
        if config.engine == "deepspeed" and config.deepspeed.stage < 3:
            for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
                unit.set_reshard_after_forward(False)
        recorder.watch(model)
        with recorder:
            offloaded = OffloadedParameters(model, store, device) if config.memory.offload_parameters == "host" else None
            engine = engine_for(config, model, mesh, device, store, offloaded)
            _adopt(recorder, engine)
            with _updates_left_out(engine):
                _step(recorder, engine, [_warm_up_batch(config)])
            batches = [_batch(config, config.data.seq_len) for _ in range(min(config.train.grad_accum, 2))]
            recorder.tag((x for b in batches for x in (b.tokens_BT, b.labels_BT, b.positions_BT)), "batch")
            if isinstance(engine.optimizer, ComposedOptimizer):
                recorder.tag(engine.optimizer.kept_temporaries(), "workspace")
            recorder.enter("forward")
            recorder.start_step()
            _step(recorder, engine, batches)
            recorder.finish()
    return recorder


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """What kernels take for each thread is traced as that of ``n``; nothing is computed here."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _traced_in_place(config: RunConfig) -> RunConfig:
    """DeepSpeed does not run on fake tensors; FSDP2 deals out the same shares (``trainer/zero_plan.py`` counts what differs)."""
    return config.model_copy(update={"engine": "native"})


def _step(recorder: StepRecorder, engine: Engine, batches: list[Batch]) -> None:
    if engine.fused is not None:  # its updates are part of the backward pass of the layer that runs
        engine.fused.watch = lambda gradients: recorder.tag(gradients, "gradient")
        engine.forward_backward(batches, lr=1e-3)
        engine.step(lr=1e-3)
        return
    engine.forward_backward(batches)
    recorder.tag((parameter.grad for parameter in engine.parameters.values()), "gradient")
    recorder.enter("clip")
    _follow_update(recorder, engine.optimizer)
    engine.step(lr=1e-3)


@contextlib.contextmanager
def _updates_left_out(engine: Engine) -> Iterator[None]:
    """Of the warm-up, where they are element by element on CUDA: they leave nothing behind there and read no value, and with few bits they
    are most of what a step does."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, ComposedOptimizer) or isinstance(optimizer, OnHost) or engine.device.type != "cuda":
        yield
        return
    if any(lane.is_method or isinstance(lane.rule, RowSparse) for lane in optimizer.lanes.values()):
        yield
        return
    vars(optimizer)["step_lanes"] = lambda group, lanes: None
    try:
        yield
    finally:
        del vars(optimizer)["step_lanes"]


def _follow_update(recorder: StepRecorder, optimizer: torch.optim.Optimizer | OnHost) -> None:
    """Note when the next update begins, and of which layer's states where they come in buckets."""
    if isinstance(optimizer, OnHost):
        optimizer.watch = lambda section: recorder.enter("update", layer_of(section), section)
        return

    def begin(*_: Any) -> None:
        recorder.enter("update")
        hook.remove()

    hook = optimizer.register_step_pre_hook(begin)


def _adopt(recorder: StepRecorder, engine: Engine) -> None:
    state = engine.state_dict()
    recorder.adopt(state["model"].items(), "parameter")
    recorder.adopt(state["optim"].items(), "optimizer")
    if engine.carried is not None:
        for number, states in enumerate(engine.carried.kept):
            for name, state in states.items():
                recorder.adopt(((f"{name}.{key} of pass {number}", value) for key, value in state.items()), "state")


def _warm_up_batch(config: RunConfig) -> Batch:
    """A short one. Every range of a rank is a document of its own, so that no keys travel: only parameters matter here."""
    ranges = config.parallel.cp * (1 if config.layout == "contiguous" else 2)
    tokens = min(config.data.seq_len, WARM_UP_TOKENS * ranges)
    return _batch(config, tokens, tuple(range(0, tokens, max(1, tokens // ranges))))


def _batch(config: RunConfig, tokens: int, documents: tuple[int, ...] = (0,)) -> Batch:
    """One micro-batch; on fake tensors only the shape counts. ``documents``: where they begin. Where data have prefixes, half of a
    sequence that is one document is one: so there are queries that see keys after them, and others that do not."""
    rows = config.train.micro_batch_size
    prefixes = ((tokens // 2,),) * rows if config.data.bidirectional_prefixes and documents == (0,) else ()
    clusters = _planned_clusters(config, rows, tokens) if config.data.cluster_key is not None else ()
    bounds = Bounds(tokens, ((0, tokens),), (documents,) * rows, prefixes, clusters)
    tokens_BT, labels_BT, positions_BT = (torch.zeros(rows, tokens, dtype=torch.int32) for _ in range(3))
    return Batch(tokens_BT, labels_BT, positions_BT, bounds, (True,) * rows)


def _planned_clusters(config: RunConfig, rows: int, tokens: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """So many stretches of a sequence as the settings plan for, equally long, of clusters as far from one another as there are."""
    own = config.model.hierarchical
    each, leaves = min(own.planned_documents, tokens), own.clusters[-1]
    spread = [number * leaves // (rows * each) % leaves for number in range(rows * each)]
    return tuple(tuple((i * tokens // each, spread[row * each + i]) for i in range(each)) for row in range(rows))


@contextlib.contextmanager
def _process_group(world_size: int, config: RunConfig) -> Iterator[None]:
    """A process group without peers, for a single rank only where it gathers parameters out of host memory. In the contiguous layout
    the last rank attends to most, and of heads that do not divide among the ranks it has the most, so that one is traced."""
    if world_size == 1 and config.memory.offload_parameters != "host":
        yield
        return
    most_work_last = config.layout == "contiguous" or config.parallel.sequence == "ring_x_ulysses"
    rank = world_size - 1 if most_work_last else 0
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        forget()
        dist.destroy_process_group()
