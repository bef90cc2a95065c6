"""Titans' neural memory (arXiv 2501.00663): a small network per head whose weights learn, by gradient descent, while the text goes by.

    q, k, v = silu(conv4(W x)), q and k on the unit sphere        theta, eta, alpha = gates of x per head
    S_t = eta_t S_{t-1} - (1 - eta_t) theta_t grad l(A; k_t, v_t)             M_t = (1 - alpha_t) M_{t-1} + S_t
    o_t = f_A(q_t)        y = W_o (RMSNorm(o) * silu(W_g x))

A are the weights M at the start of the token's chunk: reads and gradients see what was written in earlier chunks ("apply, then update";
``read: token`` and ``shifted`` read later weights, decision 0041). So a token never sees later ones, and a chunk's update is a sum over
its tokens, which is how it splits over ranks (`models/memory/chunk_scan.py`, `chunk_plan.py`). Variants (Yaad, Moneta, LaCT) change
loss, gates and what keeps weights bounded.

Arithmetic of the memory is float32 (float64 in float64).

Legend: B row, T token, C channel, H head, K key, V value, E features of a token and head, N chunk, S stream, p slot, G = S*H, F fast
weights of a head, Y weights, momentum if there is one, and the weights read at; R gates of a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.batch import Bounds, Range
from models.config import ModelConfig, TitansConfig
from models.linear import Linear, linear
from models.memory.by_heads import Rows, rows_of
from models.memory.chunk_plan import Chunks, Share, plan_chunks
from models.memory.chunk_scan import Rule, Turns, scan_chunks, turns_of
from models.memory.dealing import collect, deal, share_in
from models.memory.documents import plan_documents
from models.memory.fast_weights import FastNetwork
from models.memory.protocol import Carry, LocalCarry, MemoryCost, MemoryTraits, State, last_tokens
from models.memory.recurrent import RecurrentMixer, state_dtype
from models.memory.short_conv import conv_silu_chunks, gated_norm
from models.memory.titans_gates import write_weights
from models.memory.titans_oracle import titans_oracle
from models.memory.titans_shapes import TitansShapes, gates_of
from models.memory.token_reads import from_start, gates_inside, written_inside

_INITIAL_GATES = {"theta": (-1.0, -1.0), "eta": (-1.0, -1.0), "alpha": (-8.0, -4.0), "delta": (0.5, 0.5)}
"""Range of the initial gate biases over heads; those of forgetting are spread, so that some heads keep for long."""


_READ_AT: dict[str, Literal["segment_start", "segment_end", "token"]] = {
    "chunk_start": "segment_start",
    "shifted": "segment_end",
    "token": "token",
}
"""``titans.read`` as a trait."""


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_gate: Tensor
    w_rates: Tensor
    w_out: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    rate_bias: Tensor
    norm: Tensor
    initial: Tensor
    """[H, F]"""


class Titans(RecurrentMixer):
    """One Titans mixer. Parameters: projections, convolutions, gates, output norm, and the initial weights of every head's network."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        settings: TitansConfig,
        conv_kernel: int = 4,
        norm_eps: float = 1e-5,
        as_mixer: bool = True,
    ) -> None:
        """``as_mixer``: False leaves out gate and output projection, for a layer that reads and writes the memory by itself."""
        network = FastNetwork(settings.architecture, key_dim, value_dim, settings.hidden(key_dim), settings.residual_norm)
        rows = 3 if settings.has_momentum else 2
        super().__init__(d_model, (n_heads, rows, network.size), conv_kernel, settings.chunk_size)
        self.traits = MemoryTraits(
            carry="layer",
            transition="token_sum",
            read_at=_READ_AT[settings.read],
            halo_tokens=conv_kernel - 1,
            reset_every=settings.reset_every,
            head_splittable=n_heads,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.settings = settings
        self.n_heads, self.key_dim, self.value_dim = n_heads, key_dim, value_dim
        self.network, self.norm_eps = network, norm_eps
        self.rule = rule_of(settings, network)
        self.gates = gates_of(settings)
        keys, values = n_heads * key_dim, n_heads * value_dim
        self.w_q = Linear(d_model, keys)
        self.w_k = Linear(d_model, keys)
        self.w_v = Linear(d_model, values)
        self.w_rates = Linear(d_model, n_heads * len(self.gates))
        if as_mixer:
            self.w_gate = Linear(d_model, values)
            self.w_out = Linear(values, d_model)
        if self.halo:
            self.conv_q = nn.Parameter(torch.empty(keys, conv_kernel))
            self.conv_k = nn.Parameter(torch.empty(keys, conv_kernel))
            self.conv_v = nn.Parameter(torch.empty(values, conv_kernel))
        self.rate_bias = nn.Parameter(torch.empty(n_heads, len(self.gates)))
        self.norm_weight = nn.Parameter(torch.empty(value_dim))
        self.start_in = nn.Parameter(torch.empty(n_heads, *self.network.shapes[0]))
        if self.network.kind != "linear":
            self.start_out = nn.Parameter(torch.empty(n_heads, *self.network.shapes[1]))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """A network's first layer is normal with unit variance (keys have unit norm), its last one a tenth of hidden^-1/2, a linear memory
        begins at 0; LaCT's last layer at hidden^-1/2 and Moneta's matrices at unit 4-norm, since they are kept there."""
        if name == "rate_bias":
            columns = [torch.empty(shape[0]).uniform_(*_INITIAL_GATES[gate], generator=generator) for gate in self.gates]
            return torch.stack(columns, -1)
        if name.startswith("start_"):
            normal = torch.empty(shape).normal_(generator=generator)
            if self.settings.variant == "moneta":
                return normal * (3 * math.prod(shape[1:])) ** -0.25
            if name == "start_in":
                return torch.zeros(shape) if self.network.kind == "linear" and self.settings.variant != "lact" else normal
            return normal * shape[1] ** -0.5 * (1.0 if self.settings.variant == "lact" else 0.1)
        if name.startswith("conv_"):
            bound = shape[-1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        if name == "norm_weight":
            return torch.ones(shape)
        return None

    @property
    def largest_rate(self) -> float:
        """Of the inner gradient steps."""
        return self.settings.largest_rate / max(1.0, self.network.hidden / 2)

    def initial_HF(self, dtype: torch.dtype) -> Tensor:
        """Every head's weights before the first token."""
        matrices = [self.start_in] if self.network.kind == "linear" else [self.start_in, self.start_out]
        return torch.cat([m.to(dtype).flatten(1) for m in matrices], 1)

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """``state`` [B, H, Y, F]: weights, momentum if there is one, and the weights at which the current chunk reads; ``conv``
        [B, kernel - 1, d_model], the last inputs of the layer."""
        state = super().init_state(batch_size, device, dtype)
        start_HF = self.initial_HF(dtype).to(device)
        rows = [start_HF, torch.zeros_like(start_HF), start_HF] if self.rule.momentum else [start_HF, start_HF]
        return {**state, "state": torch.stack(rows, 1).expand(batch_size, -1, -1, -1)}

    # ------------------------------------------------------------------------------------------------ the walk

    def whole_tile(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, state_GYF: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.whole_tile`."""
        o_BTD, state_GYF = self.recur(bounds, span, weights, x_BTC, before_BnC, state_GYF)
        return self.write(weights, x_BTC, o_BTD), state_GYF

    def recur(
        self, bounds: Bounds, span: Range, weights: _Weights, f_BTE: Tensor, before_BnE: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.recur`; tokens may be projected or not."""
        here = LocalCarry()
        chunks = plan_chunks(bounds, span, self.settings.chunk_size, self.settings.reset_every)
        share = share_in(here, bounds.with_ranges((span,)), chunks, f_BTE.device)
        features_BTE = self._features(bounds, span, weights, f_BTE, before_BnE)
        turns, tokens = self._dealt(chunks, share, here, features_BTE)
        initial_GF = weights.initial.repeat(chunks.n_streams, 1)
        o_NGpV, state_YGF = self._scan(turns, here, share.rank, self.to_streams(chunks, state_GKW), initial_GF, *tokens)
        return self._to_tokens(o_NGpV, share, here, f_BTE.shape[1]), self.to_rows(chunks, state_YGF)

    def exchanged(self, pieces: list[Tensor], halos: list[Tensor], initial_BHKW: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """Several ranks: tokens are projected where they are, dealt so that every rank has a slice of every chunk, and brought back."""
        weights, features, tiles = self.weights(), [], []
        for i, piece in enumerate(pieces):
            before = halos[i]
            for span, x in self.tiles(piece, bounds.ranges[i]):
                features.append(self.run(bounds, span, partial(self._features, bounds, span), weights, x, before))
                before = last_tokens(before, x, self.halo)
                tiles.append((span, x))
        chunks = plan_chunks(bounds, (0, bounds.seq_len), self.settings.chunk_size, self.settings.reset_every)
        share = share_in(self.carry, bounds, chunks, pieces[0].device)
        joined = features[0] if len(features) == 1 else torch.cat(features, dim=1)
        turns, tokens = self._dealt(chunks, share, self.carry, joined)
        initial_GF = weights.initial.repeat(chunks.n_streams, 1)
        state_YGF, read = self.to_streams(chunks, initial_BHKW.flatten(0, 1)), []
        ends = [-(-chunks.n_steps * (j + 1) // len(tiles)) for j in range(len(tiles))]
        for (span, _), a, b in zip(tiles, [0, *ends[:-1]], ends, strict=True):  # as many groups of chunks as tiles, made again like them
            if a < b:
                group = (x[a:b] for x in tokens)
                body = partial(self._scan, turns.part(a, b), self.carry, share.rank)
                o_NGpV, state_YGF = self.run(bounds, span, body, state_YGF, initial_GF, *group)
                read.append(o_NGpV)
        o_BTD = self._to_tokens(read[0] if len(read) == 1 else torch.cat(read), share, self.carry, joined.shape[1])
        outputs, o_tiles = [], iter(o_BTD.split([x.shape[1] for _, x in tiles], dim=1))
        for i in range(len(pieces)):
            own = [(span, x, next(o_tiles)) for span, x in self.tiles(pieces[i], bounds.ranges[i])]
            written = [self.run(bounds, span, self.write, weights, x, o) for span, x, o in own]
            outputs.append(written[0] if len(written) == 1 else torch.cat(written, dim=1))
        return outputs, self.to_rows(chunks, state_YGF).unflatten(0, initial_BHKW.shape[:2])

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        linears = (self.w_q, self.w_k, self.w_v, self.w_gate, self.w_rates, self.w_out)
        small = [p.to(state_dtype(p)) for p in (*self.convolutions(), self.rate_bias, self.norm_weight)]
        return _Weights(*(*self.wide(one.weight for one in linears), *small, self.initial_HF(small[0].dtype)))

    def convolutions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Taps of q, k and v; one of weight 1 where there is no convolution."""
        if self.halo:
            return self.conv_q, self.conv_k, self.conv_v
        q, k, v = (self.norm_weight.new_ones(one.out_features, 1) for one in (self.w_q, self.w_k, self.w_v))
        return q, k, v

    def _dealt(self, chunks: Chunks, share: Share, carry: Carry, features_BTE: Tensor) -> tuple[Turns, tuple[Tensor, ...]]:
        """What `_scan` needs of this rank's share of all chunks: flags, and tensors with one entry per chunk."""
        q, k, v, gates = self._by_memory(deal(features_BTE, share, carry))
        write, whole, delta = write_weights(self.settings, self.largest_rate, gates, share, carry)
        turns = turns_of(chunks, self.n_heads, q.device, share if self.settings.read == "shifted" else None)
        tokens = (k, v, write, *(() if delta is None else (delta,)))
        if self.settings.read != "token":
            return turns, (whole, q, *tokens)
        gates_NLGc = gates_inside(self.settings, self.largest_rate, gates, share, carry)
        return turns, (q, gates_NLGc, whole, from_start(q, gates_NLGc, share.rank), *tokens)

    def _scan(self, turns: Turns, carry: Carry, rank: int, state_YGF: Tensor, initial_GF: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [N, G, p, V] of some chunks and the state after them."""
        inside, tokens = (tokens[:2], tokens[2:]) if self.settings.read == "token" else ((), tokens)
        o_NGpV, state_ZGF, anchor_GF = scan_chunks(self.rule, turns, carry.total, state_YGF[:-1], initial_GF, state_YGF[-1], *tokens)
        if inside:
            o_NGpV, error_NGpV = o_NGpV.chunk(2, dim=-1)
            o_NGpV = o_NGpV - written_inside(inside[0], tokens[2], error_NGpV, inside[1], carry, rank)
        return o_NGpV, torch.cat([state_ZGF, anchor_GF.unsqueeze(0)])

    # ------------------------------------------------------------------------------------------------ by heads

    projections = ("w_q", "w_k", "w_v", "w_rates")

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """See `RecurrentMixer.head_rows`."""
        keys, values, rates = (rows_of(self.n_heads, heads, width) for width in (self.key_dim, self.value_dim, len(self.gates)))
        projections = {"w_q": keys, "w_k": keys, "w_v": values, "w_rates": rates}
        return {**projections, "conv_q": keys, "conv_k": keys, "conv_v": values, "rate_bias": (heads,), "initial": (heads,)}

    def output_rows(self, heads: Range) -> Rows:
        """See `RecurrentMixer.output_rows`."""
        return rows_of(self.n_heads, heads, self.value_dim)

    # ------------------------------------------------------------------------------------------------ token-wise parts

    def _features(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor) -> Tensor:
        """[B, T, H * E]: query, key, value and gates of every head, wide."""
        B, T, _ = x_BTC.shape
        plan = plan_documents(bounds, span, T, self.halo, x_BTC.device)

        def stream(weight: Tensor, conv: Tensor, scale: float) -> Tensor:
            x, before = linear(x_BTC, weight), linear(before_BnC.to(x_BTC.dtype), weight)
            return conv_silu_chunks(x, before, conv, plan, self.n_heads, T, scale).view(B, self.n_heads, T, -1).transpose(1, 2)

        q = stream(weights.w_q, weights.conv_q, 1.0)
        k = stream(weights.w_k, weights.conv_k, 1.0)
        v = stream(weights.w_v, weights.conv_v, 0.0)
        rates_BTHR = linear(x_BTC, weights.w_rates).to(q.dtype).unflatten(-1, (self.n_heads, -1)) + weights.rate_bias
        return torch.cat([q, k, v, rates_BTHR], dim=-1).flatten(2)

    def _by_memory(self, features_NSpE: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k, v [N, G, p, .] and raw gates [N, G, p] by name."""
        x = features_NSpE.unflatten(-1, (self.n_heads, -1)).transpose(2, 3).flatten(1, 2)
        q, k, v, rates = x.split([self.key_dim, self.key_dim, self.value_dim, len(self.gates)], dim=-1)
        by_name = dict(zip(self.gates, rates.movedim(-1, 0).contiguous().unbind(0), strict=True))
        return q.contiguous(), k.contiguous(), v.contiguous(), by_name

    def write(self, weights: _Weights, x_BTC: Tensor, o_BTX: Tensor) -> Tensor:
        """See `RecurrentMixer.write`."""
        B, T, _ = x_BTC.shape
        o_1GTV = o_BTX.to(state_dtype(x_BTC)).reshape(B, T, self.n_heads, -1).transpose(1, 2).flatten(0, 1).unsqueeze(0)
        return linear(gated_norm(o_1GTV, linear(x_BTC, weights.w_gate), weights.norm, self.norm_eps), weights.w_out)

    def _to_tokens(self, o_NGpV: Tensor, share: Share, carry: Carry, tokens: int) -> Tensor:
        """[B, T, H * V] of this rank's own tokens."""
        return collect(o_NGpV.unflatten(1, (-1, self.n_heads)).transpose(2, 3).flatten(3), share, carry, tokens)

    # ------------------------------------------------------------------------------------------------ states

    def to_streams(self, chunks: Chunks, state_GYF: Tensor) -> Tensor:
        """State [Y, G, F] of every stream; only a row's first one has something to continue."""
        if chunks.n_streams != chunks.n_rows:
            rows = torch.tensor(chunks.row_S).to(state_GYF.device)
            state_GYF = state_GYF.unflatten(0, (chunks.n_rows, -1))[rows].flatten(0, 1)
        return state_GYF.transpose(0, 1).contiguous()

    def to_rows(self, chunks: Chunks, state_YGF: Tensor) -> Tensor:
        """State [B*H, Y, F] after the last token of every row."""
        state_GYF = state_YGF.transpose(0, 1)
        if chunks.n_streams != chunks.n_rows:
            rows = torch.tensor(chunks.last_stream_B).to(state_YGF.device)
            state_GYF = state_GYF.unflatten(0, (chunks.n_streams, -1))[rows].flatten(0, 1)
        return state_GYF

    # ------------------------------------------------------------------------------------------------ twin and arithmetic

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `titans_oracle`."""
        return titans_oracle(self, x_BTC, state, bounds)

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation of tiles is not in ``flops_backward``, that of
        a chunk's inside, which is always made again, is."""
        sizes = (self.w_q.in_features, self.n_heads, self.key_dim, self.value_dim, self.halo)
        shapes = TitansShapes(self.settings, *sizes, self.crosses, self.carry.ranks if self.crosses else 1)
        between, tiled = self.head_bytes(batch_size * tokens, itemsize), 0 < self.tile_tokens < tokens
        return MemoryCost(
            flops_forward=batch_size * tokens * shapes.flops_forward(),
            flops_backward=batch_size * tokens * shapes.flops_backward(),
            saved_bytes=shapes.saved_bytes(batch_size, tokens, itemsize, self.tile_tokens) + (between if tiled else 0),
            state_bytes=batch_size * (shapes.state_elements * max(itemsize, 4) + self.halo * shapes.d_model * itemsize),
            exchange_bytes=between or shapes.exchange_bytes(batch_size, tokens, itemsize),
        )


def rule_of(settings: TitansConfig, network: FastNetwork) -> Rule:
    """How each variant learns."""
    loss = {"titans": "squares", "yaad": "huber", "moneta": "power", "lact": "dot"}[settings.variant]
    return Rule(
        network,
        loss,  # type: ignore[arg-type]
        settings.has_momentum,
        at_norm=settings.variant == "moneta",
        at_initial_norms=settings.variant == "lact",
        read=settings.read,
    )


def build(config: ModelConfig) -> Titans:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    return Titans(
        d_model=config.d_model,
        n_heads=config.memory_heads,
        key_dim=config.memory_key_dim,
        value_dim=config.memory_value_dim,
        settings=config.memory.titans,
        conv_kernel=config.memory.conv_kernel,
        norm_eps=config.norm_eps,
    )
