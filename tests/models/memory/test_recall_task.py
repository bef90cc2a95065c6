"""The task of benchmarks/memory_recall.py: it can be answered, only from the pairs, and only by who sees further than the windows."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.batch import IGNORE_INDEX
from models.config import ModelConfig
from models.transformer import Transformer, init_weights

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "memory_recall.py"


@pytest.fixture(scope="module")
def recall():
    spec = importlib.util.spec_from_file_location("memory_recall", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patched = pytest.MonkeyPatch()
    patched.setitem(sys.modules, "memory_recall", module)
    patched.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    yield module
    patched.undo()


def test_labels_are_the_values_of_the_keys_asked(recall):
    task = recall.TASK
    batch = task.examples(64, torch.Generator().manual_seed(0))
    for tokens, labels in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True):
        pairs = dict(zip(tokens[: 2 * task.pairs : 2], tokens[1 : 2 * task.pairs : 2], strict=True))
        assert len(pairs) == task.pairs
        asked = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        assert asked == list(range(task.tokens - task.queries, task.tokens))
        assert [labels[i] for i in asked] == [pairs[tokens[i]] for i in asked]
        values = range(task.keys, task.keys + task.values)
        assert not any(token in values for token in tokens[2 * task.pairs :])


def test_every_query_is_further_from_its_pair_than_the_windows_see(recall):
    task = recall.TASK
    first_query, last_value = task.tokens - task.queries, 2 * task.pairs - 1
    layers = len(recall.VARIANTS["swa"]["layers"])
    assert first_query - last_value > layers * (recall.WINDOW - 1)


def test_every_variant_is_a_model_of_the_same_width(recall):
    for settings in recall.VARIANTS.values():
        model = ModelConfig.model_validate({**recall.SHAPE, **settings})
        assert len(model.layer_kinds) == len(recall.VARIANTS["swa"]["layers"])


def test_runs_are_kept_and_those_of_other_settings_are_not_counted(recall, tmp_path):
    file = tmp_path / "runs.jsonl"
    one = {**recall.settings_of("swa"), "lr": 0.01, "seed": 0, "accuracy": 0.06}
    recall.Runs.read(file).add(one)
    recall.Runs.read(file).add({**one, "model": {"layers": ["swa"]}, "accuracy": 0.9})
    recall.Runs.read(file).add({**one, "curriculum": True, "accuracy": 0.9})
    kept = recall.Runs.read(file)
    assert len(kept.records) == 3 and kept.of("swa") == [one] and not kept.of("swa_grown")
    assert kept.has("swa", 0.01, 0) and not kept.has("swa", 0.01, 1)


def test_runs_of_another_protocol_are_refused(recall, tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps({"protocol": {"steps": 1}}) + "\n")
    with pytest.raises(ValueError, match="another protocol"):
        recall.Runs.read(file)


def test_a_curriculum_ends_with_the_whole_gap_and_only_its_variants_have_one(recall):
    draws = torch.Generator().manual_seed(0)
    stages = recall.PROTOCOL["curriculum"]
    assert stages[-1][0] == 1.0 and [until for until, _ in stages] == sorted(until for until, _ in stages)
    assert {recall.drawn_gap("rmt", 0.1, draws) for _ in range(40)} == {0}
    assert {recall.drawn_gap("rmt", 1.0, draws) for _ in range(40)} == {0, 16, recall.TASK.gap}
    assert {recall.drawn_gap("swa", share, draws) for share in (0.01, 0.3, 1.0)} == {recall.TASK.gap}
    assert set(recall.GROWN) <= set(recall.VARIANTS)


@pytest.mark.parametrize("variant", ["gated_deltanet", "titans_mac", "rmt", "armt", "slots", "neurocache"])
def test_emptied_memories_know_nothing_of_the_pairs(recall, variant):
    """The queries' outputs do not change with the values where their memory is emptied, and do where it is not."""
    model = Transformer(ModelConfig.model_validate({**recall.SHAPE, **recall.VARIANTS[variant]}), recall.TASK.vocab).double()
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("w_v") and not parameter.any():  # ARMT begins as a model without memory
            torch.nn.init.normal_(parameter)
    for forgotten in (True, False):
        batch = recall.TASK.examples(2, torch.Generator().manual_seed(1), forgotten)
        other = replace(batch, tokens_BT=batch.tokens_BT.clone())
        other.tokens_BT[:, 1 : 2 * recall.TASK.pairs : 2] = recall.TASK.keys
        one, two = (model.hidden(x)[:, -recall.TASK.queries :] for x in (batch, other))
        assert torch.equal(one, two) is forgotten
