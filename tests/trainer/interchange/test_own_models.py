"""Models that no family describes: exported with their code, loaded where this product cannot be imported, and imported again."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.config import ModelConfig
from models.flops import parameter_count
from models.int8_weight import stored
from models.memory.protocol import BUILDERS
from tests.trainer.interchange.hf_models import batch_of, tokens
from trainer import config_file
from trainer.build import build_model
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.data.tokenizers import ByteTokenizer, load_tokenizer
from trainer.initial_weights import fill_from
from trainer.interchange.bundle import model_sources
from trainer.interchange.byte_tokenizer import tokenizer_files
from trainer.interchange.exporting import export_model
from trainer.interchange.families import family_of
from trainer.interchange.importing import import_model
from trainer.run_dir import RunDir

CPU = torch.device("cpu")
MODEL = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "window": 9, "vocab_size": 320, "layers": ["full", "swa", "memory"]}


def run_of(folder: Path, steps: tuple[int, ...] = (3,), **changes) -> tuple[RunConfig, RunDir, torch.nn.Module]:
    """A run directory with checkpoints of other weights each; the model of the last."""
    values = {"model": {**MODEL, "memory": {"chunk_size": 16}}, "train": {"device": "cpu"}}
    for section, own in changes.items():
        values[section] = {**values.get(section, {}), **own}
    config, run_dir = RunConfig.model_validate(values), RunDir(folder)
    run_dir.create()
    run_dir.config.write_text(config_file.dump(config))
    assert config.model.vocab_size is not None
    model = build_model(config, config.model.vocab_size, None, CPU)
    for step in steps:
        with torch.no_grad():
            model.norm.weight.fill_(step)
        state = {name: stored(parameter) for name, parameter in model.named_parameters()}
        CheckpointManager(run_dir, config.checkpoint).save(step, {"model": state, "train": {"step": step}})
    return config, run_dir, model


def test_a_memory_model_loads_where_this_product_is_not(tmp_path):
    pytest.importorskip("transformers")
    wanted = {}
    tied = {
        "tie_embeddings": True,
        "qkv_bias": True,
        "qk_norm": True,
        "layers": ["memory", "full"],
        "rope": {"scaling": "ntk", "factor": 2.0},
    }
    models = {"memory": {}, "tied": {"model": tied}}
    for name, changes in models.items():
        _, run_dir, model = run_of(tmp_path / f"{name}_run", **changes)
        done = export_model(run_dir, tmp_path / name)
        assert done.family == "longstride"
        ids = tokens()
        torch.save(ids, tmp_path / f"{name}.ids")
        head = model.embed if model.head is None else model.head
        wanted[name] = (
            (model.hidden(batch_of(ids)) @ head.weight.t()).detach(),
            float(model(batch_of(ids)).detach().sum() / (ids.numel() - len(ids))),
        )
    script = Path(__file__).parent / "load_elsewhere.py"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, (logits, loss)), found in zip(wanted.items(), json.loads((tmp_path / "found.json").read_text()), strict=True):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.logits"), logits, rtol=0, atol=1e-6)
        assert found.pop("loss") == pytest.approx(loss, abs=1e-5)
        assert max(found.pop("left padding"), found.pop("right padding"), found.pop("batch")) < 1e-5
        assert found == {"tokens": [195, 169], "generated": True, "gradients": True, "bf16": ["torch.bfloat16", True], "saved again": True}


def test_back_and_forth_bit_for_bit(tmp_path):
    config, run_dir, model = run_of(tmp_path / "run", (2, 7))
    export_model(run_dir, tmp_path / "out", shard_bytes=20_000)
    read = import_model(tmp_path / "out", tmp_path / "in", RunConfig(), lambda line: None)
    assert read.model == config.model.model_copy(update={"layers": read.model.layers, "n_layers": read.model.n_layers})
    again = build_model(
        read, 320, None, CPU, fill=lambda m: fill_from(str(tmp_path / "in"), m, CheckpointManager(RunDir(tmp_path), read.checkpoint))
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    # Another step, by number.
    export_model(run_dir, tmp_path / "earlier", step=2)
    import_model(tmp_path / "earlier", tmp_path / "in2", RunConfig(), lambda line: None)
    fill_from(str(tmp_path / "in2"), again, CheckpointManager(RunDir(tmp_path), read.checkpoint))
    assert float(again.norm.weight.detach()[0]) == 2


def test_weights_in_eight_bits_leave_as_numbers_and_begin_other_runs(tmp_path):
    config, run_dir, model = run_of(
        tmp_path / "run", train={"precision": "bf16"}, optim={"preset": "q_galore"}, model={"layers": ["full"], "d_model": 64}
    )
    values = {name: parameter.detach().to(torch.float32) for name, parameter in model.named_parameters()}
    assert any(parameter.dtype == torch.uint8 for parameter in map(stored, model.parameters()))
    plain = RunConfig.model_validate({**config.model_dump(), "optim": {}, "train": {"device": "cpu"}})
    filled = build_model(
        plain, 320, None, CPU, fill=lambda m: fill_from(str(run_dir.path), m, CheckpointManager(run_dir, plain.checkpoint))
    )
    assert all(torch.equal(parameter, values[name]) for name, parameter in filled.named_parameters())
    # And back into eight bits: the nearest codes of what were codes.
    same = build_model(config, 320, None, CPU, fill=lambda m: fill_from(str(run_dir.path), m, CheckpointManager(run_dir, plain.checkpoint)))
    assert all(torch.allclose(p.detach().to(torch.float32), values[name], rtol=0, atol=1e-6) for name, p in same.named_parameters())
    export_model(run_dir, tmp_path / "out")
    read = import_model(tmp_path / "out", tmp_path / "in", RunConfig(), lambda line: None)
    assert family_of(read.model) == "llama"
    refilled = build_model(
        plain, 320, None, CPU, fill=lambda m: fill_from(str(tmp_path / "in"), m, CheckpointManager(run_dir, plain.checkpoint))
    )
    assert all(torch.equal(parameter, values[name].to(parameter.dtype)) for name, parameter in refilled.named_parameters())


def test_the_sources_hold_every_memory_architecture_and_nothing_of_this_product_by_name():
    sources = model_sources()
    for module in BUILDERS.values():
        flat = "longstride_" + module.removeprefix("models.").replace(".", "_")
        assert f"{flat}.py" in sources and f"from .{flat} import build" in sources["modeling_longstride.py"]
    for source in sources.values():
        tree = ast.parse(source)
        tried = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        nodes = [node for node in ast.walk(tree) if node not in tried]
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name.partition(".")[0] for name in named} <= {"torch", "numpy", "transformers", "pydantic", *sys.stdlib_module_names}
        assert '"models.' not in source


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_the_byte_tokenizer_leaves_with_the_same_ids(text, tmp_path):
    for name, content in tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    theirs, own = load_tokenizer(str(tmp_path)), ByteTokenizer()
    assert theirs.encode_batch([text])[0].tolist() == own.encode_batch([text])[0].tolist()
    assert (theirs.vocab_size, theirs.eos_id) == (own.vocab_size, own.eos_id)
    assert theirs.decode(own.encode_batch([text])[0].tolist()) == text


def test_the_model_is_counted_as_before():
    config = ModelConfig.model_validate(MODEL)
    assert config.qkv_bias is config.qk_norm is False
    more = config.model_copy(update={"qkv_bias": True, "qk_norm": True})
    heads = (4 + 2 * 2) * 8 + 2 * 8
    assert parameter_count(more, 320).total - parameter_count(config, 320).total == 2 * heads
    assert parameter_count(more, 320).matmul == parameter_count(config, 320).matmul


def test_a_run_on_ids_leaves_without_a_tokenizer(tmp_path):
    """Its ids are no bytes: what would decode them as text is not written."""
    data = {"source": "synthetic/mqar", "seq_len": 64, "synthetic": {"keys": 40, "values": 30, "fillers": 10}}
    _, run_dir, _ = run_of(tmp_path / "run", data=data)
    export_model(run_dir, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*token*.json"))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["eos_token_id"] == content["pad_token_id"] == 80 and content["vocab_size"] == 320
