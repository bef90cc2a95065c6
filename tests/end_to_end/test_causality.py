"""Editing token t changes nothing before t and nothing in any other document, exactly, whoever holds the tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from models.batch import IGNORE_INDEX, Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from parallel.config import SequenceScheme
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh
from parallel.parallelize import split_sequence
from parallel.sequence import ranges_for, shard_batch
from tests.distributed import run_on_kept_ranks as run_distributed

SEQ_LEN = 72
DOCUMENTS = (0, 5, 29, 30, 55)
EDITED = (0, 4, 17, 29, 36, 54, 71)
VOCAB = 64


def model_config(layers: tuple[str, ...]) -> ModelConfig:
    return ModelConfig.model_validate(
        {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "layers": layers, "n_layers": 2, "window": 7, "memory": {"chunk_size": 8}}
    )


def batch(edited: int | None) -> Batch:
    """One row of packed documents; ``edited``: index of the token that differs."""
    tokens_BT = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    if edited is not None:
        tokens_BT[0, edited] = (tokens_BT[0, edited] + 1) % VOCAB
    positions_BT = torch.tensor([[i - max(d for d in DOCUMENTS if d <= i) for i in range(SEQ_LEN)]])
    labels_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
    return Batch(tokens_BT, labels_BT, positions_BT, Bounds(SEQ_LEN, ((0, SEQ_LEN),), (DOCUMENTS,)))


def slow_decay(model: Transformer) -> None:
    """Make memories forget almost nothing: with fast decay a leak could hide below the rounding."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.constant_(parameter, -6.0)


def hidden_states(
    layers: tuple[str, ...], layout: str, scheme: SequenceScheme = "ring", ulysses: int = 1
) -> dict[int | None, torch.Tensor]:
    """Outputs [T, C] of the whole sequence for the original and each edited sequence, gathered over the ranks."""
    model = Transformer(model_config(layers), VOCAB).double()
    init_weights(model, seed=0)
    slow_decay(model)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size > 1:
        split_sequence(model, build_mesh(ParallelDims(cp=world_size, ulysses=ulysses), "cpu"), layout, scheme)  # type: ignore[arg-type]
    outputs: dict[int | None, torch.Tensor] = {}
    for edited in (None, *EDITED):
        whole_TC = torch.zeros(SEQ_LEN, 16, dtype=torch.float64)
        cp_rank = dist.get_rank() if world_size > 1 else 0
        ranges = ranges_for(layout, SEQ_LEN, cp_rank, world_size)  # type: ignore[arg-type]
        shard = shard_batch(batch(edited), layout, cp_rank, world_size) if world_size > 1 else batch(edited)  # type: ignore[arg-type]
        with torch.no_grad():
            local_TC = model.hidden(shard)[0]
        offset = 0
        for start, end in ranges:
            whole_TC[start:end] = local_TC[offset : offset + end - start]
            offset += end - start
        if world_size > 1:
            dist.all_reduce(whole_TC)
        outputs[edited] = whole_TC
    return outputs


def check(outputs: dict[int | None, torch.Tensor]) -> None:
    original = outputs[None]
    for edited in EDITED:
        changed = (outputs[edited] != original).any(-1)
        start = max(d for d in DOCUMENTS if d <= edited)
        end = min([d for d in DOCUMENTS if d > edited], default=SEQ_LEN)
        assert changed[edited], f"token {edited} does not even change its own output"
        assert not changed[:edited].any(), f"editing token {edited} changed earlier outputs {changed[:edited].nonzero().flatten().tolist()}"
        assert not changed[end:].any(), f"editing token {edited} leaked out of document [{start}, {end})"


LAYERS = [("full",), ("swa",), ("memory",), ("full", "memory"), ("swa", "memory")]


@pytest.mark.parametrize("layers", LAYERS)
def test_one_rank(layers: tuple[str, ...]) -> None:
    check(hidden_states(layers, "contiguous"))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("world_size", "layout"), [(2, "contiguous"), (3, "zigzag"), (4, "contiguous"), (4, "zigzag")])
def test_across_ranks(layers: tuple[str, ...], world_size: int, layout: str) -> None:
    if layout == "zigzag" and SEQ_LEN % (2 * world_size):
        pytest.fail("choose a length the layout can split")
    alone = hidden_states(layers, layout)
    for outputs in run_distributed(hidden_states, world_size, layers, layout):
        check(outputs)
        torch.testing.assert_close(outputs[None], alone[None], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("scheme", "ulysses", "world_size", "layout"),
    [
        ("ulysses", 4, 4, "contiguous"),
        ("ulysses", 3, 3, "zigzag"),
        ("ring_x_ulysses", 2, 4, "zigzag"),
        ("ring_x_ulysses", 2, 4, "contiguous"),
        ("allgather_kv", 1, 4, "zigzag"),
    ],
)
def test_under_every_scheme(scheme: SequenceScheme, ulysses: int, world_size: int, layout: str) -> None:
    layers = ("full", "memory")
    alone = hidden_states(layers, layout)
    for outputs in run_distributed(hidden_states, world_size, layers, layout, scheme, ulysses):
        check(outputs)
        torch.testing.assert_close(outputs[None], alone[None], rtol=1e-10, atol=1e-10)
