"""Models to and from transformers: the same logits, losses and bits."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

import longstride
from models.transformer import Transformer
from tests.trainer.interchange.hf_models import FAMILIES, batch_of, make, save, tokens
from trainer import config_file
from trainer.build import build_engine, build_model
from trainer.checkpoint import CheckpointManager
from trainer.config import RunConfig
from trainer.initial_weights import fill_from
from trainer.interchange.exporting import export_model
from trainer.interchange.importing import import_model
from trainer.run_dir import RunDir

transformers = pytest.importorskip("transformers")
BASE = RunConfig.model_validate({"train": {"device": "cpu"}, "data": {"seq_len": 48}})


def imported(source: Path, target: Path) -> RunConfig:
    return import_model(source, target, BASE, lambda line: None)


def filled(config: RunConfig, target: Path) -> Transformer:
    """The model as a run that begins from ``target`` has it."""
    checkpoints = CheckpointManager(RunDir(target), config.checkpoint)
    assert config.model.vocab_size is not None
    return build_model(
        config, config.model.vocab_size, None, torch.device("cpu"), fill=lambda model: fill_from(str(target), model, checkpoints)
    )


def logits_of(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    head = model.embed if model.head is None else model.head
    return model.hidden(batch_of(tokens_BT)) @ head.weight.t()


def back(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_both_ways(name, tmp_path):
    theirs = make(name)
    # Some as one file, some as several with an index.
    save(theirs, tmp_path / "hf", **({"max_shard_size": "12KB"} if len(name) % 2 else {}))
    config = imported(tmp_path / "hf", tmp_path / "in")
    ids = tokens()
    with torch.no_grad():
        want = theirs(ids).logits
        assert torch.equal(want, theirs(ids).logits)
        torch.testing.assert_close(logits_of(filled(config, tmp_path / "in"), ids), want, rtol=0, atol=1e-5)
    done = export_model(RunDir(tmp_path / "in"), tmp_path / "out", shard_bytes=9000 if len(name) % 3 else 1 << 30)
    again = back(tmp_path / "out")
    assert done.family == theirs.config.model_type or (name, done.family) == ("mistral_full", "llama")
    mine, original = again.state_dict(), theirs.state_dict()
    assert mine.keys() == original.keys() and all(torch.equal(mine[key], original[key]) for key in original)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, want, rtol=0, atol=0 if done.family == theirs.config.model_type else 1e-6)


@pytest.mark.parametrize("name", ["llama_3", "mistral", "qwen2_windows", "qwen3"])
def test_training_goes_on_as_it_does_in_transformers(name, tmp_path):
    """Losses of three AdamW steps on the same batches."""
    theirs = make(name)
    save(theirs, tmp_path / "hf")
    config = imported(tmp_path / "hf", tmp_path / "in")
    values = config.model_dump()
    values["optim"] |= {"lr": 1e-2, "clip_norm": None, "weight_decay": 0.0, "eps": 1e-6}
    config = RunConfig.model_validate(values)
    assert config.model.vocab_size is not None
    checkpoints = CheckpointManager(RunDir(tmp_path / "in"), config.checkpoint)
    engine = build_engine(
        config, config.model.vocab_size, None, torch.device("cpu"), fill=lambda model: fill_from(str(tmp_path / "in"), model, checkpoints)
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=config.optim.betas, eps=1e-6, weight_decay=0.0)
    ids = tokens()
    for _ in range(3):
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mine = engine.forward_backward([batch_of(ids)]).loss
        engine.step(1e-2)
        assert mine == pytest.approx(float(loss.detach()), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_survives_bit_for_bit(dtype, tmp_path):
    theirs = make("qwen2", dtype)
    save(theirs, tmp_path / "hf")
    config = imported(tmp_path / "hf", tmp_path / "in")
    model = filled(config, tmp_path / "in")
    assert model.embed.weight.dtype == torch.float32 and torch.equal(model.embed.weight.to(dtype), theirs.model.embed_tokens.weight)
    export_model(RunDir(tmp_path / "in"), tmp_path / "out")
    again = back(tmp_path / "out", dtype="auto")
    assert again.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values(), strict=True))
    export_model(RunDir(tmp_path / "in"), tmp_path / "wide", dtype="fp32")
    assert back(tmp_path / "wide", dtype="auto").dtype == torch.float32


def test_settings_in_the_spelling_of_older_releases(tmp_path):
    """rope_theta and rope_scaling at the top, an output matrix stored beside the embedding that it is, buffers."""
    theirs = make("llama_3")
    save(theirs, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    content = json.loads(file.read_text())
    rope = content.pop("rope_parameters")
    file.write_text(json.dumps({**content, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}))
    tensors = {name: value.clone() for name, value in theirs.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert "lm_head.weight" in tensors
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    told: list[str] = []
    config = import_model(tmp_path / "hf", tmp_path / "in", BASE, told.append)
    assert len(told) == 1 and "lm_head.weight" in told[0]
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(filled(config, tmp_path / "in"), ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_import_holds_one_tensor_at_a_time(tmp_path):
    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, vocab_size=512)
    model = transformers.LlamaForCausalLM(config)
    save(model, tmp_path / "hf")
    largest, whole = 512 * 256 * 4, sum(parameter.nbytes for parameter in model.parameters())
    tracemalloc.start()
    try:
        imported(tmp_path / "hf", tmp_path / "in")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert whole > 40 * largest
    assert peak < 8 * largest  # Python's own objects are counted too


def test_through_the_front_door(tmp_path, capsys, monkeypatch):
    """import, train (one step, no plan from a trace), export: the tokenizer comes along and transformers loads what came out."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    monkeypatch.chdir(tmp_path)
    save(make("qwen3"), tmp_path / "hf")
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "<eos>": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": "a b " * (40 + i)}) for i in range(20)))
    data = ["data.source=jsonl", "data.path=data.jsonl", "data.cache_dir=cache", "data.tokenize_workers=1", "data.seq_len=32"]
    assert longstride.main(["import", "hf", "start", "train.device=cpu", *data]) == 0
    assert longstride.main(["eval", "start", "--sequences", "1"]) == 0
    assert "step 0: loss" in capsys.readouterr().out
    settings = ["train.steps=1", "data.valid_fraction=0", "memory.plan=estimate", "run.name=on", "train.peak_tflops=1"]
    assert longstride.main(["train", "start/config.yaml", *settings]) == 0
    assert longstride.main(["export", "on", "out", "--dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "begins with the weights of" in shown and "step 1 as qwen3" in shown
    model = back(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 32768
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == [0, 1]
    # What trained is not what was imported, and it is not far from it.
    before, after = make("qwen3").state_dict(), model.state_dict()
    moved = max(float((after[key].float() - before[key]).abs().max()) for key in before)
    assert 0 < moved < 0.1
    assert config_file.resolve("runs/on/config.yaml").train.init_from == str(tmp_path / "start")
    # Not a run: it begins one.
    assert longstride.main(["resume", "start"]) == 2
    assert "longstride train" in capsys.readouterr().err
