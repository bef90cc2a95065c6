"""What cannot be imported, exported or begun from is refused by file and key, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longstride import main
from models.errors import UserError
from tests.trainer.interchange.hf_models import make, save
from trainer.build import build_model
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.initial_weights import check_init_from, fill_from
from trainer.interchange.exporting import export_model
from trainer.interchange.importing import import_model
from trainer.interchange.safetensors_files import open_weights
from trainer.run_dir import RunDir

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("qwen2"), tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def source(model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def refused(source: Path, *parts: str) -> None:
    """The import is refused in at most two lines that say all of ``parts``; nothing was made."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError) as caught:
        import_model(source, source.parent / "in", RunConfig(), lambda line: None)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 2
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"model_type": "llama", "attention_bias": True}, ["attention_bias True"]),
        ({"model_type": "llama", "mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act gelu", '"silu"']),
        ({"attention_dropout": 0.1}, ["attention_dropout 0.1", "0.0"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config is set"]),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, ["auto_map", "not run"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["longrope"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "new": 1}}, ["'new' is not known"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["linear", "'factor'"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_parameters": [1]}, ["config.json"]),
        ({"layer_types": ["linear_attention", "full_attention"]}, ["layer_types", "linear_attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "1 entries for 2 layers"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "no window"]),
        ({"hidden_size": "32"}, ["hidden_size", '"32"']),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"num_attention_heads": 3, "head_dim": 8}, ["n_heads 3 is not a multiple"]),
        ({"rms_norm_eps": "small"}, ["config.json"]),
        ({"hidden_size": 64}, ["shape (97, 32)", "describes (97, 64)", "model.embed_tokens.weight"]),
        ({"num_hidden_layers": 3, "layer_types": None}, ["no file holds 'model.layers.2.", "blocks.2."]),
        ({"num_hidden_layers": 1, "layer_types": None}, ["holds 'model.layers.1.", "does not describe"]),
        ({"model_type": "llama"}, ["holds 'model.layers.0.self_attn.k_proj.bias' (6 such)"]),
        ({"tie_word_embeddings": True}, ["'lm_head.weight' differs"]),
        ({"model_type": "longstride", "longstride": "x"}, ["config.json"]),
        ({"model_type": "longstride", "longstride": {"layers": ["unknown"]}}, ["model.layers.0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_settings_that_cannot_be_followed(source, changes, parts):
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(source, *parts)


def test_pickles_are_refused_by_name_and_not_opened(source, tmp_path):
    (source / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    refused(source, "pytorch_model.bin", "not opened", "safe_serialization=True")
    assert not (tmp_path / "executed").exists()
    (source / "pytorch_model.bin").unlink()
    refused(source, "holds neither model.safetensors nor")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda data: data[:-1], "is "),
        (lambda data: data + b"x", "copy it again"),
        (lambda data: data[:100], "cut short"),
        (lambda data: data[:4], "cut short"),
        (lambda data: b"", "cut short"),
        (lambda data: (1 << 60).to_bytes(8, "little") + data[8:], "cut short"),
        (lambda data: data[:8] + b"x" + data[9:], "JSON"),
        (lambda data: data.replace(b'"F32"', b'"I32"', 1), "I32"),
        (lambda data: data.replace(b'"F32"', b'"F64"', 1), "nothing sensible"),
        (lambda data: data.replace(b'"data_offsets":[', b'"data_offsets":{', 1), "JSON"),
    ],
)
def test_damaged_files(source, spoil, part):
    file = source / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    refused(source, str(file), part)


def test_an_index_that_leads_elsewhere(source, tmp_path):
    data = (source / "model.safetensors").read_bytes()
    (tmp_path / "outside.safetensors").write_bytes(data)
    (source / "model.safetensors").unlink()
    names = open_weights_of(data, tmp_path)
    index = source / "model.safetensors.index.json"
    for place, part in (
        ("../outside.safetensors", "not a file of its folder"),
        ("absent.safetensors", "cannot be read"),
        (3, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
        refused(source, part)
    (source / "a.safetensors").write_bytes(data)
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "a.safetensors"), "more": "a.safetensors"}}))
    refused(source, "a.safetensors: has no 'more'")


def open_weights_of(data: bytes, folder: Path) -> list[str]:
    place = folder / "names"
    place.mkdir()
    (place / "model.safetensors").write_bytes(data)
    return open_weights(place).names


def test_targets_and_sources_on_the_command_line(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def says(arguments: list[str], *parts: str) -> None:
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert all(part in told for part in parts), told
        assert len(told.splitlines()) <= 2

    says(["import", "meta-llama/Llama-3.1-8B", "in"], "no such directory", "hf download")
    says(["import", "hf", "in", "model.d_model=64"], "model.d_model=64", "imported model")
    says(["import", "hf", "in", "data.seq_len=x"], "data.seq_len")
    assert main(["import", "hf", "in"]) == 0
    capsys.readouterr()
    says(["import", "hf", "in"], "nothing is overwritten")
    says(["export", "in", "hf"], "nothing is overwritten")
    says(["export", "in", "out", "--step", "4"], "step_00000004 does not exist", "checkpoints of this run: 0")
    says(["export", "absent", "out"], "no run 'absent'")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    says(["train", "in/config.yaml", "train.init_from=absent", "model.vocab_size=300"], "train.init_from: absent holds no checkpoint")
    says(["train", "in/config.yaml", "train.init_from=hf", "model.vocab_size=300"], "longstride import hf DIR")
    says(
        ["train", "in/config.yaml", "model.vocab_size=300", "model.d_ff=80"],
        "train.init_from",
        "w_down.weight",
        "(32, 40) in it and (32, 80)",
        "(and ",
    )
    says(["train", "in/config.yaml", "model.vocab_size=300", "model.qkv_bias=false"], "mixer.wk.bias' is in it but not in this model")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()
    shard = next((tmp_path / "in" / "checkpoints" / "step_00000000").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    says(["export", "in", "out"], "SHA-256 differs")
    assert not (tmp_path / "out").exists()


def test_a_damaged_beginning_is_found_before_it_is_used(source, tmp_path):
    config = import_model(source, tmp_path / "in", RunConfig(), lambda line: None)
    check_init_from(config, 97)
    shard = next((tmp_path / "in" / "checkpoints" / "step_00000000").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    checkpoints = CheckpointManager(RunDir(tmp_path), config.checkpoint)
    with pytest.raises(UserError, match=r"train.init_from.*bytes, the manifest says"):
        build_model(config, 97, None, torch.device("cpu"), fill=lambda model: fill_from(str(tmp_path / "in"), model, checkpoints))


def test_numbers_beyond_half_precision(tmp_path):
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    import_model(save(model, tmp_path / "hf"), tmp_path / "in", RunConfig(), lambda line: None)
    with pytest.raises(UserError, match=r"model.norm.weight.*1e\+05.*use bf16"):
        export_model(RunDir(tmp_path / "in"), tmp_path / "out", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "in"]
