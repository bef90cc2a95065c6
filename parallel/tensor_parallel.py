"""Tensor parallelism: every rank of a group has some heads of each attention, some columns of each feed-forward, some rows of embedding
and head, and of the residual stream and its norms some tokens (``parallel.tp``).

    stream, t of T tokens -> norm -> all-gather -> products by columns -> attention of this rank's heads, or silu(gate) up
                                                -> product by rows -> reduce-scatter -> + stream

What a rank holds are plain parameters of smaller matrices, which FSDP2 shards like any others with the ranks that hold the same part
(docs/decisions/0025). Every other parameter is the same on all ranks of the group; its gradient is what this rank's tokens or heads make
of it, and ``sum_copies`` adds them up once per step. Memory layers are such others: their sequence is split over cp x tp ranks, as the
stream is, and states cross as they do between sequence-parallel ranks. Attention sees all tokens of a sequence-parallel rank, so schemes
over ``cp``, positions and masks are what they are without it. Optimizers of whole matrices: ``optim/redealt.py``.

Legend: B row, T token of the group, t of this rank, C channel, P ranks.
Try alone: ``pytest tests/parallel/test_tensor_parallel.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.attention import Attention
from models.batch import Bounds
from models.errors import UserError
from models.feedforward import SwiGLU
from models.linear import Linear
from models.parts import Part
from models.transformer import Block, Transformer
from models.value_table import TableReader
from parallel.mesh import Mesh, TensorMeshes
from parallel.sequence import part_of
from parallel.vocabulary import SharedEmbedding, share_vocabulary


def gather_tokens(x_BtC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x_BTC: the tokens of every rank, in the order of the ranks. Not differentiable."""
    ranks, (rows, tokens, *rest) = dist.get_world_size(group), x_BtC.shape
    all_PBtC = x_BtC.new_empty(ranks * rows, tokens, *rest)
    dist.all_gather_into_tensor(all_PBtC, x_BtC.contiguous(), group=group)
    return all_PBtC.view(ranks, rows, tokens, *rest).transpose(0, 1).reshape(rows, ranks * tokens, *rest)


def scatter_sum(y_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """y_BtC: this rank's tokens of the sum over ranks, in y's dtype. Not differentiable."""
    ranks, (rows, tokens, *rest) = dist.get_world_size(group), y_BTC.shape
    sent_PBtC = y_BTC.reshape(rows, ranks, tokens // ranks, *rest).transpose(0, 1).contiguous()
    own_BtC = y_BTC.new_empty(rows, tokens // ranks, *rest)
    dist.reduce_scatter_tensor(own_BtC, sent_PBtC.flatten(0, 1), group=group)
    return own_BtC


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_tokens(x_BtC, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(grads[0], ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_sum(y_BTC, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grads[0], ctx.group), None


class SplitTokens:
    """The seam ``models/tokens.py`` over the ranks of ``group``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    def gathered(self, x_BtC: Tensor) -> Tensor:
        """See `Tokens.gathered`."""
        return _Gathered.apply(x_BtC, self.group)  # type: ignore[return-value]

    def summed(self, y_BTC: Tensor) -> Tensor:
        """See `Tokens.summed`. The sum is in y's dtype: bfloat16 under autocast, as what is summed."""
        return _Summed.apply(y_BTC, self.group)  # type: ignore[return-value]


def share_products(model: Transformer, mesh: Mesh) -> None:
    """Leave this rank its part of every product of ``model``, whose values are undefined then, and fill the seams through which it reaches
    the other tokens of its group. Before FSDP2 is applied; on the meta device nothing is allocated."""
    if mesh.tensor is None:
        return
    leave_parts(model, mesh.tp_rank, mesh.dims.tp, mesh.tensor)
    tokens = SplitTokens(mesh.tp_group)
    for block in model.blocks:
        for module in (block.mixer, block.ffn):
            if isinstance(module, (Attention, SwiGLU)):
                module.tokens = tokens
            elif isinstance(module, TableReader):
                module.held = partial(_part_of_stream, rank=mesh.tp_rank, ranks=mesh.dims.tp)
    share_vocabulary(model, tokens, mesh.tp_group)


def _part_of_stream(bounds: Bounds, rank: int, ranks: int) -> Bounds:
    return bounds.with_ranges(part_of(bounds.ranges, rank, ranks))


def leave_parts(model: Transformer, rank: int, ranks: int, meshes: TensorMeshes | None = None) -> None:
    """Replace every matrix that ``ranks`` ranks share by the part of ``rank``, and note it in ``model.parts``; ``meshes``: see `Part`.

    Raises UserError for what they cannot share."""
    saved, copies = (meshes.saved, meshes.model) if meshes is not None else (None, None)
    rows, columns = Part(0, rank, ranks, saved, copies), Part(1, rank, ranks, saved, copies)
    for number, module in enumerate(model.blocks):
        block = cast(Block, module)
        shared: dict[str, tuple[Linear, Part]] = {}
        if isinstance(ffn := block.ffn, SwiGLU):
            shared |= {"ffn.w_gate": (ffn.w_gate, rows), "ffn.w_up": (ffn.w_up, rows), "ffn.w_down": (ffn.w_down, columns)}
        elif not isinstance(ffn, TableReader):  # reads for the tokens of its rank; its table is shared (`columns.share_tables`)
            raise UserError(f"parallel.tp {ranks}: layers of {type(ffn).__name__} cannot be shared; set parallel.tp=1")
        if isinstance(mixer := block.mixer, Attention):
            shared |= {f"mixer.{key}": (getattr(mixer, key), rows) for key in ("wq", "wk", "wv")} | {"mixer.wo": (mixer.wo, columns)}
        for name, (linear, part) in shared.items():
            keep_part(model, linear, f"blocks.{number}.{name}", "weight", part)
            if linear.bias is not None:
                assert part is rows, "a bias is added once, not by every rank"
                keep_part(model, linear, f"blocks.{number}.{name}", "bias", part)
            linear.out_features, linear.in_features = linear.weight.shape
    if model.vocab_size % ranks:
        raise UserError(
            f"parallel.tp {ranks} does not divide model.vocab_size {model.vocab_size} (null: the tokenizer's, rounded up to 64); "
            f"set model.vocab_size={-(-model.vocab_size // ranks) * ranks}"
        )
    model.embed = SharedEmbedding(model.embed, rows)
    model.parts["embed.weight"] = rows
    if model.head is not None:
        keep_part(model, model.head, "head", "weight", rows)


def keep_part(model: Transformer, module: nn.Module, name: str, key: str, part: Part) -> None:
    """Replace the parameter ``key`` of ``module`` by one of the shape of a part, and note it as ``name.key``."""
    parameter: Tensor = getattr(module, key)
    size = parameter.shape[part.dim]
    if size % part.ranks:
        raise UserError(f"parallel.tp {part.ranks} does not divide the {size} of dim {part.dim} of {name}.{key}; change one of them")
    setattr(module, key, nn.Parameter(torch.empty_like(part.of(parameter), memory_format=torch.contiguous_format)))
    model.parts[f"{name}.{key}"] = part


def sent_bytes(tokens: int, width: int, ranks: int, itemsize: int, kept: bool = True) -> tuple[int, int]:
    """Bytes that one rank sends for a dense block of attention and feed-forward, (forward, backward). ``tokens``: of the group, all rows
    together; ``itemsize``: of what products read.

    Every message is a gather or a reduction of ``tokens`` of ``width``, of which a rank sends all but its share. Forward has two of each;
    so has backward where autograd ``kept`` what was gathered. Where a memory policy keeps nothing but a block's input, backward gathers
    what the three projections, the feed-forward and their gradients read (again), and sums attention's output for the stream again."""
    message = tokens * width * itemsize * (ranks - 1) // ranks
    return 4 * message, (4 if kept else 9) * message


def sum_copies(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add up, in place, the gradients of parameters that every rank of ``group`` has a copy of; in float32 (float64), in one message."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = torch.cat([gradient.reshape(-1).to(wide) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def as_saved(value: Tensor, part: Part) -> Tensor:
    """A part of a parameter, or of a state that lies like it, as this rank's shard of the whole: what a checkpoint knows, whatever ``tp``
    it was saved with. It shares its memory. Numbers without dims are the same on all ranks and stay as they are."""
    if not value.ndim or part.mesh is None:
        return value
    if value.ndim <= part.dim:
        raise ValueError(
            f"a state of shape {tuple(value.shape)} has no dim {part.dim}, along which tensor-parallel ranks share its parameter"
        )
    local = value.to_local() if isinstance(value, DTensor) else value
    shape = torch.Size(part.whole_shape(value.shape))
    stride = torch.empty(shape, device="meta").stride()
    placements = (Replicate(), Shard(part.dim), Shard(0))
    return DTensor.from_local(local.detach(), part.mesh, placements, run_check=False, shape=shape, stride=stride)
