"""Turn a plain single-device Transformer into this rank's part of a parallel one. The order matters and is all here."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from models.attention import Attention
from models.errors import UserError
from models.memory.protocol import MemoryModule
from models.transformer import Transformer
from parallel.columns import share_tables
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes
from parallel.config import MemoryExchange, SequenceScheme
from parallel.fsdp import shard_parameters
from parallel.host_keys import DEFAULT_CHUNK, HostKeysAttention, KeyStore
from parallel.memory_exchange import check_exchange
from parallel.mesh import Mesh
from parallel.ring_attention import RingAttention
from parallel.schemes import attention_over
from parallel.sequence import Layout
from parallel.state_passing import RingCarry
from parallel.tensor_parallel import share_products


def split_sequence(
    model: Transformer,
    mesh: Mesh,
    layout: Layout,
    scheme: SequenceScheme = "ring",
    head_chunk: int | None = None,
    comm: CommDtypes = AS_COMPUTED,
    memory: MemoryExchange = "states",
) -> None:
    """Fill the seams through which a layer reaches tokens of other ranks: attention by ``scheme``, memories by ``memory``. ``comm``: dtypes
    in which keys, values and their gradients travel.

    A memory layer, and attention inside of it, has of a tensor-parallel group's tokens those that its rank has in the residual stream:
    its sequence is split over cp x tp ranks."""
    if mesh.dims.cp * mesh.dims.tp == 1:
        return
    if model.stack is not None:
        check_layout(model.stack, layout, mesh.dims.cp)
    for block in model.blocks:
        if not isinstance(block.mixer, (Attention, MemoryModule)):
            raise TypeError(f"no way to split a sequence over ranks is known for {type(block.mixer).__name__}")
        for mixer in block.mixer.modules():  # attention and memory may be parts of one mixer
            if isinstance(mixer, Attention) and mixer is not block.mixer and mesh.dims.tp > 1:
                mixer.inner_attention = RingAttention(mesh.tokens_group, layout, mixer.window, comm=comm)
            elif isinstance(mixer, Attention):
                if mesh.dims.cp > 1:
                    mixer.inner_attention = attention_over(mesh, layout, mixer.window, scheme, head_chunk, comm)
            elif isinstance(mixer, MemoryModule):
                check_layout(mixer, layout, mesh.dims.cp, mesh.dims.tp)
                check_exchange(mixer, memory, mesh.dims.cp * mesh.dims.tp)
                mixer.carry = RingCarry(mesh.tokens_group, layout, mesh.dims.tp, ring=memory == "ring", by_heads=memory == "ulysses")


def keep_keys_in_host(model: Transformer, mesh: Mesh | None, layout: Layout, store: KeyStore, chunk: int | None, comm: CommDtypes) -> None:
    """Keys and values of full attention wait in ``store`` (``parallel.kv_residence: host``): after ``split_sequence``, or with no mesh.
    Windows read few keys at a time and keep theirs. ``chunk``: ``parallel.kv_chunk``."""
    group = mesh.cp_group if mesh is not None and mesh.dims.cp > 1 else None
    for number, block in enumerate(model.blocks):
        mixer = block.mixer
        if isinstance(mixer, Attention) and mixer.window is None:
            mixer.inner_attention = HostKeysAttention(group, layout, None, store, chunk or DEFAULT_CHUNK, number, comm=comm)


def check_layout(memory: MemoryModule, layout: str, cp: int, tp: int = 1) -> None:
    """Raise UserError where a memory cannot be split as asked: it would be another model on every rank."""
    if layout not in memory.traits.layouts:
        served = " or ".join(sorted(memory.traits.layouts))
        remedy = f"set parallel.layout={served}" if served else "set parallel.cp=1 parallel.tp=1 and use more data-parallel ranks"
        shared = f", parallel.tp {tp}" if tp > 1 else ""
        raise UserError(
            f"parallel.layout {layout}, parallel.cp {cp}{shared}: the state of {type(memory).__name__} cannot cross ranks exactly in it; "
            f"{remedy}"
        )


def most(mesh: Mesh, n: int) -> int:
    """The largest ``n`` of all ranks; every rank must ask."""
    largest = torch.tensor(n, device=mesh.fsdp.device_type)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return max(n, int(largest))  # a trace knows no values


def parallelize(
    model: Transformer,
    mesh: Mesh,
    layout: Layout,
    scheme: SequenceScheme = "ring",
    head_chunk: int | None = None,
    gather_dtype: torch.dtype | None = None,
    comm: CommDtypes = AS_COMPUTED,
    memory: MemoryExchange = "states",
) -> None:
    """Sequence seams first, then tables by columns, then products and tokens within tensor-parallel groups, then FSDP2 around blocks that
    already hold their recompute and tiling wrappers.

    ``gather_dtype``: what products read under autocast; None without it. ``comm``: see ``split_sequence``."""
    split_sequence(model, mesh, layout, scheme, head_chunk, comm, memory)
    if model.stack is not None:
        model.stack.agree = partial(most, mesh)
    share_tables(model, mesh)
    share_products(model, mesh)
    shard_parameters(model, mesh, gather_dtype)
