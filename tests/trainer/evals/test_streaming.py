"""Reading in chunks gives what the whole sequence at once gives, for every kind of layer; what is kept stays small or is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer, init_weights
from trainer.evals.streaming import StreamedModel

T, VOCAB = 61, 40
SMALL = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "window": 7}
MODELS: dict[str, dict[str, Any]] = {
    "window, all, tied": {"layers": ["swa", "full"], "tie_embeddings": True},
    "qk norm, bias": {"layers": ["full", "swa"], "qk_norm": True, "qkv_bias": True},
    "gated deltanet": {"layers": ["swa", "memory"], "memory": {"chunk_size": 8}},
    "gsa": {"layers": ["memory", "full"], "memory": {"kind": "gsa", "gsa": {"n_slots": 4}}},
    "mamba2": {"layers": ["memory", "swa"], "memory": {"kind": "mamba2", "chunk_size": 8, "mamba2": {"state_dim": 4, "expand": 1.0}}},
    "titans": {"layers": ["swa", "memory"], "memory": {"kind": "titans", "titans": {"chunk_size": 8}}},
    "titans, reset": {"layers": ["memory"], "memory": {"kind": "titans", "titans": {"chunk_size": 4, "reset_every": 12}}},
    "mag": {"layers": ["memory", "memory"], "memory": {"attach": "mag", "kind": "titans", "titans": {"chunk_size": 4}}},
    "mal": {"layers": ["memory", "memory"], "memory": {"attach": "mal", "chunk_size": 8}},
    "mac": {"layers": ["swa", "memory"], "memory": {"attach": "mac", "kind": "titans", "mac": {"segment": 8, "persistent": 2}}},
    "rmt": {"layers": ["full", "swa"], "memory": {"kind": "rmt", "rmt": {"segment": 9, "tokens": 2}}},
    "product keys": {
        "layers": ["swa"],
        "feedforward": ["product_keys"],
        "product_keys": {"n_keys": 4, "heads": 2, "top_k": 3, "key_dim": 4},
    },
}


def model_of(settings: dict[str, Any]) -> Transformer:
    torch.set_default_dtype(torch.float64)
    try:
        model = Transformer(ModelConfig.model_validate({**SMALL, **settings}), VOCAB)
    finally:
        torch.set_default_dtype(torch.float32)
    init_weights(model, 3)
    return model


def streamed(model: Transformer, chunk_tokens: int, kept_bytes: int = 2**30) -> StreamedModel:
    return StreamedModel(model, torch.device("cpu"), "fp64", kept_bytes, chunk_tokens)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_the_whole(name: str) -> None:
    model = model_of(MODELS[name])
    tokens = np.random.default_rng(0).integers(VOCAB, size=(2, T))
    labels = np.where(tokens % 3 == 0, -100, np.roll(tokens, -1, 1))
    positions = torch.arange(T).expand(2, T).contiguous()
    batch = Batch(torch.from_numpy(tokens), torch.from_numpy(labels), positions, Bounds.whole(2, T))
    with torch.no_grad():
        want, nll = model.hidden(batch), model(batch)
    for chunk_tokens in (2 * T, 2 * 24, 10):
        reader = streamed(model, chunk_tokens)
        parts = [part for _, _, part in reader.hidden(tokens)]
        assert len(parts) == -(-T // (max(1, chunk_tokens // 2 // reader.multiple) * reader.multiple))
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-12)
    found = torch.cat([part for _, _, part in streamed(model, 32).losses(tokens, labels)], 1)
    torch.testing.assert_close(found, nll, rtol=0, atol=1e-12)
    weight = model.embed.weight if model.head is None else model.head.weight
    at = [np.array([0, 5, 23, 24, 60]), np.array([47])]
    for row, found in enumerate(streamed(model, 16).predict(tokens, at)):
        assert found.tolist() == (want[row, at[row]] @ weight.t()).argmax(-1).tolist()


def test_the_model_is_left_as_it_was() -> None:
    """Also when the caller stops in the middle, or the second sequence begins."""
    model = model_of(MODELS["mag"])
    seams = [block.mixer.attention.inner_attention for block in model.blocks]  # type: ignore[union-attr]
    reader, tokens = streamed(model, 8), np.zeros((1, T), dtype=np.int64)
    first = [h for _, _, h in reader.hidden(tokens)]
    walk = reader.hidden(tokens)
    next(walk)
    walk.close()
    again = [h for _, _, h in reader.hidden(tokens)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "nothing of an earlier sequence is carried on"
    assert seams == [block.mixer.attention.inner_attention for block in model.blocks]  # type: ignore[union-attr]
    assert model.training and all(block.mixer.memory.carried is None for block in model.blocks)  # type: ignore[union-attr]


def test_keys_of_full_attention_are_refused_beyond_a_limit_and_windows_never_are() -> None:
    tokens = np.zeros((1, T), dtype=np.int64)
    per_token = 2 * 2 * 4 * 8  # keys and values, two heads of 4 in float64
    model = model_of(MODELS["window, all, tied"])
    assert streamed(model, 8, T * per_token).refused(T) is None
    tight = streamed(model, 8, T * per_token - 1)
    with pytest.raises(UserError, match=r"61 tokens: full attention \(layer 1\) would keep .*--kv-gib"):
        list(tight.hidden(tokens))
    assert streamed(model_of(MODELS["mal"]), 8, 0).refused(2**40) is None


def test_a_stack_that_hands_nothing_on_is_refused_by_name() -> None:
    model = model_of(MODELS["gated deltanet"])
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(UserError, match=r"layer 1 \(Identity\)"):
        streamed(model, 8)
