"""Build a run from its configuration: mesh, model, engine, data, checkpoints, metrics - in the order they depend on one another.

``train`` is what every rank executes; the front door starts the ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from memory_mgmt.apply import apply_policy
from memory_mgmt.arena import build_arena
from memory_mgmt.arena_cuda import use_expandable_segments
from memory_mgmt.host_allocator import return_freed_memory
from memory_mgmt.monitor import MemoryMonitor
from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_on_host import OnHost, build_on_host
from memory_mgmt.parameter_offload import OffloadedParameters
from memory_mgmt.plan import MemoryPlan, gib
from memory_mgmt.plan_check import PlanCheck, tensor_bytes
from memory_mgmt.policy import CLASSES, Policy
from memory_mgmt.policy_settings import policy_of
from models.flops import model_flops_per_token
from models.transformer import Transformer, init_weights
from optim.build import build_optimizer, quantise_matrices_
from optim.fused_backward import fuse_backward
from parallel.comm_dtypes import comm_dtypes, round_where_alone
from parallel.dims import ParallelDims
from parallel.distributed import name_device
from parallel.fsdp import add_up_in_float32
from parallel.log_lines import at_step
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import keep_keys_in_host, parallelize, split_sequence
from trainer.carried_states import CarriedStates
from trainer.checkpoint import CheckpointManager
from trainer.choosing_offload import as_planned
from trainer.compile_rules import compiled_layers
from trainer.compiling import compiled
from trainer.config import RunConfig
from trainer.config_file import dump
from trainer.console import RunConsole
from trainer.data.build import build_data
from trainer.engine import Engine
from trainer.initial_weights import fill_from
from trainer.mending import Mender, load_state
from trainer.metrics import MetricsWriter
from trainer.planning import model_vocab_size
from trainer.preemption import StopSignal
from trainer.rank_watch import RankWatch
from trainer.replay import segment_runner
from trainer.run_dir import RunDir
from trainer.state import TrainState
from trainer.throughput import peak_flops
from trainer.trainer import DONE, Trainer
from trainer.watchdog import Watchdog

_DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
"""Of parameters that ``optim.weights`` does not keep in fewer bits."""

Fill = Callable[..., object]
"""``fill(model, only=None)`` gives every parameter of a model its value, or ``only`` some, where the others have no memory yet."""


def build_model(
    config: RunConfig,
    vocab_size: int,
    mesh: Mesh | None,
    device: torch.device,
    policy: Policy | None = None,
    store: HostStore | None = None,
    fill: Fill | None = None,
) -> Transformer:
    """The model on ``device`` with initial weights: built without memory, wrapped, split and sharded, then materialised.

    ``policy`` None: what the memory settings say; ``store`` takes what it swaps (``host_store``). ``fill`` gives every parameter its
    value; None: by chance, from the seed.
    """
    with torch.device("meta"):
        model = shaped_model(config, vocab_size, mesh, policy, store)
    model.to_empty(device=device)
    (fill or _by_chance(config))(model)
    return model


def _by_chance(config: RunConfig) -> Fill:
    return lambda model, only=None: init_weights(model, config.train.seed, config.optim.mup_base_width, only)


def shaped_model(
    config: RunConfig, vocab_size: int, mesh: Mesh | None, policy: Policy | None = None, store: HostStore | None = None
) -> Transformer:
    """The model with its memory policy, split and sharded, on the default device; values of parameters are undefined."""
    with _parameters_in(torch.bfloat16 if config.optim.bfloat16_weights else _DTYPES[config.train.precision]):
        model = Transformer(config.model, vocab_size)
    if config.optim.kept_weights == "int8_stochastic":
        quantise_matrices_(model)
    model.residual_dtype = torch.bfloat16 if config.train.residual == "bf16" else None
    apply_policy(model, policy or policy_of(config.memory, config.model.layer_kinds), store)
    comm = comm_dtypes(config.parallel.kv_dtype, config.parallel.kv_gradient_dtype)
    if mesh is not None:
        scheme, memory, head_chunk = config.parallel.sequence, config.parallel.memory_exchange, config.parallel.head_chunk
        assert scheme != "auto" and memory != "auto", "settled before"
        if config.engine == "deepspeed":  # which deals out parameters itself
            split_sequence(model, mesh, config.layout, scheme, head_chunk, comm, memory)
        else:
            # A compiled graph takes gradients in their weights' dtype: those of bf16 copies would be rounded before they are summed.
            gather_dtype = torch.bfloat16 if config.train.precision == "bf16" and not compiled_layers(config) else None
            parallelize(model, mesh, config.layout, scheme, head_chunk, gather_dtype, comm, memory)
    if config.parallel.kv_residence == "host":
        assert store is not None, "host_store makes one"
        keep_keys_in_host(model, mesh, config.layout, store, config.parallel.kv_chunk, comm)
    round_where_alone(model, comm)
    return model


@contextlib.contextmanager
def _parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside have ``dtype``; converting them afterwards is not possible on fake tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_engine(
    config: RunConfig,
    vocab_size: int,
    mesh: Mesh | None,
    device: torch.device,
    policy: Policy | None = None,
    store: HostStore | None = None,
    fill: Fill | None = None,
) -> Engine:
    """Model and optimizer of ``config`` on this rank; ``policy``, ``store`` and ``fill`` as for ``build_model``."""
    if config.engine == "deepspeed":
        assert mesh is not None, "mesh_for starts a process group"
        with torch.device("meta"):
            model = shaped_model(config, vocab_size, mesh, policy, store)
        return _deepspeed_engine(device).build_deepspeed_engine(config, model, fill or _by_chance(config), mesh, device)
    if config.parallel.kv_residence == "host":
        store = store or HostStore(device)
    if config.memory.offload_parameters == "none":
        return engine_for(config, build_model(config, vocab_size, mesh, device, policy, store, fill), mesh, device, store)
    store = store or HostStore(device)
    with torch.device("meta"):
        model = shaped_model(config, vocab_size, mesh, policy, store)
    offloaded = OffloadedParameters(model, store, device)
    with offloaded.in_place():
        (fill or _by_chance(config))(model)
    return engine_for(config, model, mesh, device, store, offloaded)


def _deepspeed_engine(device: torch.device) -> ModuleType:
    """The module, by name: its package is optional, and takes seconds to import."""
    name_device(device)
    return importlib.import_module("trainer.deepspeed_engine")


def host_store(
    policy: Policy,
    device: torch.device,
    budget_bytes: int | None,
    directory: str | None,
    *,
    optimizer: bool = False,
    keys: bool = False,
) -> HostStore | None:
    """Host memory for what ``policy`` swaps and for the optimizer's states (``optimizer``) and for ``keys`` and values, at most
    ``budget_bytes`` of this rank together; None where there is nothing of these."""
    swaps = any(layer.of(name).swap > 0 for layer in policy.layers for name in CLASSES)
    return HostStore(device, budget_bytes, Path(directory) if directory else None) if swaps or optimizer or keys else None


def engine_for(
    config: RunConfig,
    model: Transformer,
    mesh: Mesh | None,
    device: torch.device,
    store: HostStore | None = None,
    offloaded: OffloadedParameters | None = None,
) -> Engine:
    """The engine around a model that is built and placed. ``store`` holds the optimizer's states where ``memory.offload_optimizer`` says
    so; None: one without a limit is made. ``offloaded``: the model's parameters where they are in host memory."""
    if config.optim.gradients == "fp32":
        add_up_in_float32(model)
    where = config.memory.offload_optimizer
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(config.memory, name) == "auto":
            raise ValueError(f"memory.{name} auto is decided by the planner; build with what it chose")
    if where == "host":
        optimizer = build_on_host(model, config.optim, config.train.seed, store or HostStore(device), offloaded)
    else:
        optimizer = build_optimizer(model, config.optim, seed=config.train.seed)
    settings, fused = config.optim, None
    if settings.is_fused:
        assert isinstance(optimizer, torch.optim.Optimizer), "offloaded states are refused by RunConfig"
        fused = fuse_backward(model, optimizer, clip_norm=settings.clip_norm, clip=settings.fused_clip)
    carried = None
    if config.train.carry_state == "document":
        wide = torch.float64 if config.train.precision == "fp64" else torch.float32
        carried = CarriedStates(model, config.train.micro_batch_size, config.train.grad_accum, device, wide, mesh)
    runner = segment_runner(config, model)
    how = (config.train.precision, config.layout, settings.clip_norm)
    return Engine(model, optimizer, mesh, device, *how, fused, offloaded, carried, runner)


def current_device(config: RunConfig) -> torch.device:
    """The device this rank computes on; the front door has made the rank's own GPU the current one."""
    if config.train.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def mesh_for(config: RunConfig, device: torch.device) -> Mesh | None:
    """The mesh of ``config`` over the running process group; None for a single process without one, unless its parameters are offloaded or
    its engine is DeepSpeed: then a group of one is started."""
    if not dist.is_initialized():
        ParallelDims.from_config(config.parallel, world_size=1)
        if config.memory.offload_parameters == "none" and config.engine == "native":
            return None
        # FSDP2 is what gathers parameters out of host memory, also on one rank; and DeepSpeed always asks a group.
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=HashStore(), rank=0, world_size=1)
    return build_mesh(ParallelDims.from_config(config.parallel, dist.get_world_size()), device.type)


def train(config: RunConfig, run_dir_path: Path | str, resume: bool, stop: StopSignal | None = None) -> int:
    """Train on this rank until the end or a stop signal; every rank of the run calls this. Returns the exit code.

    When there is more than one rank the process group is initialised before; ``memory_plan.json`` is written. ``stop``: that of a job;
    None: it stops for signals only. Raises UserError before anything is changed in the run directory, RunFailed afterwards.
    """
    run_dir, by_hand = RunDir(run_dir_path), stop is None
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(stop or StopSignal())
        if is_main:
            cleanup.enter_context(run_dir.lock())
        trainer = _build_trainer(config, run_dir, stop, resume, is_main, cleanup)
        try:
            with trainer.watchdog:
                exit_code = trainer.run()
        except BaseException as error:
            if is_main:
                reason = str(error) or type(error).__name__
                run_dir.write_state("failed", step=trainer.state.step, total_steps=config.train.steps, reason=reason)
            raise
        trainer.console.close()
        if is_main:
            status = "done" if exit_code == DONE else "stopped"
            run_dir.write_state(status, step=trainer.state.step, total_steps=config.train.steps, reason=trainer.stop_reason)
        for line in closing_lines(trainer, by_hand):
            trainer.console.note(line)
    return exit_code


def _build_trainer(
    config: RunConfig, run_dir: RunDir, stop: StopSignal, resume: bool, is_main: bool, cleanup: contextlib.ExitStack
) -> Trainer:
    torch.use_deterministic_algorithms(config.train.deterministic)
    # Deterministic mode also fills every new tensor with nan to expose reads of it; that is for debugging, and costs a pass each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    device = current_device(config)
    plan = MemoryPlan.from_json(run_dir.memory_plan.read_text())
    if device.type == "cuda":
        use_expandable_segments()
    elif plan.return_freed_blocks:
        return_freed_memory()
    placed = as_planned(config, plan)
    alone = not dist.is_initialized()
    mesh = mesh_for(placed, device)
    if alone and mesh is not None:
        cleanup.callback(dist.destroy_process_group)
    dp_rank, dp_size = (mesh.dp_rank, mesh.dims.dp) if mesh else (0, 1)
    data = build_data(config, dp_rank, dp_size)
    if config.engine == "deepspeed":
        _deepspeed_engine(device)
    monitor = MemoryMonitor(device)  # before the model: its baseline is the process without one
    vocab_size = model_vocab_size(config, data.vocab_size)
    policy = plan.policy or policy_of(config.memory, config.model.layer_kinds)
    offloaded, keys = placed.memory.offload_optimizer == "host", placed.parallel.kv_residence == "host"
    store = host_store(policy, device, plan.host_budget_bytes, config.memory.offload_dir, optimizer=offloaded, keys=keys)
    if store is not None:
        cleanup.callback(store.close)
    checkpoints = CheckpointManager(run_dir, config.checkpoint, config_hash=hashlib.sha256(dump(config).encode()).hexdigest())
    cleanup.callback(checkpoints.close)
    fill, found = _beginning(config, run_dir, checkpoints)
    arena = build_arena(config.memory, device)  # before the model: storages that are filled anew ask the allocator they were made with
    if arena is not None:
        cleanup.callback(arena.close)
    engine = build_engine(placed, vocab_size, mesh, device, policy, store, fill)
    state, notes = _starting_state(checkpoints, engine) if resume else (TrainState(), [])
    notes += found + compiled(placed, engine.model)
    metrics = MetricsWriter(run_dir, state.step, enabled=is_main)
    cleanup.callback(metrics.close)
    at_step(state.step)
    console = RunConsole(config.train.steps, state.step, enabled=is_main)
    cleanup.callback(console.close)
    for note in notes:
        console.note(note)
    ranks = RankWatch(config.guards, run_dir, monitor, checkpoints.ranks, console.note)
    cleanup.enter_context(ranks)
    if is_main:
        run_dir.write_state("running", step=state.step, total_steps=config.train.steps)

    def account(reason: str) -> None:
        """Of a rank that hangs."""
        if is_main:
            run_dir.write_state("failed", step=state.step, total_steps=config.train.steps, reason=reason)

    return Trainer(
        config=config,
        run_dir=run_dir,
        engine=engine,
        state=state,
        train_steps=lambda cursor: data.train(cursor or None),
        valid_batches=lambda: data.valid(config.train.eval_sequences),
        valid_bytes_per_label=data.valid_bytes_per_label,
        checkpoints=checkpoints,
        metrics=metrics,
        console=console,
        monitor=monitor,
        stop=stop,
        ranks=ranks,
        mender=Mender(config, run_dir, checkpoints, engine, state),
        watchdog=Watchdog(config.guards.hang_times_median, config.guards.hang_min_seconds, account),
        plan=plan,
        check=PlanCheck(plan, store, _resident(engine)),
        arena=arena,
        flops_per_token=model_flops_per_token(config.model, vocab_size, config.data.seq_len),
        peak_flops=peak_flops(config, device) * (dist.get_world_size() if mesh else 1),
    )


def _beginning(config: RunConfig, run_dir: RunDir, checkpoints: CheckpointManager) -> tuple[Fill | None, list[str]]:
    """What gives a run without checkpoints of its own its first weights, and notes that it fills in; None: chance, or a checkpoint."""
    init_from = config.train.init_from
    if init_from is None or checkpoints.ranks.first_does("list checkpoints", run_dir.checkpoint_steps):
        return None, []
    notes: list[str] = []

    def fill(model: Transformer, only: Collection[torch.nn.Parameter] | None = None) -> None:
        path = fill_from(init_from, model, checkpoints, only, checked=bool(notes))
        notes[:] = [f"begins with the weights of {path}"]

    return fill, notes


def _resident(engine: Engine) -> dict[str, int]:
    if not engine.by_parameter:
        return {}  # DeepSpeed's flat tensors: not counted one by one
    state = engine.state_dict()
    found = {"parameters": tensor_bytes(state["model"])} if engine.offloaded is None else {}
    # Offloaded states count with the store's host memory.
    return found if isinstance(engine.optimizer, OnHost) else found | {"optimizer": tensor_bytes(state["optim"])}


def _starting_state(checkpoints: CheckpointManager, engine: Engine) -> tuple[TrainState, list[str]]:
    """Load the newest good checkpoint into ``engine``; a run without any starts from the beginning. Also notes for people."""
    checkpoints.clean()
    good = checkpoints.latest_good(set_aside=True)
    if good is None:
        return TrainState(), ["no checkpoint yet: starting from the beginning"]
    notes = [f"checkpoint {refused} is damaged and set aside" for refused in good.refused]
    return load_state(checkpoints, good, engine), [*notes, f"resumed from {good.path.name}"]


def describe_loss(loss: float, bytes_per_label: float | None) -> str:
    """A loss in nats per token in every unit a person may know it in; ``bytes_per_label``: UTF-8 bytes per predicted token."""
    per_byte = f" = {loss / math.log(2) / bytes_per_label:.3f} bits per byte" if bytes_per_label else ""
    return f"loss {loss:.4f} nats per token{per_byte}, perplexity {math.exp(loss):.2f}"


def closing_lines(trainer: Trainer, by_hand: bool) -> list[str]:
    """What a person wants to know at the end of a run, and what to type next; a job that stopped goes on by itself."""
    path, planned = trainer.run_dir.path, trainer.plan.measurable_peak_bytes
    lines = []
    if trainer.last_train is not None and (by_position := trainer.last_train.position_lines()):
        lines += [f"training loss at step {trainer.state.step} by position in the sequence:", *by_position]
    if trainer.last_valid is not None:
        lines.append(f"held-out {describe_loss(trainer.last_valid.loss, trainer.valid_bytes_per_label)}")
    lines.append(f"peak memory per rank: planned {gib(planned)}, measured {gib(trainer.peak_bytes)} ({trainer.monitor.source})")
    if trainer.stop_reason:
        lines.append(f"{trainer.stop_reason} after step {trainer.state.step}; everything is saved")
        return lines + (["next:", f"  longstride resume {shlex.quote(str(path))}"] if by_hand else [])
    return [
        *lines,
        "next:",
        f"  tensorboard --logdir {shlex.quote(str(path / 'tensorboard'))}",
        f"  longstride resume {shlex.quote(str(path))} train.steps={2 * trainer.config.train.steps}",
        f"  longstride plan {shlex.quote(str(path / 'config.yaml'))} data.seq_len={4 * trainer.config.data.seq_len}",
    ]
