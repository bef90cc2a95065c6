"""What follows from the shapes of a Titans memory: parameters, arithmetic, bytes. Plain integers, imports no torch.

Legend: n tokens of all rows, e bytes of a computed value, w of a wide one (state, gates, keys), d width of the residual stream, K, V, H
key and value size and heads, F fast weights of a head, Z 2 with momentum else 1, R gates of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig, TitansConfig

GATES = {
    "titans": ("theta", "alpha", "eta"),
    "yaad": ("theta", "alpha", "delta"),
    "moneta": ("theta", "alpha"),
    "lact": ("theta", "eta"),
}
"""Of each variant: learning rate, forgetting, momentum, where Huber's loss turns linear."""


def gates_of(settings: TitansConfig) -> tuple[str, ...]:
    """The gates of every head, in the order of the projection's columns."""
    return GATES[settings.variant]


@dataclass(frozen=True)
class TitansShapes:
    """One layer. ``split``: its sequence is shared by ``ranks`` ranks, and tokens are dealt."""

    settings: TitansConfig
    d_model: int
    heads: int
    key: int
    value: int
    halo: int
    split: bool = False
    ranks: int = 1

    @staticmethod
    def of(config: ModelConfig, ranks: int = 1) -> TitansShapes:
        """Of a model's memory layers."""
        halo = config.memory.conv_kernel - 1
        sizes = (config.memory_heads, config.memory_key_dim, config.memory_value_dim)
        return TitansShapes(config.memory.titans, config.d_model, *sizes, halo, ranks > 1, ranks)

    @property
    def hidden(self) -> int:
        """Hidden width of the memory's network; 0 for a linear memory."""
        return self.settings.hidden(self.key)

    @property
    def fast_weights(self) -> int:
        """F"""
        if not self.hidden:
            return self.key * self.value
        return self.key * self.hidden * (2 if self.settings.architecture == "swiglu" else 1) + self.hidden * self.value

    @property
    def parts(self) -> int:
        """Z"""
        return 2 if self.settings.has_momentum else 1

    @property
    def n_gates(self) -> int:
        """R"""
        return len(gates_of(self.settings))

    @property
    def state_elements(self) -> int:
        """Numbers carried per row: weights, momentum, and the weights at which the current chunk reads."""
        return self.heads * (self.parts + 1) * self.fast_weights

    @property
    def features(self) -> int:
        """Numbers per token that are dealt: query, key, value and gates of every head."""
        return self.heads * (2 * self.key + self.value + self.n_gates)

    # --- parameters -------------------------------------------------------------------------------------------------------------

    def matmul_parameters(self) -> int:
        """Projections of every token: q, k, v, output gate, gates, out."""
        return self.d_model * self.heads * (2 * self.key + 3 * self.value + self.n_gates)

    def other_parameters(self) -> int:
        """Convolutions, biases of the gates, output norm, initial weights of the memory."""
        taps = self.halo + 1 if self.halo else 0
        per_head = taps * (2 * self.key + self.value) + self.n_gates + self.fast_weights
        return self.heads * per_head + self.value

    # --- arithmetic -------------------------------------------------------------------------------------------------------------

    def scan_flops(self) -> int:
        """One token's share of a chunk, forward: read and prediction 2 F each, the error taken back through the last layer, and the
        gradient's outer products once per part of the state; shifted reads read once more per chunk, token by token see `pair_flops`."""
        c = self.settings.chunk_size
        again = {"chunk_start": 0, "shifted": 2 * self.fast_weights // c, "token": self.pair_flops()}[self.settings.read]
        return self.heads * (2 * (2 + self.parts) * self.fast_weights + 2 * self.hidden * self.value + again)

    def pair_flops(self) -> int:
        """Of reading token by token, per token and head: momentum is read too; scores of a chunk's tokens, what they read, their weights
        from running sums of gates (twice each), with momentum a product of two triangles and what reaches from the chunk's start."""
        c, momentum = self.settings.chunk_size, self.parts - 1
        return 2 * momentum * self.fast_weights + 2 * c * (self.key + self.value) + 4 * c * self.parts + momentum * (2 * c * c + 2 * c)

    def flops_forward(self) -> int:
        """Per token, projections included."""
        return 2 * self.matmul_parameters() + self.scan_flops()

    def flops_backward(self) -> int:
        """Per token: the chunk once more, then two products for each of it; LaCT's loss does not look at the prediction."""
        unused = 2 * self.heads * self.hidden * self.value if self.settings.variant == "lact" and not self.settings.residual_norm else 0
        return 4 * self.matmul_parameters() + 3 * self.scan_flops() - 2 * unused

    # --- bytes ------------------------------------------------------------------------------------------------------------------

    def chunks(self, tokens: int) -> int:
        """Chunks of a row of which one rank holds ``tokens``; every rank keeps the states of all of them."""
        return -(-tokens * self.ranks // self.settings.chunk_size)

    def periods(self, tokens: int) -> int:
        """Reset periods of a row of which one rank holds ``tokens``."""
        return -(-tokens * self.ranks // self.settings.reset_every) if self.settings.reset_every else 1

    def inside(self, rows: int, tokens: int, e: int, w: int) -> int:
        """Kept besides the layer's input: projections of q, k, v, of the output gate and what the output projection reads (e); per head
        (w) q and k twice, v and the output once, four statistics, gates and what they come to, and the states before every chunk."""
        n, H, K, V, F, Z = rows * tokens, self.heads, self.key, self.value, self.fast_weights, self.parts
        delta = 1 if self.settings.variant == "yaad" else 0
        wide = 4 * K + 2 * V + 3 + self.n_gates + Z + delta + self.token_kept
        periods = self.periods(tokens)
        states = rows * H * F * (Z * (self.chunks(tokens) + periods) + (Z + 2) * periods)
        halo = rows * self.halo * H * (2 * K + V) * e
        return n * H * ((2 * K + 3 * V) * e + wide * w) + states * w + halo

    @property
    def token_kept(self) -> int:
        """Numbers per token and head kept for reading token by token: queries of M and S, what is read beside errors, gates of the chunk;
        keys, errors and gates of all ranks where there are several."""
        if self.settings.read != "token":
            return 0
        gathered = self.ranks * (self.key + self.value + self.parts + 2) if self.ranks > 1 else 0
        return self.parts * self.key + 2 * self.value + self.parts + 2 + gathered

    def saved_bytes(self, rows: int, tokens: int, itemsize: int, tile: int) -> int:
        """Everything kept from forward to backward, the input included; with tiles one state per tile, and where tokens are dealt what is
        dealt and what comes back."""
        w, n = max(itemsize, 4), rows * tokens
        if not 0 < tile < tokens:
            return n * self.d_model * itemsize + self.inside(rows, tokens, itemsize, w)
        return n * self.d_model * itemsize + self.between_tiles(rows, tokens, w, tile)

    def between_tiles(self, rows: int, tokens: int, w: int, tile: int) -> int:
        """Kept outside of tiles besides the input."""
        n, H, delta = rows * tokens, self.heads, 1 if self.settings.variant == "yaad" else 0
        tiles = -(-tokens // tile)
        if not self.split:
            return tiles * rows * self.state_elements * w
        dealt = n * H * (2 * self.key + 2 * self.value + self.n_gates + self.parts + delta) * w
        if self.settings.read == "token":
            dealt += n * H * (self.parts * self.key + (self.parts + 2) * (1 + (self.ranks if self.ranks > 1 else 0))) * w
        periods = self.periods(tokens)
        groups = min(tiles, -(-self.chunks(tokens) // periods))  # of chunks, all periods side by side
        return dealt + groups * periods * rows * self.state_elements * w

    def backward_inside(self, rows: int, tokens: int, e: int, w: int) -> int:
        """Made and freed by the backward pass: gradients of q, k, v and of what is dealt, the output's gradients beside its norm, and one
        chunk of all rows and heads: what its inside keeps, and gradients of it and of the state."""
        n, H, K, V, U = rows * tokens, self.heads, self.key, self.value, self.hidden
        tokenwise = n * H * (2 * (2 * K + V) + 2 * V + self.n_gates + self.parts) * w
        chunk = min(self.settings.chunk_size, tokens * self.ranks) // self.ranks
        of_chunk = rows * H * chunk * (8 * U * (2 if self.settings.architecture == "swiglu" else 1) + 4 * V + 2 * K * self.parts) * w
        states = rows * H * self.fast_weights * (4 * self.parts + 4) * w
        if self.settings.read == "token":  # pairs of a chunk's tokens: products of gates, weights, scores, and their gradients
            tokenwise += n * H * self.settings.chunk_size * (4 + 4 * self.parts) * w
        return tokenwise + of_chunk + states

    def exchange_bytes(self, rows: int, tokens: int, itemsize: int) -> int:
        """What a rank sends in one forward pass: its tokens dealt and the outputs returned, and one sum of updates per chunk."""
        if not self.split:
            return 0
        w = max(itemsize, 4)
        tokenwise = rows * tokens * (self.features + self.heads * self.value) * w
        sums = self.chunks(tokens) * self.heads * self.parts * self.fast_weights * w
        if self.settings.read == "token":
            tokenwise += rows * tokens * self.heads * (self.key + self.value + self.parts + 2) * w
        return tokenwise + rows * (sums + self.halo * self.d_model * itemsize)
