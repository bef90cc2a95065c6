"""Settings of a longstride model as transformers keeps them (``config.json``)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class LongstrideConfig(PretrainedConfig):
    """``longstride`` holds the model's own settings; the others are what tools of transformers look for."""

    model_type = "longstride"

    def __init__(
        self,
        longstride: dict[str, Any] | None = None,
        vocab_size: int = 320,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 1024,
        **kwargs: Any,
    ) -> None:
        self.longstride = longstride or {}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
