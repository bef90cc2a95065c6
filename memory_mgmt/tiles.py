"""The token-wise parts of a block on a range of tokens: forward, and backward written out.

``enter``: norm and, for attention, projections and rotation. ``leave``: output projection, residual, norm, feed-forward, residual.
Neither saves anything: the caller decides what to keep, and gives it back. The backward of ``enter`` needs the block's input only
(the norm again, no product again but those of queries and keys that are normalised); that of ``leave`` the stream after the mixer, gate
and up. Every step is the one that autograd would take on the modules, so that on a single range results are the same bits; sums over
ranges are float32 (float64).

Where tensor-parallel ranks share the block's products (``models/tokens.py``), a range is one of this rank's tokens in the residual stream,
and the same range of every other rank's: what attention is given counts tokens along two dims, ranks and tokens of one.

Legend: B row, t tokens of the range, C channel, H heads (query or key/value), D head size, F feed-forward width, O and I of a weight;
P ranks, S = P * t their tokens of the range (t alone where one rank has all products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import Attention
from models.feedforward import RMSNorm, SwiGLU, gated_product, gated_product_backward, rms_norm, rms_norm_backward
from models.int8_weight import in_dtype
from models.linear import add_bias_, bias_gradient, gradient_dtype
from models.memory.protocol import MemoryModule
from models.repeat import again
from models.rope import turn
from models.tokens import ALL_TOKENS, Tokens
from models.transformer import Block
from models.value_table import TableReader

RopeTable = tuple[Tensor, Tensor]
"""(cos, sin), each [B, 1, T, D / 2]"""


class GradientSums:
    """Sums over token ranges of the gradients of some weights. ``needed``: which of them are wanted at all."""

    def __init__(self, needed: Sequence[bool]) -> None:
        self.needed = needed
        self._sums: list[Tensor | None] = [None] * len(needed)

    def add_product(self, i: int, dy_BtO: Tensor, x_BtI: Tensor) -> None:
        """dy^T x, summed over all tokens, for weight ``i``."""
        if not self.needed[i]:
            return
        a, b, total = dy_BtO.flatten(0, 1).t(), x_BtI.flatten(0, 1), self._sums[i]
        if total is not None and total.dtype == a.dtype:
            total.addmm_(a, b)
        else:
            self.add(i, torch.mm(a, b))

    def add(self, i: int, grad: Tensor) -> None:
        """A finished gradient of one range for weight ``i``; it may be changed afterwards."""
        if not self.needed[i]:
            return
        total = self._sums[i]
        self._sums[i] = grad.to(torch.promote_types(grad.dtype, torch.float32)) if total is None else total.add_(grad)

    def taken(self, i: int) -> Tensor | None:
        """The sum of weight ``i`` as it is, which it leaves."""
        total, self._sums[i] = self._sums[i], None
        return total

    def add_rows(self, i: int, grad: Tensor | None, rows: Sequence[tuple[int, int]] | None, whole: Tensor) -> None:
        """A finished gradient of some ``rows``, ranges one after another (None: all), of weight ``i``, which is as large as ``whole``."""
        if grad is None:
            return
        if rows is None:
            self.add(i, grad)
            return
        total = self._sums[i]
        if total is None:
            total = self._sums[i] = torch.zeros_like(whole, dtype=torch.promote_types(grad.dtype, torch.float32))
        for (start, end), part in zip(rows, grad.split([end - start for start, end in rows]), strict=True):
            total[start:end].add_(part)

    def results(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums, which they leave, in what the gradients of their weights are kept in."""
        done = [None if total is None else total.to(gradient_dtype(weight)) for total, weight in zip(self._sums, weights, strict=True)]
        self._sums = [None] * len(done)
        return done


@dataclass(frozen=True)
class TokenWise:
    """The token-wise parts of ``block``, computed in ``dtype``. Parameters are read at every call: under FSDP2 they come and go."""

    block: Block
    dtype: torch.dtype
    ends_with_mixer: ClassVar[bool] = False
    """The feed-forward is not a part of ``leave``."""

    @property
    def is_attention(self) -> bool:
        return isinstance(self.block.mixer, Attention)

    @property
    def tokens(self) -> Tokens:
        """How the block's products reach the tokens of other ranks."""
        mixer = self.block.mixer if isinstance(self.block.mixer, Attention) else self.block.ffn
        return getattr(mixer, "tokens", ALL_TOKENS)

    @property
    def mixer_dim(self) -> int:
        """Where the mixer's inputs and output, ``by_rank``, count tokens: [B, H, T, D] or [B, H, P, t, D] for attention, [B, T, C] for a
        memory."""
        return (2 if self.tokens.ranks == 1 else 3) if self.is_attention else 1

    @property
    def enter_dims(self) -> tuple[int, ...]:
        """The same for every tensor of ``enter``."""
        return (self.mixer_dim,) * (3 if self.is_attention else 1)

    def by_rank(self, x_BHT: Tensor) -> Tensor:
        """A tensor of attention, [B, H, T, ...], with its tokens by ranks [B, H, P, t, ...] where there are several; else as it is."""
        return x_BHT.unflatten(2, (self.tokens.ranks, -1)) if self.is_attention and self.tokens.ranks > 1 else x_BHT

    def joined(self, x: Tensor) -> Tensor:
        """The way back of ``by_rank``: a view wherever memory allows."""
        return x.flatten(2, 3) if self.is_attention and self.tokens.ranks > 1 else x

    def rows(self, table: RopeTable | None, start: int, end: int) -> RopeTable | None:
        """The table's part for a range of tokens."""
        if table is None:
            return None
        dim = self.mixer_dim
        return self.by_rank(table[0]).narrow(dim, start, end - start), self.by_rank(table[1]).narrow(dim, start, end - start)

    def enter_weights(self) -> list[Tensor]:
        """Norm; for attention also the projections of query, key and value, then their biases, then the norms of query and key, where it
        has them."""
        mixer = self.block.mixer
        if not isinstance(mixer, Attention):
            return [self.block.norm1.weight]
        projections = (mixer.wq, mixer.wk, mixer.wv)
        biases = [p.bias for p in projections if p.bias is not None]
        norms = [norm.weight for norm in (mixer.q_norm, mixer.k_norm) if norm is not None]
        return [self.block.norm1.weight, *(p.weight for p in projections), *biases, *norms]

    def leave_weights(self) -> list[Tensor]:
        """Norm, gate, up, down; for attention also the output projection."""
        mixer, ffn = self.block.mixer, self.block.ffn
        assert isinstance(ffn, SwiGLU)
        out = [mixer.wo.weight] if isinstance(mixer, Attention) else []
        return [self.block.norm2.weight, ffn.w_gate.weight, ffn.w_up.weight, ffn.w_down.weight, *out]

    def narrow(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Matrices in the computing dtype, norms and biases as they are."""
        return [weight if weight.ndim == 1 else in_dtype(weight, self.dtype) for weight in weights]

    # --- enter ----------------------------------------------------------------------------------------------------------------

    def enter(self, x_BtC: Tensor, weights: Sequence[Tensor], table: RopeTable | None) -> list[Tensor]:
        """q, k (rotated) and v, each [B, H, t, D] (``by_rank``); for a memory the normed input [B, t, C]."""
        h_BtC, _ = rms_norm(x_BtC, weights[0], self.block.norm1.eps, self.dtype)
        if table is None:
            return [h_BtC]
        h_BSC = self.tokens.gathered(h_BtC)
        q, k, v = (self.by_rank(self._normed(i, self._heads(i, h_BSC, weights), weights).transpose(1, 2)) for i in (1, 2, 3))
        return [turn(q, *table, 1.0), turn(k, *table, 1.0), v]

    def _heads(self, i: int, h_BtC: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """[B, t, H, D] of projection ``i`` (1 query, 2 key, 3 value), its bias added."""
        y_BtO = F.linear(h_BtC, weights[i])
        if self._attention.wq.bias is not None:
            add_bias_(y_BtO, weights[i + 3])
        return y_BtO.unflatten(-1, (-1, self._head_dim))

    def _norm_index(self, i: int) -> int | None:
        """Where ``enter_weights`` has the norm of projection ``i``."""
        if i == 3 or self._attention.q_norm is None:
            return None
        return i + (3 if self._attention.wq.bias is None else 6)

    def _normed(self, i: int, y_BtHD: Tensor, weights: Sequence[Tensor]) -> Tensor:
        index = self._norm_index(i)
        return y_BtHD if index is None else rms_norm(y_BtHD, weights[index], self._norm_eps, self.dtype)[0]

    def enter_backward(
        self, x_BtC: Tensor, grads: Sequence[Tensor], weights: Sequence[Tensor], table: RopeTable | None, sums: GradientSums
    ) -> Tensor:
        """Gradient of x, in x's dtype. ``sums`` and ``weights`` in the order of ``enter_weights``."""
        norm = weights[0]
        h_BtC, rnorm_Bt1 = rms_norm(x_BtC, norm, self.block.norm1.eps, self.dtype)
        if table is None:
            (dh_BtC,) = grads
        else:
            with again():
                h_BtC = self.tokens.gathered(h_BtC)
            dh_BtC = torch.empty(0)
            for i in (3, 2, 1):  # value, key, query: the order in which autograd adds them
                grad_BHtD = grads[i - 1] if i == 3 else turn(grads[i - 1], *table, -1.0)
                dy_BtHD = self.joined(grad_BHtD).transpose(1, 2)
                index = self._norm_index(i)
                if index is not None:
                    with again():
                        y_BtHD = self._heads(i, h_BtC, weights)
                        rnorm_BtH1 = rms_norm(y_BtHD, weights[index], self._norm_eps, self.dtype)[1]
                    dy_BtHD, dnorm_D = rms_norm_backward(dy_BtHD, y_BtHD, weights[index], rnorm_BtH1)
                    sums.add(index, dnorm_D)
                dy_BtO = dy_BtHD.flatten(2)
                if self._attention.wq.bias is not None:
                    sums.add(i + 3, bias_gradient(dy_BtO))
                sums.add_product(i, dy_BtO, h_BtC)
                dh_BtC = torch.matmul(dy_BtO, weights[i]) if i == 3 else dh_BtC.add_(torch.matmul(dy_BtO, weights[i]))
            dh_BtC = self.tokens.summed(dh_BtC)
        dx_BtC, dnorm_C = rms_norm_backward(dh_BtC, x_BtC, norm, rnorm_Bt1)
        sums.add(0, dnorm_C)
        return dx_BtC

    # --- leave ----------------------------------------------------------------------------------------------------------------

    def middle(self, x_BtC: Tensor, mixed: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The residual stream after the mixer, gate and up: what ``leave_backward`` needs."""
        stream_BtC = x_BtC + self._written(mixed, weights[4] if self.is_attention else None)
        h_BtC, _ = rms_norm(stream_BtC, weights[0], self.block.norm2.eps, self.dtype)
        h_BSC = self.tokens.gathered(h_BtC)
        return [stream_BtC, F.linear(h_BSC, weights[1]), F.linear(h_BSC, weights[2])]

    def _written(self, mixed: Tensor, w_out: Tensor | None) -> Tensor:
        """What the mixer adds to the stream: attention's output (``by_rank``) through its projection, a memory's as it is."""
        return mixed if w_out is None else self.tokens.summed(F.linear(tokens_first(self.joined(mixed)), w_out))

    def leave(self, middle: Sequence[Tensor], weights: Sequence[Tensor], out_BtC: Tensor | None = None) -> Tensor:
        """The residual stream after the block, into ``out`` if given."""
        stream_BtC, gate_BSF, up_BSF = middle
        down_BtC = self.tokens.summed(F.linear(gated_product(gate_BSF, up_BSF), weights[3]))
        return torch.add(stream_BtC, down_BtC, out=out_BtC)

    def leave_backward(
        self, dy_BtC: Tensor, middle: Sequence[Tensor], mixed: Tensor | None, weights: Sequence[Tensor], sums: GradientSums
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x, in its dtype, and of the mixer's output ``mixed``, whose values only attention needs. ``weights`` and ``sums``
        in the order of ``leave_weights``."""
        stream_BtC, gate_BSF, up_BSF = middle
        norm, w_gate, w_up, w_down = weights[:4]
        h_BtC, rnorm_Bt1 = rms_norm(stream_BtC, norm, self.block.norm2.eps, self.dtype)
        with again():
            h_BSC = self.tokens.gathered(h_BtC)
        del h_BtC
        d_BSC = self.tokens.gathered(dy_BtC.to(self.dtype))
        sums.add_product(3, d_BSC, gated_product(gate_BSF, up_BSF))
        dgate_BSF, dup_BSF = gated_product_backward(torch.matmul(d_BSC, w_down), gate_BSF, up_BSF)
        sums.add_product(2, dup_BSF, h_BSC)
        sums.add_product(1, dgate_BSF, h_BSC)
        dh_BSC = torch.matmul(dup_BSF, w_up).add_(torch.matmul(dgate_BSF, w_gate))
        del dgate_BSF, dup_BSF, h_BSC
        dh_BtC = self.tokens.summed(dh_BSC)
        del dh_BSC
        dstream_BtC, dnorm_C = rms_norm_backward(dh_BtC, stream_BtC, norm, rnorm_Bt1)
        sums.add(0, dnorm_C)
        dstream_BtC.add_(dy_BtC)
        if not self.is_attention:
            return dstream_BtC, dstream_BtC.to(self.dtype, copy=True)
        assert mixed is not None
        return dstream_BtC, self._written_backward(dstream_BtC.to(self.dtype), mixed, weights[4], 4, sums)

    def _written_backward(self, d_BtC: Tensor, mixed: Tensor, w_out: Tensor, i: int, sums: GradientSums) -> Tensor:
        """The gradient of attention's output (``by_rank``); that of its projection goes to sum ``i``."""
        d_BSC = self.tokens.gathered(d_BtC)
        sums.add_product(i, d_BSC, tokens_first(self.joined(mixed)))
        return self.by_rank(torch.matmul(d_BSC, w_out).unflatten(-1, (-1, self._head_dim)).transpose(1, 2))

    @property
    def _attention(self) -> Attention:
        mixer = self.block.mixer
        assert isinstance(mixer, Attention)
        return mixer

    @property
    def _head_dim(self) -> int:
        return self._attention.head_dim

    @property
    def _norm_eps(self) -> float:
        norm = self._attention.q_norm
        assert norm is not None
        return norm.eps


class MixerOnly(TokenWise):
    """Of a block whose feed-forward is not token-wise (``models/product_keys.py``): ``leave`` ends with the stream after the mixer, which
    the feed-forward then reads as a module. ``middle`` is that stream, and ``leave_backward`` needs none of it."""

    ends_with_mixer = True

    def leave_weights(self) -> list[Tensor]:
        """Norm, which gets no gradient here; for attention also the output projection."""
        mixer = self.block.mixer
        return [self.block.norm2.weight, *([mixer.wo.weight] if isinstance(mixer, Attention) else [])]

    def middle(self, x_BtC: Tensor, mixed: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """See `TokenWise.middle`."""
        return [x_BtC + self._written(mixed, weights[1] if self.is_attention else None)]

    def leave(self, middle: Sequence[Tensor], weights: Sequence[Tensor], out_BtC: Tensor | None = None) -> Tensor:
        """See `TokenWise.leave`."""
        return middle[0] if out_BtC is None else out_BtC.copy_(middle[0])

    def leave_backward(
        self, dy_BtC: Tensor, middle: Sequence[Tensor], mixed: Tensor | None, weights: Sequence[Tensor], sums: GradientSums
    ) -> tuple[Tensor, Tensor]:
        """See `TokenWise.leave_backward`."""
        d_BtC = dy_BtC.to(self.dtype, copy=True)
        if not self.is_attention:
            return dy_BtC, d_BtC
        assert mixed is not None
        return dy_BtC, self._written_backward(d_BtC, mixed, weights[1], 1, sums)


def token_wise_of(block: Block, dtype: torch.dtype) -> TokenWise:
    """The token-wise parts of ``block``."""
    return (TokenWise if isinstance(block.ffn, SwiGLU) else MixerOnly)(block, dtype)


def tokens_first(out_BHtD: Tensor) -> Tensor:
    """[B, H, t, D] -> [B, t, H * D]"""
    return out_BHtD.transpose(1, 2).flatten(2)


def check_known(block: Block) -> None:
    """Raise TypeError unless every part of ``block`` is one whose arithmetic is written here."""
    known = {"norm1": RMSNorm, "norm2": RMSNorm, "ffn": SwiGLU}
    for name, kind in known.items():
        if type(getattr(block, name)) is not kind and not isinstance(getattr(block, name), TableReader):
            raise TypeError(f"a memory policy knows {kind.__name__} as a block's {name}, not {type(getattr(block, name)).__name__}")
    if type(block.mixer) is not Attention and not isinstance(block.mixer, MemoryModule):
        raise TypeError(f"a memory policy knows Attention and memory modules as a block's mixer, not {type(block.mixer).__name__}")
