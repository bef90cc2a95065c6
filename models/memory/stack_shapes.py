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
    summary: int = 0
    """Places of the run that makes a query before each segment; 0: none is made."""
    entries: int = 0
    """Of the cache that the query recalls from."""

    @staticmethod
    def of(config: ModelConfig) -> StackShapes:
        """Of a model whose memory stands around its stack."""
        D, d, own = config.attention_head_dim, config.d_model, getattr(config.memory, config.memory.kind)
        layers = len(config.layer_kinds)
        windows = tuple(config.window if kind == "swa" else None for kind in config.layer_kinds)
        stack = (d, config.n_heads * D, config.kv_heads * D, config.n_heads, D, config.ff_width, windows, own.segment)
        if config.memory.kind == "armt":
            features = 2 * own.key_dim * own.features
            parameters = own.tokens * d + layers * d * (2 * own.key_dim + d + 2)
            return StackShapes(*stack, own.tokens, layers * features * (d + 1), parameters, own.key_dim, features)
        if config.memory.kind == "hmt":
            state = own.cache * (d + 1) + max(own.summary_tokens, own.sensory) * d
            summary = own.summary_tokens + 2
            return StackShapes(*stack, own.sensory + 2, state, 3 * d + 2 * d * d, summary=summary, entries=own.cache)
        return StackShapes(*stack, 2 * own.tokens, own.tokens * d, (own.tokens + 1) * d)

    @property
    def layers(self) -> int:
        """Of the stack."""
        return len(self.windows)

    def _segments(self, tokens: int) -> list[int]:
        """Places of each segment of a row."""
        whole, rest = divmod(tokens, self.size)
        return [self.size + self.around] * whole + ([rest + self.around] if rest else [])

    def _runs(self, tokens: int) -> list[int]:
        """Places of each run of the layers."""
        segments = self._segments(tokens)
        return segments + [self.summary] * (len(segments) if self.summary else 0)

    def _score_flops(self, tokens: int) -> float:
        """Two products per key that a place sees, of all layers and segments."""
        keys = 0
        for X in self._runs(tokens):
            for window in self.windows:
                full = min(window or X, X)
                keys += full * (full + 1) // 2 + (X - full) * full
        return 4 * self.query_width * keys

    def flops_forward(self, tokens: int) -> float:
        """Of a row."""
        projected = self.d_model * (2 * self.query_width + 2 * self.key_width + 3 * self.ff_width)
        dense = 2 * self.layers * projected * sum(self._runs(tokens))
        recalled = len(self._segments(tokens)) * self._recall_flops()
        return dense + self._score_flops(tokens) + self._queries(tokens) + self._associative(tokens) + recalled

    def flops_backward(self, tokens: int) -> float:
        """Of a row: twice the products; five for two of the scores' size; what is read and written once more."""
        return 2 * self.flops_forward(tokens) + self._score_flops(tokens) / 2 + self._associative(tokens)

    def _recall_flops(self) -> float:
        """Query and key of every entry are projections; scores, and the sum of the entries."""
        return 2 * self.d_model * ((self.entries + 1) * self.d_model + 2 * self.entries) if self.entries else 0.0

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
        places = rows * sum(self._runs(tokens))
        tables = 2 * w * (self.head_dim // 2) * rows * (self.size + self.around + self.summary)  # one for all whole segments
        written = rows * len(segments) * self.around // 2 * w  # statistics of the norm
        if self.key_dim:  # states, and the memory tokens that were written
            written = rows * len(segments) * (self.state_elements + self.layers * self.around * self.d_model) * w
        if self.entries:  # the cache before each segment, and its keys
            written = rows * len(segments) * 2 * self.entries * self.d_model * w
        return outside + places * self.layers * self.place_bytes(e, w) + places * self.d_model * e + tables + written
