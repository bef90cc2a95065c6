"""Prefixes from the data on: the same training on any mesh under every scheme, and nothing seen that a prefix does not show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.batch import Bounds
from models.transformer import Transformer, init_weights
from tests.distributed import run_distributed
from tests.end_to_end import test_causality as causality
from tests.end_to_end.test_parallel_equality import check, experiment, train_all, train_steps
from trainer.config import RunConfig
from trainer.step_trace import _batch

SCHEMES = [
    {"cp": 4, "layout": "zigzag"},
    {"cp": 4, "layout": "contiguous", "sequence": "ulysses", "head_chunk": 1},
    {"cp": 4, "layout": "zigzag", "sequence": "ring_x_ulysses", "ulysses": 2},
    {"cp": 4, "layout": "zigzag", "sequence": "double_ring", "ring_inner": 2},
    {"cp": 2, "dp_shard": 2, "layout": "zigzag", "sequence": "allgather_kv"},
    {"cp": 2, "dp_replicate": 2, "layout": "contiguous", "kv_residence": "host", "kv_chunk": 20},
    {"cp": 2, "tp": 2, "layout": "zigzag"},
]
LAYERS = [("full", "swa", "memory"), ("full", "swa", "full"), ("memory", "swa")]
"""The second for per_document, which knows no memory; the third with attention beside the memory."""
PREFIX_ENDS = (3, 20, 30, 30, 72)
"""Of ``causality.DOCUMENTS``: a short one, a long one, all of a document of one token, none, a whole document."""


def of_data(documents: tuple[str, str], layers: tuple[str, ...] = LAYERS[0], loss: bool = False, **parallel: object) -> RunConfig:
    values = experiment(*documents, "fp64", "auto", 1, 1, 1).model_dump()
    values["parallel"] |= parallel
    values["train"]["grad_accum"] = 4 // (values["parallel"]["dp_shard"] * values["parallel"]["dp_replicate"])
    values["model"]["layers"] = layers
    if layers[0] == "memory":
        values["model"]["memory"]["attach"] = "mag"
    values["data"] |= {"prefix_key": "prompt", "prefix_loss": loss}
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Documents shorter and longer than a sequence, with prefixes of no, some and all of them."""
    folder = tmp_path_factory.mktemp("documents")
    texts = ["alpha beta gamma delta " * n for n in (1, 2, 1, 3, 5, 1, 2, 1, 6, 1, 4, 2, 9, 1, 2, 7, 1, 3)]
    lines = [json.dumps({"text": text, "prompt": (0, 11, len(text), 30 % len(text))[i % 4]}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "a.jsonl"), str(folder / "cache")


def outputs_with_prefixes(layers: tuple[str, ...], prefixes: tuple[int, ...]) -> dict[int | None, torch.Tensor]:
    """h_TC for the original and for every edited sequence, on one rank."""
    model = Transformer(causality.model_config(layers), causality.VOCAB).double()
    init_weights(model, seed=0)
    causality.slow_decay(model)
    found: dict[int | None, torch.Tensor] = {}
    for edited in (None, *range(causality.SEQ_LEN)):
        one = causality.batch(edited)
        bounds = Bounds(one.bounds.seq_len, one.bounds.ranges, one.bounds.documents, (prefixes,))
        with torch.no_grad():
            found[edited] = model.hidden(type(one)(one.tokens_BT, one.labels_BT, one.positions_BT, bounds))[0]
    return found


@pytest.mark.parametrize("layers", [("full",), ("swa",), ("memory",), ("full", "memory"), ("swa", "memory")])
def test_a_prefix_is_seen_from_before_it_ends_and_nothing_else_is(layers: tuple[str, ...]) -> None:
    found = outputs_with_prefixes(layers, PREFIX_ENDS)
    for edited in range(causality.SEQ_LEN):
        changed = (found[edited] != found[None]).any(-1)
        number = max(i for i, start in enumerate(causality.DOCUMENTS) if start <= edited)
        start, end = (*causality.DOCUMENTS, causality.SEQ_LEN)[number : number + 2]
        first = start if edited < PREFIX_ENDS[number] and layers != ("memory",) else edited
        assert changed[edited]
        assert not changed[:first].any() and not changed[end:].any(), f"token {edited} is seen from outside [{first}, {end})"
        if layers == ("full",):
            assert changed[first:end].all(), f"token {edited} is not seen from all of [{first}, {end})"
    if layers == ("memory",):
        assert torch.equal(found[None], outputs_with_prefixes(layers, causality.DOCUMENTS)[None]), "a memory reads in one direction"


def test_same_training_on_any_mesh_under_every_scheme(documents: tuple[str, str]) -> None:
    cases = [(LAYERS[0], False, scheme) for scheme in SCHEMES]
    cases += [(LAYERS[0], True, SCHEMES[0]), (LAYERS[1], False, {"cp": 4, "layout": "per_document"})]
    cases += [(LAYERS[2], False, {"cp": 4, "layout": "contiguous"})]
    answers = run_distributed(train_all, 4, [of_data(documents, layers, loss, **scheme) for layers, loss, scheme in cases], 2)
    alone = {(layers, loss): train_steps(of_data(documents, layers, loss), 2) for layers, loss, _ in cases}
    for rank in answers:
        for (layers, loss, _), found in zip(cases, rank, strict=True):
            check("fp64", found, *alone[layers, loss])
    values = of_data(documents).model_dump()
    causal = train_steps(RunConfig.model_validate({**values, "data": {**values["data"], "prefix_mask": "causal"}}), 1)
    assert abs(causal[0][0] - alone[LAYERS[0], False][0][0]) > 1e-6, "the mask is seen in the loss"
    assert alone[LAYERS[0], True][0][0] != alone[LAYERS[0], False][0][0], "so are the labels"


def test_a_traced_step_has_a_prefix(documents: tuple[str, str], tmp_path: Path) -> None:
    config = of_data(documents)
    assert _batch(config, 96).bounds.prefixes == ((48,),)
    values = config.model_dump()
    causal = RunConfig.model_validate({**values, "data": {**values["data"], "prefix_mask": "causal"}})
    assert _batch(causal, 96).bounds.prefixes == ()
