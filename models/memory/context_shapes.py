"""What follows from the shapes of a layer whose memory is read as context (MAC). Plain integers, imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig
from models.memory.attached_shapes import attention_small
from models.memory.titans_shapes import TitansShapes


@dataclass(frozen=True)
class ContextShapes:
    """One layer of ``model.memory.attach: mac``."""

    titans: TitansShapes
    query_width: int
    key_width: int
    heads: int
    segment: int
    persistent: int
    small: int = 0
    """Biases of attention's projections and weights of its heads' norms."""

    @staticmethod
    def of(config: ModelConfig) -> ContextShapes:
        """Of a model's memory layers."""
        size, mac = config.attention_head_dim, config.memory.mac
        settings = config.memory.titans.model_copy(update={"chunk_size": mac.segment})
        titans = TitansShapes.of(config.model_copy(update={"memory": config.memory.model_copy(update={"titans": settings})}))
        return ContextShapes(
            titans, config.n_heads * size, config.kv_heads * size, config.n_heads, mac.segment, mac.persistent, attention_small(config)
        )

    @property
    def state_elements(self) -> int:
        """Numbers of the memory carried per row: weights and momentum."""
        return self.titans.heads * self.titans.parts * self.titans.fast_weights

    def matmul_parameters(self) -> int:
        """Attention's four; the memory's q, k, v and gates; from the memory's heads to context and to the output's gate; out."""
        t = self.titans
        attention = t.d_model * 2 * (self.query_width + self.key_width)
        memory = t.d_model * t.heads * (2 * t.key + t.value + t.n_gates) + 2 * t.heads * t.value * t.d_model
        return attention + memory + t.d_model * t.d_model

    def other_parameters(self) -> int:
        """As of the memory; two norms and the persistent tokens."""
        return self.titans.other_parameters() + (2 + self.persistent) * self.titans.d_model + self.small

    def mixing_flops(self, tokens: int) -> float:
        """Forward, per token, outside projections of own parameters: attention within the segment, keys and values of what the memory had
        and of persistent tokens, one more query projection and read of the memory, and the memory's scan."""
        t, c = self.titans, min(self.segment, tokens)
        again = 2 * t.d_model * t.heads * t.key + 2 * t.heads * t.fast_weights
        beside = 4 * t.d_model * self.key_width * (tokens + self.persistent * -(-tokens // self.segment)) / tokens
        return 4 * self.query_width * (2 * c + self.persistent) + beside + again + t.scan_flops()

    def flops_forward(self, tokens: int) -> float:
        """Per token, segments full."""
        return 2 * self.matmul_parameters() + self.mixing_flops(tokens)

    def flops_backward(self, tokens: int) -> float:
        """Per token: twice the forward pass, and the memory's chunk once more."""
        return 2 * self.flops_forward(tokens) + self.titans.scan_flops()

    def saved_bytes(self, rows: int, tokens: int, e: int, w: int, tiled: bool, ranks: int = 1) -> int:
        """Kept from forward to backward, the input included; with tiles the dealt input and one state per segment. ``tokens`` of each of
        ``ranks`` that share a sequence: keys and values of a whole segment, and the states of all, are on every one of them."""
        t, n, d, c = self.titans, rows * tokens, self.titans.d_model, min(self.segment, tokens * ranks)
        segments = -(-tokens * ranks // self.segment)
        state = rows * t.heads * t.fast_weights * w
        if tiled:
            periods = -(-tokens * ranks // t.settings.reset_every) if t.settings.reset_every else 1
            return n * 2 * d * e + (segments * t.parts + periods) * state
        K, V, H = t.key, t.value, t.heads
        keys = 2 * c + self.persistent
        attention = 3 * self.query_width + 2 * self.key_width * keys * ranks / c + d * keys / c
        network = (3 if t.settings.architecture == "swiglu" else 2) * t.hidden
        memory = H * ((3 * K + V) * e + (7 * K + 6 * V + network + 2 * t.n_gates + t.parts + 6) * w)
        statistics = self.heads * w  # scores are made again by the kernel
        sliced = keys + 3 * self.query_width // self.heads * w if ranks > 1 else 0  # a mask and tables of places for every segment
        kept = n * (attention * e + statistics + memory + (4 * d + 2 * H * V) * e + sliced)
        return int(kept + segments * state * (3 * t.parts + 2))

    def exchange_bytes(self, rows: int, tokens: int, e: int, w: int, ranks: int) -> int:
        """What a rank sends in one forward pass: tokens dealt and brought back, keys and values of what the memory had and of tokens, a
        convolution's halo twice, and one sum of updates per segment."""
        t, n = self.titans, rows * tokens
        segments = -(-tokens * ranks // self.segment)
        halos = 2 * rows * segments * t.halo * t.d_model * e
        return n * (2 * t.d_model + 4 * self.key_width) * e + halos + segments * rows * t.heads * t.parts * t.fast_weights * w
