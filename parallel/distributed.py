"""Who am I among which ranks: the environment a launcher left, the process group, the device, the threads.

The only place that reads environment variables for parallelism. It starts no process (``parallel/launcher.py`` does) and knows
no mesh (``parallel/mesh.py`` does). Importing it imports no torch.

Try alone: ``python -c "from parallel.distributed import environment; print(environment())"``.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from models.errors import UserError

if TYPE_CHECKING:
    import torch

Launcher = Literal["nobody", "longstride", "torchrun", "accelerate", "srun", "mpirun", "environment"]
T = TypeVar("T")

PREPARE_TIMEOUT = datetime.timedelta(hours=24)
"""How long ranks wait while one of them prepares files; reading a large corpus takes longer than any collective."""

# rank, local rank, world size, local world size, in the names of torch.distributed, Open MPI, MPICH (Hydra) and Slurm
_NAMES: dict[Launcher, tuple[str, str, str, str]] = {
    "environment": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
}
_REFUSED_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "longstride shards parameters itself: start without --use_fsdp and set parallel.dp_shard",
    "ACCELERATE_USE_DEEPSPEED": "longstride calls DeepSpeed itself: start without --use_deepspeed and set engine=deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "start without --use_megatron_lm and set the degrees under parallel",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "start without accelerate's parallelism options and set the degrees under parallel",
}


@dataclass(frozen=True)
class Accelerate:
    """What ``accelerate launch`` asked for. ``several``: it was told to start more than one process but connected none."""

    mixed_precision: str
    use_cpu: bool
    several: bool
    grad_accum: int | None


@dataclass(frozen=True)
class Env:
    """One rank's place. ``rank`` is the global rank; without a launcher it is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched_by: Launcher = "nobody"
    accelerate: Accelerate | None = None

    @property
    def is_rank(self) -> bool:
        """True when something already started the ranks: this process must not start others."""
        return self.launched_by != "nobody"


def environment(variables: Mapping[str, str] | None = None) -> Env:
    """This process's place among the ranks, from ``variables`` (default: the process environment).

    Raises UserError for a launch whose ranks would not be connected, or whose variables contradict each other.
    """
    variables = os.environ if variables is None else variables
    accelerate = _accelerate(variables)
    for launcher, names in _NAMES.items():
        if names[0] not in variables or (launcher == "srun" and not _several_tasks(variables)):
            continue
        numbers = [_number(variables, name) for name in names[:3]]
        rank, local_rank, world_size = numbers
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world_size > 1 and name not in variables:
                raise UserError(
                    f"environment: {names[0]}={rank} says that {world_size} ranks were started, but {name} is not set; "
                    "set MASTER_ADDR and MASTER_PORT to one free address for all ranks, or start with torchrun"
                )
        local_world = _number(variables, names[3], default=world_size) if launcher != "srun" else _tasks_here(variables[names[3]])
        if not (0 <= rank < world_size and 0 <= local_rank < local_world <= world_size):
            raise UserError(
                f"environment: {names[0]}={rank}, {names[1]}={local_rank}, {names[2]}={world_size}, {names[3]}={local_world} "
                "contradict each other; unset them or start with torchrun"
            )
        return Env(rank, local_rank, world_size, local_world, _launcher_of(launcher, variables), accelerate)
    return Env(accelerate=accelerate)


def rank_variables(rank: int, nproc: int, master_port: int, threads: int, huge_pages: bool = False) -> dict[str, str]:
    """Variables that make a process rank ``rank`` of ``nproc`` on this machine; the store listens on ``master_port``.

    The launcher itself holds the store (TORCHELASTIC_USE_AGENT_STORE), so no other process can take the port first.
    ``huge_pages``: torch asks the kernel for 2 MiB pages for large CPU tensors, which halves the cost of making them anew.
    """
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "longstride",
        "OMP_NUM_THREADS": str(threads),
    }
    if huge_pages:
        variables["THP_MEM_ALLOC_ENABLE"] = "1"
    if "GLOO_SOCKET_IFNAME" not in os.environ and os.path.exists("/sys/class/net/lo"):  # noqa: PTH110 (a device, not a file of ours)
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve would make gloo wait for minutes
    return variables


def threads_for(threads_per_rank: int, local_world_size: int) -> int:
    """CPU threads of each rank: ``threads_per_rank``, or for 0 an even share of the cores this process may use (at least 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads_per_rank or max(1, cores // local_world_size)


def use_threads(threads_per_rank: int, env: Env) -> None:
    """Let this rank's torch operations use ``threads_for`` threads, whatever OMP_NUM_THREADS a launcher has set."""
    import torch

    torch.set_num_threads(threads_for(threads_per_rank, env.local_world_size))


def check_launch(env: Env, precision: str, device: str, grad_accum: int, ranks: int) -> None:
    """Refuse what ``accelerate launch`` was told and the configuration contradicts; ``ranks`` is the product of the degrees.

    Raises UserError naming the option and the setting. An explicit ``--mixed_precision no`` cannot be told from none given.
    """
    asked = env.accelerate
    if asked is None:
        return
    if asked.mixed_precision != "no" and asked.mixed_precision != precision:
        way_out = "set train.precision=bf16" if asked.mixed_precision == "bf16" else "start with --mixed_precision no or bf16"
        raise UserError(
            f"accelerate launch asks for mixed precision {asked.mixed_precision} (ACCELERATE_MIXED_PRECISION), "
            f"but train.precision is {precision}; {way_out}"
        )
    if asked.use_cpu and device == "cuda":
        raise UserError("accelerate launch was given --cpu, but train.device is cuda; drop --cpu or set train.device=cpu")
    if asked.grad_accum is not None and asked.grad_accum != grad_accum:
        raise UserError(
            f"accelerate launch asks for {asked.grad_accum} gradient accumulation steps, but train.grad_accum is {grad_accum}; "
            f"set train.grad_accum={asked.grad_accum} or drop the option"
        )
    if asked.several and not env.is_rank and ranks == 1:
        raise UserError(
            "accelerate launch was told to start several processes but started one that is connected to no other (it does so without "
            "GPUs); the configuration asks for 1 rank: set parallel.cp or parallel.dp_shard to the number you want"
        )


def name_device(device: torch.device) -> None:
    """Tell DeepSpeed, which reads it out of this process's environment when it is imported, this rank's device. The local rank that a
    launcher gave is another number where every rank sees one device."""
    index = device.index or 0
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # refused when it differs
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def select_device(setting: Literal["auto", "cpu", "cuda"], env: Env) -> torch.device:
    """This rank's device, made current. Raises UserError when there is no CUDA device for it."""
    import torch

    if setting == "cpu" or (env.accelerate is not None and env.accelerate.use_cpu):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if setting == "cuda":
            raise UserError("train.device is cuda, but torch sees no CUDA device here; set train.device=auto or cpu")
        return torch.device("cpu")
    if env.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {env.local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()}; start at most that many ranks "
            "on this machine or set train.device=cpu"
        )
    torch.cuda.set_device(env.local_rank)
    return torch.device("cuda", env.local_rank)


def init_distributed(env: Env, device: torch.device, timeout_seconds: float) -> None:
    """Join the default process group: gloo for CPU tensors, NCCL for CUDA. One rank alone needs no group and makes none; who has
    joined stays.

    Raises UserError when the ranks that answer are not those that were started (unconnected processes would each train alone).
    """
    import torch
    import torch.distributed as dist

    if env.world_size == 1 or dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=env.rank, world_size=env.world_size, timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", rank=env.rank, world_size=env.world_size, timeout=timeout)
    answering = torch.ones(1, device=device)
    dist.all_reduce(answering)
    if int(answering) != env.world_size or dist.get_world_size() != env.world_size:
        raise UserError(f"environment: WORLD_SIZE is {env.world_size}, but {int(answering)} ranks answered; start them with one launcher")


def end_distributed() -> None:
    """Leave the default process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        from parallel.outbox import forget

        forget()
        dist.destroy_process_group()


def on_one_rank(env: Env, make: Callable[[], T], per_machine: bool = False) -> T:
    """``make()`` on rank 0 (``per_machine``: on local rank 0 of every machine) while the others wait; every rank gets rank 0's value.

    A UserError on any rank is raised on all, so that all end alike. The value must be picklable.
    """
    import torch.distributed as dist

    if env.world_size == 1:
        return make()
    group = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    answer: tuple[T | None, UserError | None] = (None, None)
    if env.rank == 0 or (per_machine and env.local_rank == 0):
        try:
            answer = (make(), None)
        except UserError as error:
            answer = (None, error)
    answers: list = [None] * env.world_size
    dist.all_gather_object(answers, answer, group=group)
    dist.destroy_process_group(group)
    for _, error in answers:
        if error is not None:
            raise error
    return answers[0][0]


def _accelerate(variables: Mapping[str, str]) -> Accelerate | None:
    if "ACCELERATE_MIXED_PRECISION" not in variables and "ACCELERATE_USE_CPU" not in variables:
        return None
    for name, remedy in _REFUSED_ACCELERATE.items():
        if _is_true(variables.get(name, "")):
            raise UserError(f"accelerate launch set {name}; {remedy}")
    dynamo = variables.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if dynamo.upper() != "NO":
        raise UserError(f"accelerate launch set ACCELERATE_DYNAMO_BACKEND={dynamo}; longstride does not compile: use --dynamo_backend no")
    accumulate = variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    return Accelerate(
        mixed_precision=variables.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        use_cpu=_is_true(variables.get("ACCELERATE_USE_CPU", "")),
        several="MASTER_PORT" in variables and not any(names[0] in variables for names in _NAMES.values()),
        grad_accum=int(accumulate) if accumulate and accumulate.isdigit() else None,
    )


def _launcher_of(found: Launcher, variables: Mapping[str, str]) -> Launcher:
    if variables.get("TORCHELASTIC_RUN_ID") == "longstride":
        return "longstride"
    if "ACCELERATE_MIXED_PRECISION" in variables:
        return "accelerate"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in variables else found


def _is_true(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "on", "y", "t")


def _several_tasks(variables: Mapping[str, str]) -> bool:
    """srun started this process as one of several tasks; a batch script or an interactive shell has no step of its own."""
    return variables.get("SLURM_STEP_ID", "").isdigit() and variables.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1")


def _tasks_here(tasks_per_node: str) -> int:
    """The largest count in Slurm's list such as ``4(x2),3``; only its size matters to share cores."""
    return max((int(part.split("(")[0]) for part in tasks_per_node.split(",") if part.split("(")[0].isdigit()), default=1)


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None:
        if default is not None:
            return default
        raise UserError(f"environment: {name} is not set although other variables say this is one of several ranks; start with torchrun")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name}='{text}' is not a number; unset it or start with torchrun") from None
