"""Tiny models of every family with random weights, as transformers makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.batch import IGNORE_INDEX, Batch, Bounds

VOCAB, TOKENS = 97, 48
SHAPES = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_hidden_layers": 2}),
    "llama_one_kv_head_each": ("Llama", {"num_hidden_layers": 1, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama_3": ("Llama", {"num_hidden_layers": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_linear": ("Llama", {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama_yarn": ("Llama", {"num_hidden_layers": 1, "head_dim": 16, "rope_parameters": YARN}),
    "llama_yarn_bands": (
        "Llama",
        {"num_hidden_layers": 1, "head_dim": 16, "rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.2}},
    ),
    "mistral": ("Mistral", {"num_hidden_layers": 2, "sliding_window": 11, "head_dim": 12}),
    "mistral_full": (
        "Mistral",
        {"num_hidden_layers": 2, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": ("Qwen2", {"num_hidden_layers": 2}),
    "qwen2_windows": (
        "Qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"num_hidden_layers": 2, "head_dim": 24}),
    "qwen3_windows": (
        "Qwen3",
        {"num_hidden_layers": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model in evaluation mode; every parameter is random, biases and norms too. ``changes``: of its settings."""
    import transformers

    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPES, **settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.05))
    return model.to(dtype)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """As a directory of safetensors."""
    model.save_pretrained(folder, **options)
    return folder


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def batch_of(tokens_BT: torch.Tensor) -> Batch:
    """The same prediction task that transformers makes of ``labels=tokens``."""
    rows, length = tokens_BT.shape
    labels = tokens_BT.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    return Batch(tokens_BT, labels, torch.arange(length).expand(rows, -1).contiguous(), Bounds.whole(rows, length))
