"""What a memory around the stack and the layers inside it cost, from shapes. Plain integers, imports no torch.

Legend: n tokens that the layers see, of all rows, e bytes of a computed value, w of a wide one, d width of the stream, F feed-forward
width, X places of a segment: its tokens and the memory's.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig


@dataclass(frozen=True)
class StackShapes:
    """Attention layers and feed-forwards on segments of ``size`` tokens with ``around`` places for the memory."""

    d_model: int
    query_width: int
    key_width: int
    heads: int
    head_dim: int
    ff_width: int
    windows: tuple[int | None, ...]
    """Of each layer; None: the whole segment."""
    size: int
    around: int
    state_elements: int
    """Numbers that go from segment to segment, per row."""
    parameters: int
    """Of the memory."""
    key_dim: int = 0
    """Of the memory of every layer; 0: layers have none."""
    features: int = 0
    """F, rows of that memory."""

    @staticmethod
    def of(config: ModelConfig) -> StackShapes:
        """Of a model whose memory stands around its stack."""
        D, d, own = config.attention_head_dim, config.d_model, getattr(config.memory, config.memory.kind)
        layers, key, around = len(config.layer_kinds), 0, 2 * own.tokens
        state, parameters, features = own.tokens * d, (own.tokens + 1) * d, 0
        if config.memory.kind == "armt":
            key, around, features = own.key_dim, own.tokens, 2 * own.key_dim * own.features
            state, parameters = layers * features * (d + 1), own.tokens * d + layers * d * (2 * key + d + 2)
        windows = tuple(config.window if kind == "swa" else None for kind in config.layer_kinds)
        widths = (d, config.n_heads * D, config.kv_heads * D, config.n_heads, D, config.ff_width)
        return StackShapes(*widths, windows, own.segment, around, state, parameters, key, features)

    @property
    def layers(self) -> int:
        """Of the stack."""
        return len(self.windows)

    def _segments(self, tokens: int) -> list[int]:
        """Places of each segment of a row."""
        whole, rest = divmod(tokens, self.size)
        return [self.size + self.around] * whole + ([rest + self.around] if rest else [])

    def _score_flops(self, tokens: int) -> float:
        """Two products per key that a place sees, of all layers and segments."""
        keys = 0
        for X in self._segments(tokens):
            for window in self.windows:
                full = min(window or X, X)
                keys += full * (full + 1) // 2 + (X - full) * full
        return 4 * self.query_width * keys

    def flops_forward(self, tokens: int) -> float:
        """Of a row."""
        projected = self.d_model * (2 * self.query_width + 2 * self.key_width + 3 * self.ff_width)
        dense = 2 * self.layers * projected * sum(self._segments(tokens))
        return dense + self._score_flops(tokens) + self._queries(tokens) + self._associative(tokens)

    def flops_backward(self, tokens: int) -> float:
        """Of a row: twice the products; five for two of the scores' size; what is read and written once more."""
        return 2 * self.flops_forward(tokens) + self._score_flops(tokens) / 2 + self._associative(tokens)

    def _queries(self, tokens: int) -> float:
        return 2 * self.layers * self.d_model * self.key_dim * sum(self._segments(tokens))

    def _associative(self, tokens: int) -> float:
        """Of the memories of all layers: read at every place; predicted and written at the memory tokens, whose key, value and gate are
        projections."""
        if not self.key_dim:
            return 0.0
        places, written = sum(self._segments(tokens)), len(self._segments(tokens)) * self.around
        read = 2 * self.features * (self.d_model + 1)
        return self.layers * (places * read + written * (2 * read + 2 * self.d_model * (self.key_dim + self.d_model + 1)))

    def place_bytes(self, e: int, w: int) -> int:
        """Kept of one place by one layer: both streams and what their norms gave, q, k, v, attention's output, gate, up and their product;
        two statistics and attention's."""
        memory = self.d_model + self.key_dim if self.key_dim else 0  # what was read with, and the stream before
        return e * (memory + 4 * self.d_model + 2 * self.query_width + 2 * self.key_width + 3 * self.ff_width) + w * (2 + self.heads)

    def saved_bytes(self, rows: int, tokens: int, e: int, w: int, replayed: bool) -> int:
        """Kept from forward to backward, the input included. Replayed: states at the segments' borders."""
        segments = self._segments(tokens)
        outside = rows * tokens * self.d_model * e
        if replayed:
            waiting = rows * self.size * self.d_model * w  # tokens that came with the state
            return outside + waiting + rows * len(segments) * self.state_elements * w
        places = rows * sum(segments)
        tables = 2 * w * (self.head_dim // 2) * rows * (self.size + self.around)  # one for all whole segments
        written = rows * len(segments) * self.around // 2 * w  # statistics of the norm
        if self.key_dim:  # states, and the memory tokens that were written
            written = rows * len(segments) * (self.state_elements + self.layers * self.around * self.d_model) * w
        return outside + places * self.layers * self.place_bytes(e, w) + places * self.d_model * e + tables + written
