"""The second engine: DeepSpeed's ZeRO behind the verbs of `Engine`. The only importer of deepspeed, which is called directly.

DeepSpeed shares parameters, gradients and optimizer states among all ranks as runs of elements, so its checkpoints are written and read
as those of the native engine are (``tensor_pieces.py``): either engine goes on from what the other saved. Clipping, learning rates and
guards stay with this package; DeepSpeed reduces gradients, updates, and moves what is offloaded. See docs/engines.md.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.batch import Batch
from models.transformer import Block, Transformer
from optim.build import parameter_groups
from optim.clip import square_sum
from optim.routing import Routed, route
from parallel.mesh import Mesh
from trainer.config import RunConfig
from trainer.engine import Engine, LossSums, _RunningSums, forward
from trainer.tensor_pieces import PiecewiseTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")
_REFUSED = -1.0
"""A norm with which DeepSpeed drops gradients instead of updating: its own sign for one that is not finite."""


class Fragment(NamedTuple):
    """Which elements of a parameter this rank updates: ``count`` from ``start`` on, at ``offset`` of flat tensor ``flat``."""

    flat: int
    offset: int
    start: int
    count: int


@dataclass(frozen=True)
class Partitions:
    """What this rank holds under ZeRO-1 and 2: one flat float32 tensor of weights per parameter group, cut out of all parameters of the
    group in a row."""

    zero: Any
    """DeepSpeed's optimizer around torch's."""

    @property
    def flats(self) -> list[Tensor]:
        """The weights that are updated, what optimizer states belong to."""
        return self.zero.single_partition_of_fp32_groups

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        """Of ``parameter``; an empty one where other ranks hold all of it."""
        mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None:
            return Fragment(0, 0, 0, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(mapping.param_group_index, here.start, there.start, here.numel)

    def gradients(self) -> Iterator[Tensor]:
        """The reduced ones, after the backward pass; where they hold more than fragments that is 0."""
        if self.zero.cpu_offload:
            return (flat.grad for flat in self.flats if flat.grad is not None)
        return (gradient for group in self.zero.averaged_gradients.values() for gradient in group)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.shape

    def ask_norm(self, norm: Callable[[], Tensor]) -> None:
        """Have ``norm`` say how large gradients are when an update begins, and whether there is to be one."""
        self.zero.scaled_global_norm = norm

    def before_writing(self) -> None:
        """Nobody keeps copies of what is going to be written into ``flats``."""

    def publish(self) -> None:
        """Let the model compute with what is in ``flats`` (collective)."""
        self.zero.update_lp_params()


class PartitionsOfParameters(Partitions):
    """What this rank holds under ZeRO-3: of every parameter an equal share, the last ones padded."""

    @property
    def flats(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def fragment(self, parameter: nn.Parameter) -> Fragment:
        flat, offset, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = count * dist.get_rank()
        total = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
        return Fragment(flat, offset, min(start, total), max(0, min(count, total - start)))

    def gradients(self) -> Iterator[Tensor]:
        if self.zero.offload_optimizer:
            return (flat.grad for flat in self.flats if flat.grad is not None)
        return (gradient for group in self.zero.averaged_gradients.values() for gradient in group)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape  # pyright: ignore[reportAttributeAccessIssue]

    def ask_norm(self, norm: Callable[[], Tensor]) -> None:
        self.zero._get_norm_groups = lambda: [norm()]

    def before_writing(self) -> None:
        self.zero._partition_all_parameters()

    def publish(self) -> None:
        for flat in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(flat)


def build_deepspeed_engine(
    config: RunConfig, model: Transformer, fill: Callable[..., object], mesh: Mesh, device: torch.device
) -> DeepSpeedEngine:
    """The engine of ``config`` around ``model``, whose parameters have no memory yet. All ranks together; the process's environment names
    ``device`` (``parallel.distributed.name_device``). ``fill`` gives parameters their values (``trainer.build``)."""
    _start()
    routed = route(model)  # while parameters have their shapes, which ZeRO-3 takes
    settings = zero_settings(config, model, pinned=device.type == "cuda")
    if config.deepspeed.stage == 3:
        _materialise_shares(model, fill, device, settings)
        _gather_by_block(model)
    else:
        model.to_empty(device=device)
        fill(model)
    optimizer = _optimizer(model, routed, config)
    wrapped = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    kind = PartitionsOfParameters if config.deepspeed.stage == 3 else Partitions
    return DeepSpeedEngine(config, wrapped, optimizer, kind(wrapped.optimizer), mesh, device)


def _start() -> None:
    """Have DeepSpeed use the process group that is there, and be quiet about what is no concern of a user's."""
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A reduction in shared memory for inference: compiling it takes a minute, and nothing here calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _optimizer(model: Transformer, routed: list[Routed], config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with the groups of the native engine, by torch's kernel for the device that states are on; DeepSpeed's own for CPUs would have
    to be compiled first (docs/decisions/0023)."""
    settings = config.optim
    now = dict(model.named_parameters())
    groups = parameter_groups(model, [replace(one, parameter=now[one.name]) for one in routed], settings)
    # Without temporaries of the size of a flat tensor. ZeRO's pieces of a parameter depend on the number of ranks, and this kernel rounds
    # the elements at a tensor's end otherwise than the rest: another number of ranks is equal to rounding, not to the bit.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _units(model: Transformer) -> list[nn.Module]:
    """What is gathered together; all of the model in all."""
    return [model.embed, *model.blocks, model.norm, *([] if model.head is None else [model.head])]


def _materialise_shares(model: Transformer, fill: Callable[..., object], device: torch.device, settings: dict[str, Any]) -> None:
    """Give ``model`` its values one unit after the other, of which this rank keeps its share: it never holds the whole."""
    for unit in _units(model):
        unit.to_empty(device=device)
        fill(model, only=set(unit.parameters()))
        deepspeed.zero.Init(module=unit, config_dict_or_path=settings, dtype=torch.float32)


def _gather_by_block(model: Transformer) -> None:
    """ZeRO-3 gathers a block's parameters together, outside of what ``memory.recompute`` runs again; and with the model itself what it
    reads of other modules."""
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    deepspeed.zero.register_external_parameter(model, model.norm.weight)
    if model.head is None:
        deepspeed.zero.register_external_parameter(model, model.embed.weight)


def zero_settings(config: RunConfig, model: Transformer, pinned: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for ``model``. ``pinned``: host memory is page-locked."""
    asked = config.deepspeed
    sizes = [sum(parameter.numel() for parameter in unit.parameters()) for unit in _units(model)]
    bucket = asked.bucket_of(sum(sizes))
    zero: dict[str, Any] = {
        "stage": asked.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "overlap_comm": False,
    }
    if asked.stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": max(sizes),  # one block ahead
            "stage3_max_live_parameters": 2 * max(sizes),
            "stage3_max_reuse_distance": 0,
        }
    if asked.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if asked.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the engine says itself which pass is a step's last
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }


class DeepSpeedEngine(Engine):
    """See the module; made by ``build_deepspeed_engine``."""

    by_parameter = False

    def __init__(
        self,
        config: RunConfig,
        wrapped: deepspeed.DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        partitions: Partitions,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        model = cast(Transformer, wrapped.module)
        super().__init__(model, optimizer, mesh, device, config.train.precision, config.layout, config.optim.clip_norm)
        self.wrapped = wrapped
        self.partitions = partitions
        self._norm = torch.zeros(())
        self._step = torch.zeros(())
        partitions.ask_norm(lambda: self._norm)
        for flat in partitions.flats:
            # Now instead of in the first step: a checkpoint can be loaded into them, and a run that does not fit fails before it.
            moments = {name: torch.zeros_like(flat, requires_grad=False) for name in _MOMENTS}
            optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}

    def forward_backward(self, micro_batches: list[Batch], lr: float | None = None) -> LossSums:
        """As `Engine`'s; ``lr`` is not read."""
        shards = [self._shard(batch) for batch in micro_batches]
        # DeepSpeed divides the sum of gradients over ranks by their number, and this package's gradients are sums (docs/decisions/0002).
        scale = dist.get_world_size()
        valid_tokens = self._count_valid(shards)
        sums = _RunningSums(micro_batches[0].bounds.seq_len, self.device)
        for number, shard in enumerate(shards, start=1):
            self.wrapped.set_gradient_accumulation_boundary(number == len(shards))
            nll_BT = forward(cast(Transformer, self.wrapped), shard, self.device, self.precision)
            self.wrapped.backward(nll_BT.sum() / max(valid_tokens, 1) * scale, scale_wrt_gas=False)
            sums.add(nll_BT, shard)
        return sums.total(distributed=True)

    @torch.no_grad()
    def step(self, lr: float, accept: Callable[[float], bool] = math.isfinite) -> float:
        """As `Engine`'s."""
        gradients = [gradient for gradient in self.partitions.gradients() if gradient.numel()]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in gradients:
            total += square_sum(gradient).to(self.device)
        dist.all_reduce(total)
        norm = total.sqrt()
        if self.clip_norm is not None:
            scale = torch.clamp(self.clip_norm / (norm + 1e-12), max=1.0).float()
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
        self._norm = (norm if accept(float(norm)) else torch.full_like(norm, _REFUSED)).float()
        self._set_rates(lr)
        self.wrapped.step()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """As `Engine`'s, with the same names; `loaded` must follow what is written into it."""
        self.partitions.before_writing()
        model: dict[str, Tensor] = {}
        optim: dict[str, Tensor] = {}
        states = [self.optimizer.state[flat] for flat in self.partitions.flats]
        self._step = states[0]["step"].detach().to("cpu", copy=True)
        for name, parameter in self.parameters.items():
            fragment, shape = self.partitions.fragment(parameter), self.partitions.shape(parameter)

            def piece(flat: Tensor, fragment: Fragment = fragment, shape: torch.Size = shape) -> PiecewiseTensor:
                return PiecewiseTensor(shape, fragment.start, flat.detach()[fragment.offset :][: fragment.count])

            model[name] = piece(self.partitions.flats[fragment.flat])
            optim |= {f"{name}.{key}": piece(states[fragment.flat][key]) for key in _MOMENTS}
            optim[f"{name}.step"] = self._step
        return {"model": model, "optim": optim}

    @torch.no_grad()
    def loaded(self) -> None:
        """Compute and count steps from what was written into ``state_dict``'s tensors."""
        for flat in self.partitions.flats:
            self.optimizer.state[flat]["step"].copy_(self._step)
        self.partitions.publish()
