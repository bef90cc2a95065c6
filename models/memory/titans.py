"""Titans' neural memory (arXiv 2501.00663): a small network per head whose weights learn, by gradient descent, while the text goes by.

    q, k, v = silu(conv4(W x)), q and k on the unit sphere        theta, eta, alpha = gates of x per head
    S_t = eta_t S_{t-1} - (1 - eta_t) theta_t grad l(A; k_t, v_t)             M_t = (1 - alpha_t) M_{t-1} + S_t
    o_t = f_A(q_t)        y = W_o (RMSNorm(o) * silu(W_g x))

A are the weights M at the start of the token's chunk: reads and gradients see what was written in earlier chunks ("apply, then update"),
so a token never sees later ones, and a chunk's update is a sum over its tokens, which is how it splits over ranks
(`models/memory/chunk_scan.py`, `chunk_plan.py`). Variants (Yaad, Moneta of Miras, LaCT) change loss, gates and what keeps weights bounded.

Arithmetic of the memory is float32 (float64 in float64).

Legend: B row, T token, C channel, H head, K key, V value, E features of a token and head, N chunk, S stream, p slot, G = S*H, F fast
weights of a head, Z 2 with momentum else 1, R gates of a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.batch import Bounds, Range
from models.config import ModelConfig, TitansConfig
from models.int8_weight import Int8Weight, in_dtype
from models.linear import Linear, linear, widened
from models.memory.chunk_plan import Chunks, Share, plan_chunks
from models.memory.chunk_scan import Rule, scan_chunks, turns_of
from models.memory.dealing import collect, deal, share_in
from models.memory.documents import plan_documents
from models.memory.fast_weights import FastNetwork
from models.memory.protocol import (
    Carry,
    LocalCarry,
    MemoryCost,
    MemoryModule,
    MemoryTraits,
    State,
    last_tokens,
    local_offsets,
    ranges_in_order,
)
from models.memory.short_conv import conv_silu_chunks, gated_norm
from models.memory.titans_gates import write_weights
from models.memory.titans_oracle import titans_oracle
from models.memory.titans_shapes import TitansShapes, gates_of

_INITIAL_GATES = {"theta": (-1.0, -1.0), "eta": (-1.0, -1.0), "alpha": (-8.0, -4.0), "delta": (0.5, 0.5)}
"""Range of the initial gate biases over heads; those of forgetting are spread, so that some heads keep for long."""


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


class Titans(MemoryModule):
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
    ) -> None:
        super().__init__()
        self.traits = MemoryTraits(
            carry="layer",
            transition="token_sum",
            read_at="segment_start",
            halo_tokens=conv_kernel - 1,
            reset_every=settings.reset_every,
            head_splittable=n_heads,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.settings = settings
        self.n_heads, self.key_dim, self.value_dim = n_heads, key_dim, value_dim
        self.halo, self.norm_eps = conv_kernel - 1, norm_eps
        self.network = FastNetwork(settings.architecture, key_dim, value_dim, settings.hidden(key_dim), settings.residual_norm)
        self.rule = rule_of(settings, self.network)
        self.gates = gates_of(settings)
        keys, values = n_heads * key_dim, n_heads * value_dim
        self.w_q = Linear(d_model, keys)
        self.w_k = Linear(d_model, keys)
        self.w_v = Linear(d_model, values)
        self.w_gate = Linear(d_model, values)
        self.w_rates = Linear(d_model, n_heads * len(self.gates))
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
        """``state`` [B, H, Z, F], weights and momentum; ``anchor`` [B, H, F], the weights at which the current chunk reads; ``conv``
        [B, kernel - 1, d_model], the last inputs of the layer."""
        start_BHF = self.initial_HF(dtype).to(device).expand(batch_size, -1, -1)
        state = start_BHF.unsqueeze(2)
        if self.rule.momentum:
            state = torch.cat([state, torch.zeros_like(state)], 2)
        conv = torch.zeros(batch_size, self.halo, self.w_q.in_features, device=device, dtype=dtype)
        return {"state": state, "anchor": start_BHF, "conv": conv}

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`."""
        dtype = _wide(x_BTC)
        start = self.init_state(len(x_BTC), x_BTC.device, dtype) if state is None else state
        halos = self._halos(x_BTC, start["conv"], bounds)
        offsets = local_offsets(bounds)
        pieces = [x_BTC[:, offsets[i] : offsets[i + 1]] for i in range(len(bounds.ranges))]
        carried = (start["state"].to(dtype), start["anchor"].to(dtype))
        run = self._carried_through if self.carry.local else self._dealt
        outputs, carried = run(pieces, halos, carried, bounds)
        y_BTC = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return y_BTC, self._state_after(x_BTC, state, carried, pieces, halos, bounds)

    def _carried_through(
        self, pieces: list[Tensor], halos: list[Tensor], carried: tuple[Tensor, Tensor], bounds: Bounds
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """One process: the state goes from tile to tile and from range to range."""
        outputs = list(pieces)
        weights, initial_HF = self._weights(), self.initial_HF(carried[0].dtype)
        for i in ranges_in_order(bounds):
            tiles, before = [], halos[i]
            for span, x in self._tiles(pieces[i], bounds.ranges[i]):
                body = partial(self._whole_tile, bounds, span)
                y, *moved = self._run(_local_start(bounds, span), span[1] - span[0], body, weights, initial_HF, x, before, *carried)
                carried = (moved[0], moved[1])
                tiles.append(y)
                before = last_tokens(before, x, self.halo)
            outputs[i] = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
        return outputs, carried

    def _whole_tile(
        self, bounds: Bounds, span: Range, weights: _Weights, initial_HF: Tensor, x_BTC: Tensor, before_BnC: Tensor, *carried: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = plan_chunks(bounds, span, self.settings.chunk_size, self.settings.reset_every)
        here = LocalCarry()
        share = share_in(here, bounds.with_ranges((span,)), chunks, x_BTC.device)
        features = deal(self._features(bounds, span, weights, x_BTC, before_BnC), share, here)
        q, k, v, gates = self._by_memory(features)
        write, whole, delta = write_weights(self.settings, self.largest_rate, gates, share, here)
        turns = turns_of(chunks, self.n_heads, x_BTC.device)
        streams = self._to_streams(chunks, *carried)
        initial_GF = initial_HF.repeat(chunks.n_streams, 1)
        o_NGpV, state, anchor = scan_chunks(self.rule, turns, here.total, streams[0], initial_GF, streams[1], whole, q, k, v, write, delta)
        o_BTD = self._to_tokens(o_NGpV, share, here, x_BTC.shape[1])
        return self._write_out(weights, x_BTC, o_BTD), *self._to_rows(chunks, state, anchor)

    def _dealt(
        self, pieces: list[Tensor], halos: list[Tensor], carried: tuple[Tensor, Tensor], bounds: Bounds
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Several ranks: tokens are projected where they are, dealt so that every rank has a slice of every chunk, and brought back."""
        weights = self._weights()
        features, cuts = [], []
        for i, piece in enumerate(pieces):
            before = halos[i]
            for span, x in self._tiles(piece, bounds.ranges[i]):
                first = _local_start(bounds, span)
                features.append(self._run(first, x.shape[1], partial(self._features, bounds, span), weights, x, before))
                before = last_tokens(before, x, self.halo)
                cuts.append((first, x))
        tokens = sum(piece.shape[1] for piece in pieces)
        chunks = plan_chunks(bounds, (0, bounds.seq_len), self.settings.chunk_size, self.settings.reset_every)
        share = share_in(self.carry, bounds, chunks, pieces[0].device)
        joined = features[0] if len(features) == 1 else torch.cat(features, dim=1)
        q, k, v, gates = self._by_memory(deal(joined, share, self.carry))
        write, whole, delta = write_weights(self.settings, self.largest_rate, gates, share, self.carry)
        turns = turns_of(chunks, self.n_heads, pieces[0].device)
        state, anchor = self._to_streams(chunks, *carried)
        initial_GF = self.initial_HF(state.dtype).repeat(chunks.n_streams, 1)
        # As many groups of chunks as tiles, each made again in backward like a tile.
        ends = [-(-len(q) * (j + 1) // len(cuts)) for j in range(len(cuts))]
        read = []
        for (first, x), a, b in zip(cuts, [0, *ends[:-1]], ends, strict=True):
            if a == b:
                continue
            body = partial(scan_chunks, self.rule, turns.part(a, b), self.carry.total)
            given = (whole[a:b], q[a:b], k[a:b], v[a:b], write[a:b], None if delta is None else delta[a:b])
            o_NGpV, state, anchor = self._run(first, x.shape[1], body, state, initial_GF, anchor, *given)
            read.append(o_NGpV)
        o_BTD = self._to_tokens(read[0] if len(read) == 1 else torch.cat(read), share, self.carry, tokens)
        tiles = [self._run(first, x.shape[1], self._write_out, weights, x, o_BTD[:, first : first + x.shape[1]]) for first, x in cuts]
        return tiles, self._to_rows(chunks, state, anchor)

    def _run(self, first: int, n_tokens: int, body: Any, *args: Any) -> Any:
        """One tile; with tiles its inside is recomputed in the backward pass unless ``run_tile`` decides."""
        if self.run_tile is not None:
            return self.run_tile(first, n_tokens, body, *args)
        if not self.tile_tokens or not torch.is_grad_enabled():
            return body(*args)
        return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=False)

    def _tiles(self, x_BTC: Tensor, span: Range) -> list[tuple[Range, Tensor]]:
        """Global spans and their tokens."""
        start, end = span
        size = self.tile_tokens or end - start
        return [((a, min(a + size, end)), x_BTC[:, a - start : a - start + size]) for a in range(start, end, size)]

    def _weights(self) -> _Weights:
        """The parameters; with tiles, low-precision ones are widened once so that tile gradients add up in float32."""

        def wide(weight: Tensor) -> Tensor:
            if not self.tile_tokens:
                return weight
            dtype = _wide(weight)
            return in_dtype(weight, dtype) if isinstance(weight, Int8Weight) else widened(weight, dtype)

        linears = (self.w_q, self.w_k, self.w_v, self.w_gate, self.w_rates, self.w_out)
        small = (p.to(_wide(p)) for p in (*self._convolutions(), self.rate_bias, self.norm_weight))
        return _Weights(*(wide(one.weight) for one in linears), *small)

    def _convolutions(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.halo:
            return self.conv_q, self.conv_k, self.conv_v
        q, k, v = (self.norm_weight.new_ones(one.out_features, 1) for one in (self.w_q, self.w_k, self.w_v))
        return q, k, v

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

    def _write_out(self, weights: _Weights, x_BTC: Tensor, o_BTD: Tensor) -> Tensor:
        B, T, _ = x_BTC.shape
        o_1GTV = o_BTD.view(B, T, self.n_heads, -1).transpose(1, 2).flatten(0, 1).unsqueeze(0)
        return linear(gated_norm(o_1GTV, linear(x_BTC, weights.w_gate), weights.norm, self.norm_eps), weights.w_out)

    def _to_tokens(self, o_NGpV: Tensor, share: Share, carry: Carry, tokens: int) -> Tensor:
        """[B, T, H * V] of this rank's own tokens."""
        return collect(o_NGpV.unflatten(1, (-1, self.n_heads)).transpose(2, 3).flatten(3), share, carry, tokens)

    # ------------------------------------------------------------------------------------------------ states

    def _to_streams(self, chunks: Chunks, state_BHZF: Tensor, anchor_BHF: Tensor) -> tuple[Tensor, Tensor]:
        """State [Z, G, F] and anchor [G, F] of every stream; only a row's first one has something to continue."""
        if chunks.n_streams != len(state_BHZF):
            rows = torch.tensor(chunks.row_S).to(state_BHZF.device)
            state_BHZF, anchor_BHF = state_BHZF[rows], anchor_BHF[rows]
        return state_BHZF.flatten(0, 1).transpose(0, 1).contiguous(), anchor_BHF.flatten(0, 1)

    def _to_rows(self, chunks: Chunks, state_ZGF: Tensor, anchor_GF: Tensor) -> tuple[Tensor, Tensor]:
        """State [B, H, Z, F] and anchor [B, H, F] after the last token of every row."""
        state, anchor = (x.unflatten(0, (-1, self.n_heads)) for x in (state_ZGF.transpose(0, 1), anchor_GF))
        if chunks.n_streams != chunks.n_rows:
            rows = torch.tensor(chunks.last_stream_B).to(state.device)
            state, anchor = state[rows], anchor[rows]
        return state, anchor

    def _halos(self, x_BTC: Tensor, conv_BnC: Tensor, bounds: Bounds) -> list[Tensor]:
        """Inputs before every range; what lies before the sequence comes from the state."""
        if not self.halo:
            return [x_BTC[:, :0] for _ in bounds.ranges]
        origin = min(start for start, _ in bounds.ranges) if self.carry.local else 0
        halos = self.carry.halo(x_BTC, self.halo, bounds)
        for i, (start, _) in enumerate(bounds.ranges):
            inside = start - origin
            if inside < self.halo:
                halos[i] = torch.cat([conv_BnC[:, inside:].to(x_BTC.dtype), halos[i][:, self.halo - inside :]], dim=1)
        return halos

    def _state_after(
        self, x_BTC: Tensor, given: State | None, carried: tuple[Tensor, Tensor], pieces: list[Tensor], halos: list[Tensor], bounds: Bounds
    ) -> State:
        """The state to hand to the next sequence; over several ranks only for a caller that carries states at all."""
        if self.carry.local:
            last = ranges_in_order(bounds)[-1]
            conv = last_tokens(halos[last], pieces[last], self.halo)
        elif given is None:
            return {}
        else:
            tail = self.carry.tail(x_BTC, self.halo, bounds)
            short = self.halo - min(self.halo, bounds.seq_len)
            conv = torch.cat([given["conv"].to(x_BTC.dtype)[:, self.halo - short :], tail[:, short:]], dim=1)
        return {"state": carried[0], "anchor": carried[1], "conv": conv}

    # ------------------------------------------------------------------------------------------------ twin and arithmetic

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `titans_oracle`."""
        return titans_oracle(self, x_BTC, state, bounds)

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation of tiles is not in ``flops_backward``, that of
        a chunk's inside, which is always made again, is."""
        sizes = (self.w_q.in_features, self.n_heads, self.key_dim, self.value_dim, self.halo)
        shapes = TitansShapes(self.settings, *sizes, not self.carry.local, self.carry.ranks)
        return MemoryCost(
            flops_forward=batch_size * tokens * shapes.flops_forward(),
            flops_backward=batch_size * tokens * shapes.flops_backward(),
            saved_bytes=shapes.saved_bytes(batch_size, tokens, itemsize, self.tile_tokens),
            state_bytes=batch_size * (shapes.state_elements * max(itemsize, 4) + self.halo * shapes.d_model * itemsize),
            exchange_bytes=shapes.exchange_bytes(batch_size, tokens, itemsize),
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
    )


def _local_start(bounds: Bounds, span: Range) -> int:
    """Local index of a span's first token."""
    for offset, (start, end) in zip(local_offsets(bounds), bounds.ranges, strict=False):
        if start <= span[0] < end:
            return offset + span[0] - start
    raise ValueError(f"tokens {span} are not in ranges {bounds.ranges}")


def _wide(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
