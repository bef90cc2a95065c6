"""The plan of a run configuration: which device, which vocabulary, then a traced step or formulas. Imports no torch.

Try alone: ``longstride plan debug_cpu``.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from pydantic import ValidationError

from memory_mgmt.activations import KNOWN_MEMORIES
from memory_mgmt.changes import memory_options, offload_options, parameter_options
from memory_mgmt.cost_model import Rates, Topology, predict_step
from memory_mgmt.devices import DEVICES, GIB, Device, device_from_torch_name, device_named
from memory_mgmt.estimate import estimate
from memory_mgmt.native import cache_dir
from memory_mgmt.plan import Change, MemoryPlan, Prediction
from memory_mgmt.policy import Policy
from memory_mgmt.policy_settings import policy_of
from memory_mgmt.problem import Setting
from memory_mgmt.trace import Trace
from memory_mgmt.traced_plan import Limits, plan_of_trace, step_addresses
from models.errors import UserError
from models.flops import model_flops_per_token, parameter_count
from parallel.dims import ParallelDims
from trainer.choosing import choose_policy, setting_of
from trainer.choosing_offload import resolve_offload
from trainer.compile_rules import plan_note
from trainer.config import RunConfig
from trainer.evals.registry import tokenizer_of
from trainer.memory_kernels import check_memory_kernel
from trainer.optimizer_plan import optimizer_plan
from trainer.segment_rules import not_shared
from trainer.tracing import TraceRequest, trace_step, trace_steps
from trainer.zero_plan import with_zero

VOCAB_MULTIPLE = 64
"""Embedding rows are rounded up to a multiple of this, so that they shard and tile evenly."""
CHANGES_SHOWN = 3
HOST_SHARE = 0.8
"""Of a node's memory that offload may take where memory.host_gib does not say."""
ADDRESS_SECONDS = 2.0
"""Spent on addresses in a plan; a step of thousands of buffers takes a fraction of it."""
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Target:
    """What a configuration is planned for: a device, its node, and the vocabulary that the data brings."""

    config: RunConfig
    device: Device
    limits: Limits
    vocab_size: int
    correction: float = 1.0
    """How many times its plan the run took when it ran out of memory (``trainer/out_of_memory.py``)."""

    @property
    def ranks(self) -> int:
        """Of the run."""
        return _ranks(self.config)

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node's host memory and links."""
        on_node = self.device.node.devices if self.device.node is not None else self.ranks
        return min(self.ranks, on_node)

    @property
    def host_budget(self) -> int:
        """Host memory that one rank may take for offload: its share of memory.host_gib, or of four fifths of the node's memory."""
        node = self.device.node.host_bytes if self.device.is_cuda and self.device.node is not None else host_bytes()
        configured = self.config.memory.host_gib
        return int(configured * GIB if configured is not None else HOST_SHARE * node) // self.ranks_per_node

    @property
    def room(self) -> tuple[int | None, int]:
        """Bytes that a rank may take of a GPU (None: a CPU's memory is the host's), and the model's parameters: for ``places``."""
        bytes_ = (self.limits.bytes or self.device.memory_bytes) if self.device.is_cuda else None
        return bytes_, parameter_count(self.config.model, self.vocab_size).total

    def with_config(self, config: RunConfig) -> Target:
        """The same device for other settings."""
        return replace(target_of(config, self.device), correction=self.correction)

    def request(self, policy: Policy | None = None) -> TraceRequest:
        """The step to trace."""
        threads = 1 if self.device.is_cuda else self.config.train.threads_per_rank or max(1, (os.cpu_count() or 1) // self.ranks)
        device_type = "cuda" if self.device.is_cuda else "cpu"
        return TraceRequest(self.config, self.vocab_size, device_type, policy, threads, capability=self.device.capability)


def plan_run(config: RunConfig, device_name: str | None = None, correction: float = 1.0, *, with_changes: bool = True) -> MemoryPlan:
    """What one rank of ``config`` will hold on ``device_name`` (None: this machine's device under train.device), and how fast it goes.

    ``correction``: how many times its plan the run took when it ran out of memory. ``with_changes`` False leaves out what would lower a
    peak that does not fit, which takes a traced step for each of some eight settings.

    Raises UserError for an unknown device, a vocabulary that does not fit the tokenizer, or a step that cannot be traced.
    """
    plan = plan_target(replace(target_for(config, device_name), correction=correction), with_changes)
    return replace(plan, compiled=plan_note(config))


def target_for(config: RunConfig, device_name: str | None) -> Target:
    """What ``config`` is planned for on ``device_name`` (None: this machine's device). Raises UserError for an unknown device."""
    try:
        return target_of(config, this_machine(config.train.device) if device_name is None else device_named(device_name))
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def same_step(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations plan the same step within the same limits."""
    keys = [
        (TraceRequest(c, 1, "cpu").to_dict(), c.memory, c.train.device, c.train.threads_per_rank, c.data.tokenizer, c.data.synthetic)
        for c in (one, other)
    ]
    return keys[0] == keys[1]


def plan_target(target: Target, with_changes: bool = False) -> MemoryPlan:
    """``plan_run`` of a target."""
    check_memory_kernel(target.config, target.device, here=False)
    if "auto" in (target.config.memory.offload_optimizer, target.config.memory.offload_parameters):
        config, plan = resolve_offload(target.config, lambda each: plan_target(target.with_config(each)), *target.room)
        if plan.fits or not with_changes:
            return plan
        target = target.with_config(config)
    if target.config.memory.plan == "estimate":
        if target.config.memory.recompute == "auto":
            raise UserError("memory.recompute: auto needs a traced step; leave memory.plan at trace")
        if target.config.layout == "per_document":
            raise UserError(
                "parallel.layout: per_document needs a traced step (formulas know contiguous and zigzag); leave memory.plan at trace"
            )
        if target.config.parallel.memory_exchange != "states":
            raise UserError(
                f"parallel.memory_exchange: {target.config.parallel.memory_exchange} needs a traced step (formulas know states); leave "
                "memory.plan at trace"
            )
        if target.config.parallel.kv_residence == "host":
            raise UserError(
                "parallel.kv_residence: host needs a traced step (formulas keep keys on the device); leave memory.plan at trace"
            )
        asked = target.config.model.memory
        if asked.around_stack or target.config.train.segment_tokens is not None:
            what = f"model.memory.kind: {asked.kind} runs" if asked.around_stack else "train.segment_tokens: a sequence is read"
            raise UserError(f"{what} segment by segment and needs a traced step; leave memory.plan at trace")
        if "memory" in target.config.model.layer_kinds and (asked.kind not in KNOWN_MEMORIES or asked.attach != "mixer"):
            known, key = " and ".join(KNOWN_MEMORIES), "kind" if asked.kind not in KNOWN_MEMORIES else "attach"
            raise UserError(
                f"model.memory.{key}: {getattr(asked, key)} needs a traced step (formulas know {known} in place of attention); "
                "leave memory.plan at trace"
            )
        if "hierarchical" in target.config.model.feedforward_kinds:
            raise UserError("model.feedforward: hierarchical memories need a traced step; leave memory.plan at trace")
        if target.config.optim.is_fused:
            raise UserError("optim.fuse_backward: an update in the backward pass needs a traced step; leave memory.plan at trace")
        if target.config.optim.bfloat16_weights:
            raise UserError(f"optim.weights: {target.config.optim.kept_weights} needs a traced step; leave memory.plan at trace")
        if target.config.memory.offload_optimizer == "host" and not target.config.optim.is_torch_adamw:
            preset = target.config.optim.preset
            raise UserError(f"memory.offload_optimizer: host with optim.preset {preset} needs a traced step; leave memory.plan at trace")
        if target.config.memory.quantise != "none":
            raise UserError(f"memory.quantise: {target.config.memory.quantise} needs a traced step; leave memory.plan at trace")
        return _estimated(target)
    if target.config.memory.recompute == "auto":
        return _chosen(target, with_changes)
    return plan_traced(target, trace_step(target.request()), with_changes)


def target_of(config: RunConfig, device: Device) -> Target:
    """``config`` on ``device``."""
    budget = None if config.memory.budget_gib is None else int(config.memory.budget_gib * GIB)
    available = device.memory_bytes if device.is_cuda else host_bytes() // _ranks(config)
    return Target(config, device, Limits(budget, available), model_vocab_size(config, tokenizer_of(config.data).vocab_size))


def plan_traced(target: Target, trace: Trace, with_changes: bool = True) -> MemoryPlan:
    """The plan of a traced step: memory, time, addresses, and what would lower the peak if it does not fit."""
    memory = target.config.memory
    policy = None if memory.recompute == "auto" else policy_of(memory, target.config.model.layer_kinds)
    plan = replace(bare_plan(target, trace), policy=policy)
    plan = replace(plan, prediction=predict(target, trace), addresses=step_addresses(trace, ADDRESS_SECONDS)[1])
    return replace(plan, changes=_changes_that_fit(target, plan)) if with_changes and not plan.fits else plan


def bare_plan(target: Target, trace: Trace) -> MemoryPlan:
    """Memory and limits of a traced step, without its time, addresses and changes."""
    plan = plan_of_trace(
        trace,
        target.device,
        target.ranks,
        target.limits,
        prefetched_bytes=_prefetched(target),
        correction=target.correction,
        arena=target.config.memory.arena,
    )
    if target.config.engine == "deepspeed":
        plan = with_zero(plan, target.config.deepspeed, target.room[1], target.ranks, target.device.is_cuda)
    return _with_host(target, plan, sum(b.size for b in trace.of("host") if b.kind in ("optimizer", "parameter")))


def _with_host(target: Target, plan: MemoryPlan, states_bytes: int) -> MemoryPlan:
    """The plan with what is allowed of host memory. A disk takes what is above that, but never the optimizer's states."""
    disk = target.config.memory.offload_dir is not None and states_bytes <= target.host_budget
    where = "host" if target.config.memory.offload_optimizer == "host" else "none"
    parameters = "host" if target.config.memory.offload_parameters == "host" else "none"
    plan = replace(plan, sequence=not_shared(target.config))
    return replace(plan, host_budget_bytes=target.host_budget, disk_tier=disk, offload_optimizer=where, offload_parameters=parameters)


def _chosen(target: Target, with_changes: bool) -> MemoryPlan:
    """The plan with the policy that the planner chooses."""
    chosen = choose_policy(
        setting_for(target), lambda policy: trace_step(target.request(policy)), lambda trace: bare_plan(target, trace).peak_bytes
    )
    plan = replace(plan_traced(target, chosen.trace, with_changes), policy=chosen.policy)
    if chosen.choice is None:
        return replace(plan, binding="nothing fits: this is the policy that needs least")
    return replace(plan, binding=chosen.choice.binding, worth=chosen.choice.worth)


def setting_for(target: Target) -> Setting:
    """The planner's circumstances. Raises UserError where the device's rates are not known."""
    rates = rates_of(target.device, target.config.train.deterministic)
    if rates is None:
        raise UserError(
            f"memory.recompute: auto needs the rates of {target.device.name}; measure them there with longstride plan --calibrate"
        )
    return setting_of(
        target.config,
        target.vocab_size,
        rates,
        ParallelDims.from_config(target.config.parallel, target.ranks),
        target.ranks_per_node,
        budget=target.limits.bytes or target.device.memory_bytes or host_bytes() // target.ranks,
        host=0 if target.config.memory.offload == "none" else target.host_budget,
        cuda=target.device.is_cuda,
    )


def predict(target: Target, trace: Trace) -> Prediction | None:
    """Time of the traced step; None where the device's rates are not known."""
    rates = rates_of(target.device, target.config.train.deterministic)
    if rates is None:
        return None
    config = target.config
    tokens = config.global_batch_sequences * config.data.seq_len
    traced_passes = min(config.train.grad_accum, 2)  # the others take as long as these
    peak = target.device.peak_tflops.get(config.train.precision)
    return predict_step(
        trace,
        rates,
        Topology.of(ParallelDims.from_config(config.parallel, target.ranks), target.ranks_per_node),
        tokens_per_step=tokens,
        model_flops_per_step=model_flops_per_token(config.model, target.vocab_size, config.data.seq_len) * tokens,
        peak_flops=peak * 1e12 if peak else None,
        passes=config.train.grad_accum / traced_passes,
    )


def rates_of(device: Device, deterministic: bool = True) -> Rates | None:
    """Achieved rates: measured ones where ``longstride plan --calibrate`` ran on this kind of device, else the device table's, with the
    attention kernel that ``models/kernels.py`` chooses (``train.deterministic`` excludes cuDNN). Raises UserError for measured ones that
    cannot be read."""
    measured = calibration_path(device.name)
    if measured.exists():
        try:
            return Rates.from_calibration(measured)
        except ValueError as error:  # damaged, or of an earlier release
            raise UserError(f"{error}; measure again with longstride plan --calibrate, or delete that file") from None
    by_cudnn = not deterministic and device.capability in ((9, 0), (10, 0))
    attention = "cudnn" if by_cudnn else "flash2"
    try:
        return Rates.from_device(device, attention=attention, cores=os.cpu_count() or 1)
    except ValueError:
        return None


def calibration_path(device_name: str) -> Path:
    """Where the calibration of a kind of device is kept."""
    return cache_dir() / f"calibration-{device_name.replace(' ', '_').replace('/', '_')}.json"


def _changes_that_fit(target: Target, plan: MemoryPlan) -> tuple[Change, ...]:
    """The three cheapest changes of settings that make the plan fit, by the predicted time of their traced steps; where none does,
    those that come nearest."""
    options = [(text, target.with_config(config), cost) for text, config, cost in _options(target)]
    trace_steps([other.request() for _, other, _ in options if other.config.memory.recompute != "auto"])  # in one process
    found: list[tuple[bool, float, Change]] = []
    before = plan.prediction
    for text, other, cost in options:
        changed = plan_target(other)
        if changed.peak_bytes >= plan.peak_bytes:
            continue
        after = changed.prediction
        slower = after.step_seconds / before.step_seconds - 1 if after and before else 0.0
        words = f"step {slower:+.0%}" if after and before and other.ranks == target.ranks else cost
        more_hardware = 1.0 if other.ranks > target.ranks else 0.0  # the dearest change
        found.append((changed.fits, slower + more_hardware, Change(text, changed.peak_bytes, words)))
    fitting = sorted((entry for entry in found if entry[0]), key=lambda entry: entry[1])
    nearest = sorted((entry for entry in found if not entry[0]), key=lambda entry: entry[2].peak_bytes)
    return tuple(change for _, _, change in (fitting or nearest)[:CHANGES_SHOWN])


def _options(target: Target) -> list[tuple[str, RunConfig, str]]:
    """(command-line overrides, the changed configuration, cost in words): single memory settings and all of them, or for a policy that
    is chosen host memory; twice the ranks."""
    config, memory = target.config, target.config.memory
    native = config.engine == "native"
    movable = native and target.device.is_cuda and not config.optim.is_fused  # the optimizer's states
    if memory.recompute == "auto":
        options = [({"offload": "kept"}, "copies to host memory")] if memory.offload == "none" else []
        options += offload_options(memory, cuda=movable)
    else:
        shape = {"seq_len": config.data.seq_len, "cp": config.parallel.cp, "vocab_size": target.vocab_size}
        single = memory_options(config.model, memory, **shape, cuda=movable)
        together = {key: value for settings, _ in single for key, value in settings.items()}
        options = [*single, (together, "the costs of each added")] if len(single) > 1 else single
    options += parameter_options(memory, cuda=movable and config.optim.is_torch_adamw)
    found = []
    for settings, cost in options:
        text = " ".join(f"memory.{key}={value}" for key, value in settings.items())
        found.append((text, config.model_copy(update={"memory": memory.model_copy(update=settings)}), cost))
    wider = config.parallel.model_copy(update={"cp": 2 * config.parallel.cp})
    with contextlib.suppress(ValidationError):
        found.append((f"parallel.cp={wider.cp}", RunConfig.model_validate({**dict(config), "parallel": wider}), "twice the ranks"))
    return found


def _prefetched(target: Target) -> int:
    """Batches of whole sequences that a CPU rank holds beside the one in the trace: the loader prepares the steps that follow."""
    config = target.config
    if target.device.is_cuda:
        return 0
    one = 3 * 4 * config.train.micro_batch_size * config.data.seq_len
    passes = config.train.grad_accum
    return one * (3 * passes - min(passes, 2))


def _estimated(target: Target) -> MemoryPlan:
    config = target.config
    plan = estimate(
        config.model,
        config.parallel,
        config.memory,
        config.optim,
        seq_len=config.data.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum=config.train.grad_accum,
        precision=config.train.precision,
        residual=config.train.residual,
        vocab_size=target.vocab_size,
        layout=config.layout,
        device=target.device,
        device_bytes=target.limits.device_bytes,
        optimizer_bytes=None if config.optim.preset == "adamw" else optimizer_plan(config, target.vocab_size).bytes,
    )
    return _with_host(target, plan, plan.host_bytes)


def model_vocab_size(config: RunConfig, tokenizer_vocab: int) -> int:
    """Rows of the embedding; raises UserError when model.vocab_size is too small for the tokenizer."""
    configured = config.model.vocab_size
    if configured is None:
        rounded, tp = -(-tokenizer_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, config.parallel.tp
        if rounded % tp:
            raise UserError(
                f"parallel.tp {tp} does not divide the {rounded} rows of the embedding (model.vocab_size null: the tokenizer's "
                f"{tokenizer_vocab}, rounded up to {VOCAB_MULTIPLE}); set model.vocab_size={-(-rounded // tp) * tp}, or another parallel.tp"
            )
        return rounded
    if configured < tokenizer_vocab:
        raise UserError(
            f"model.vocab_size: {configured} is smaller than the {tokenizer_vocab} tokens of data.tokenizer '{config.data.tokenizer}'; "
            "leave it null or raise it"
        )
    return configured


def this_machine(setting: str) -> Device:
    """The device a rank gets here under ``train.device``: the first GPU that the driver lists, if torch can use one, else the CPU."""
    gpu = _first_gpu()
    if setting == "cpu" or gpu is None or _torch_without_cuda():
        return DEVICES["cpu"]
    return device_from_torch_name(gpu) or Device(gpu, None, {}, (gpu,))


def host_bytes() -> int:
    """Memory of this machine or container."""
    limits = [psutil.virtual_memory().total]
    for path in _CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _ranks(config: RunConfig) -> int:
    return config.parallel.ranks_asked


def _first_gpu() -> str | None:
    """What the driver calls the first GPU, without asking CUDA."""
    for file in sorted(_DRIVER_GPUS.glob("*/information")):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                return value.strip()
    return None


def _torch_without_cuda() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
