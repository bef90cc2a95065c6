"""What ``benchmarks/sequence_parallel.py`` compares: longstride's sequence-parallel attentions and other packages' own functions.

Every system takes and gives this rank's tokens as [B, n, heads, D]. Packages whose kernels need CUDA (ring-flash-attn, yunchang) run their
own published code, unchanged, over a stand-in for the flash-attn package that computes with the CPU kernel of torch that longstride uses,
so that what differs is the scheme.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.allgather_kv import allgather_kv_attention
from parallel.hybrid import hybrid_attention
from parallel.ring_attention import ring_attention
from parallel.sequence import Layout, ranges_for
from parallel.ulysses import ulysses_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class System:
    """``prepare(tokens)`` gives the global indices of this rank's tokens, in local order, and the attention; it raises what the package
    raises."""

    name: str
    package: str
    """As it is known to the package index; empty: longstride."""
    prepare: Callable[[int], tuple[Tensor, Attention]]
    note: str = ""


def _held(layout: Layout, tokens: int) -> Tensor:
    ranges = ranges_for(layout, tokens, dist.get_rank(), dist.get_world_size())
    return torch.cat([torch.arange(start, end) for start, end in ranges])


def _two_axes(degree: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(Ulysses group of neighbours, ring group)"""
    rank, size = dist.get_rank(), dist.get_world_size()
    neighbours = [dist.new_group(list(range(first, first + degree))) for first in range(0, size, degree)]
    rings = [dist.new_group(list(range(first, size, degree))) for first in range(degree)]
    return neighbours[rank // degree], rings[rank % degree]  # type: ignore[return-value]


# --- longstride


def _ring(tokens: int) -> tuple[Tensor, Attention]:
    return _held("zigzag", tokens), lambda q, k, v: ring_attention(q, k, v, group=None)


def _ulysses(tokens: int) -> tuple[Tensor, Attention]:
    return _held("contiguous", tokens), lambda q, k, v: ulysses_attention(q, k, v, group=None, layout="contiguous")


def _ulysses_in_stages(tokens: int) -> tuple[Tensor, Attention]:
    return _held("contiguous", tokens), lambda q, k, v: ulysses_attention(q, k, v, group=None, layout="contiguous", head_chunk=1)


def _allgather(tokens: int) -> tuple[Tensor, Attention]:
    return _held("zigzag", tokens), lambda q, k, v: allgather_kv_attention(q, k, v, group=None)


def _hybrid(tokens: int) -> tuple[Tensor, Attention]:
    if dist.get_world_size() < 4:
        raise RuntimeError("a ring of Ulysses groups needs 4 ranks")
    neighbours, ring = _two_axes(2)
    return _held("zigzag", tokens), lambda q, k, v: hybrid_attention(q, k, v, ring_group=ring, ulysses_group=neighbours)


# --- peers


def stand_in_for_flash_attn() -> None:
    """Put a module in the place of the flash-attn package (2.8's functions and arguments) that computes with torch's CPU kernel."""
    forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert (window_size_left, window_size_right) == (-1, -1) and not dropout_p
        out, lse = forward_op(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=softmax_scale)
        return out.transpose(1, 2), lse.contiguous(), None, None

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                             window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):  # fmt: skip
        assert (window_size_left, window_size_right) == (-1, -1) and not dropout_p
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        grads = backward_op(*tensors, softmax_lse.contiguous(), 0.0, causal, scale=softmax_scale)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad.transpose(1, 2))

    def unused(*args, **kwargs):
        raise NotImplementedError("not part of what is compared")

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    functions = {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}
    names = ("flash_attn_func", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "flash_attn_varlen_func")
    for module in (package, interface):
        module.__dict__.update(functions, **dict.fromkeys(names, unused))
    package.__dict__.update(__version__="2.8.3", flash_attn_interface=interface, __path__=[])
    package.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("flash_attn", None)
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})


def _ring_flash_attn(tokens: int) -> tuple[Tensor, Attention]:
    stand_in_for_flash_attn()
    # Its adapters for Hugging Face models, which attention does not need, ask for names that transformers 5 has no more.
    adapters = ModuleType("ring_flash_attn.adapters")
    adapters.__dict__.update(substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    sys.modules["ring_flash_attn.adapters"] = adapters
    from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func  # pyright: ignore[reportMissingImports]

    return _held("zigzag", tokens), lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=dist.group.WORLD)


def _yunchang(degree_of: Callable[[int], int], kernel: str) -> Callable[[int], tuple[Tensor, Attention]]:
    def prepare(tokens: int) -> tuple[Tensor, Attention]:
        if kernel == "fa":
            stand_in_for_flash_attn()
        from yunchang import LongContextAttention, set_seq_parallel_pg  # pyright: ignore[reportMissingImports]
        from yunchang.comm.extract_local import EXTRACT_FUNC_DICT  # pyright: ignore[reportMissingImports]
        from yunchang.kernels import AttnType  # pyright: ignore[reportMissingImports]

        rank, size = dist.get_rank(), dist.get_world_size()
        degree = degree_of(size)
        set_seq_parallel_pg(degree, size // degree, rank, size)
        attention = LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.from_string(kernel))
        order = torch.arange(tokens).view(1, tokens, 1, 1)
        held = EXTRACT_FUNC_DICT["zigzag"](order, rank, size, rd=size // degree, ud=degree).flatten()
        return held, lambda q, k, v: attention(q, k, v, causal=True)

    return prepare


def _ring_attention_pytorch(striped: bool) -> Callable[[int], tuple[Tensor, Attention]]:
    bucket = 512

    def prepare(tokens: int) -> tuple[Tensor, Attention]:
        from ring_attention_pytorch.ring_flash_attention import ring_flash_attn  # pyright: ignore[reportMissingImports]

        # As RingAttention.forward does it: 'b (i j) d -> b (j i) d' with i the size of a bucket, then equal stretches.
        order = torch.arange(tokens).view(bucket, -1).T.flatten() if striped else torch.arange(tokens)
        held = order.chunk(dist.get_world_size())[dist.get_rank()]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Here query head i reads key/value head i modulo their number, elsewhere i divided by the queries of one.
            groups = k.shape[2]
            out = ring_flash_attn(q.unflatten(2, (groups, -1)).transpose(2, 3).flatten(2, 3), k, v, None, True, bucket, True, striped)
            return out.unflatten(2, (-1, groups)).transpose(2, 3).flatten(2, 3)

        return held, attend

    return prepare


def _torch_context_parallel(tokens: int) -> tuple[Tensor, Attention]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        marker = torch.zeros(tokens)
        with context_parallel(mesh, buffers=[marker], buffer_seq_dims=[0]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return _held("zigzag", tokens), attend


SYSTEMS = (
    System("ring", "", _ring),
    System("allgather_kv", "", _allgather),
    System("ulysses", "", _ulysses),
    System("ulysses, head_chunk 1", "", _ulysses_in_stages),
    System("ring_x_ulysses", "", _hybrid, "Ulysses among 2"),
    System("zigzag_ring_flash_attn", "ring-flash-attn", _ring_flash_attn, "kernel: stand-in"),
    System("LongContextAttention, ring", "yunchang", _yunchang(lambda size: 1, "fa"), "zigzag; kernel: stand-in"),
    System("LongContextAttention, Ulysses 2", "yunchang", _yunchang(lambda size: 2, "fa"), "zigzag; kernel: stand-in"),
    System("LongContextAttention, torch_efficient", "yunchang", _yunchang(lambda size: 1, "torch_efficient"), "the package's own CPU path"),
    System("ring_flash_attn", "ring-attention-pytorch", _ring_attention_pytorch(False), "contiguous"),
    System("ring_flash_attn, striped", "ring-attention-pytorch", _ring_attention_pytorch(True)),
    System("context_parallel", "torch", _torch_context_parallel),
)
