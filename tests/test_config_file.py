from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import UserError
from trainer import resume_rules
from trainer.config import RunConfig
from trainer.config_file import MAX_BYTES, _scalar, changed_keys, dump, find, help_config, resolve, value_of


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(path, overrides)
    return str(caught.value)


def test_yaml_1_2(tmp_path: Path) -> None:
    config = resolve(write(tmp_path, "optim:\n  lr: 1e-4\n  clip_norm: 2\nrun:\n  name: no\ntrain:\n"))
    assert config.optim.lr == 1e-4
    assert config.optim.clip_norm == 2.0 and isinstance(config.optim.clip_norm, float)
    assert config.run.name == "no"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train:\n  setps: 3\n", ["run.yaml:2", "'train.setps'", "'train.steps'"]),
        ("trian:\n  steps: 3\n", ["run.yaml:1", "'trian'", "'train'"]),
        ("steps: 3\n", ["run.yaml:1", "'steps'", "'train.steps'"]),
        ("model:\n  rope:\n    thetta: 1\n", ["run.yaml:3", "'model.rope.theta'"]),
        ("train:\n  steps: 0\n", ["run.yaml:2", "train.steps", ": 0 ", "> 0"]),
        ("data:\n  valid_fraction: 1.0\n", ["data.valid_fraction", "1.0", "< 1"]),
        ("model:\n  memory:\n    conv_kernel: 17\n", ["run.yaml:3", "model.memory.conv_kernel", "17", "<= 16"]),
        ("model: {memory: {kind: gsa, chunk_size: 32}}\n", ["model", "memory.chunk_size is not read by memory.kind gsa"]),
        ("model: {memory: {kind: mamba2, expand_v: 2.0}}\n", ["model", "memory.expand_v is not read by memory.kind mamba2"]),
        ("model: {memory: {gsa: {n_slots: 8}}}\n", ["memory.gsa is read by memory.kind gsa, not by gated_deltanet", "memory.kind=gsa"]),
        ("model: {memory: {kind: gsa, gsa: {chunk_size: 32}}}\n", ["model.memory.gsa.chunk_size", "<= 16"]),
        ("model: {memory: {kind: mamba2, mamba2: {expand: 1.3}}}\n", ["expand 1.3", "n_heads 4"]),
        ("model: {memory: {kind: mamba2, mamba2: {n_groups: 3}}}\n", ["n_heads 4", "n_groups 3"]),
        ("checkpoint: {keep_last: 1}\n", ["checkpoint.keep_last", ">= 2"]),
        ("optim:\n  lr: '1e-4'\n", ["optim.lr", "not a number", "without quotes: 1e-4"]),
        ("train:\n  steps: 1e3\n", ["train.steps", "1000.0", "write 1000"]),
        ("train:\n  steps: true\n", ["train.steps", "true"]),
        ("train:\n  deterministic: no\n", ["train.deterministic", "write false"]),
        ("run:\n  name: 5\n", ["run.name", 'quotes: "5"']),
        ("run:\n  name: ../escape\n", ["run.name", "../escape", "letter or digit"]),
        ("run:\n  name: 'x; rm -rf $(pwd)'\n", ["run.name", "letters, digits"]),
        ("optim:\n  lr: .nan\n", ["optim.lr", "finite"]),
        ("optim:\n  lr: .inf\n", ["optim.lr", "finite"]),
        ("train:\n  precision: bf17\n", ["train.precision", "bf17", "'bf16'"]),
        ("model:\n  layers: swa\n", ["model.layers", "not a list", "[swa]"]),
        ("model:\n  layers: [swo]\n", ["model.layers.0", "swo", "'swa'"]),
        ("model:\n  layers: []\n", ["model.layers", "at least 1"]),
        ("model: {d_model: 130}\n", ["d_model 130", "n_heads 4"]),
        ("data: {seq_len: 1001}\nparallel: {cp: 2}\n", ["data.seq_len 1001", "parallel.cp 2", "1002"]),
        ("data: {source: text}\n", ["data.path"]),
        ("train: 5\n", ["train: 5", "section"]),
        ("train:\n- 1\n", ["train", "section"]),
        ("a: 1\na: 2\n", ["run.yaml:2", "duplicate key", '"a"']),
        ("x: !!python/object/apply:os.system ['touch pwned']\n", ["run.yaml:1", "tags"]),
        ("a: b: c\n", ["run.yaml:1"]),
        ("train:\n\tsteps: 1\n", ["run.yaml:2"]),
        ("train: {steps: 1}\n---\nb: 1\n", ["run.yaml:2", "document"]),
        ("%YAML 1.1\n---\ntrain: {deterministic: no}\n", ["'%'"]),
        ("train: {1: 2}\n", ["key 1 is not text"]),
        ("just text\n", ["sections"]),
        ("", ["is empty"]),
        ("# only a comment\n", ["sets no key"]),
        (b"train:\n  steps: 1 # \xff\n", ["run.yaml:2", "0xff", "UTF-8"]),
        ("run: {name: 2026-13-45}\n", ["cannot be read"]),
        (f"train: {{seed: {'9' * 5000}}}\n", ["cannot be read"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    message = refusal(write(tmp_path, text))
    assert str(tmp_path / "run.yaml") in message
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "pwned").exists()


def test_several_mistakes_are_listed_up_to_five(tmp_path: Path) -> None:
    lines = refusal(write(tmp_path, "train:\n" + "".join(f"  bad_{i}: 1\n" for i in range(8)))).splitlines()
    assert len(lines) == 6 and lines[-1] == "and 3 more"


def test_one_wrong_list_entry_is_one_mistake(tmp_path: Path) -> None:
    assert len(refusal(write(tmp_path, "model: {layers: [swo]}\n")).splitlines()) == 1


ALIAS_BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        ALIAS_BOMB,
        "a: &a\n- *a\n",
        "[" * 60_000,
        "- " * 30_000,
        "a: {" * 15_000,
        "a: [" + "1," * 30_000 + "]",
        "x" * 10_000_000,
        "\n".join(" " * depth + "a:" for depth in range(300)),
    ],
    ids=["aliases", "self", "brackets", "dashes", "braces", "long list", "10 MB", "deep"],
)
def test_hostile_files_are_refused_quickly_in_little_memory(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refusal(path)
    assert time.process_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024  # KiB
    assert MAX_BYTES < 1_000_000


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "no such config file" in refusal(tmp_path / "absent.yaml")
    assert "not a file" in refusal(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 5\nmodel:\n")
    config = resolve(
        path,
        ["train.steps=6", "train.steps=7", "model.layers=[full, swa]", "optim.lr=1e-2", "model.rope.scaling=yarn", "optim.clip_norm=null"],
    )
    assert (config.train.steps, config.model.layers, config.optim.lr) == (7, ("full", "swa"), 0.01)
    assert (config.model.rope.scaling, config.optim.clip_norm) == ("yarn", None)


def test_overrides_of_text_keys_are_taken_as_they_stand() -> None:
    config = resolve(None, ["run.name=123", "data.path=*.txt", "data.text_field=a: b"])
    assert (config.run.name, config.data.path, config.data.text_field) == ("123", "*.txt", "a: b")
    assert resolve(None, ["run.name=null"]).run.name is None
    assert resolve(None, ["data.path='null'"]).data.path == "null"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["not key=value"]),
        ("=5", ["not key=value"]),
        ("train.stps=5", ["'train.stps'", "'train.steps'"]),
        ("seq_len=5", ["'data.seq_len'"]),
        ("train=5", ["section", "train.steps="]),
        ("train.steps=", ["no value", "train.steps=null"]),
        ("train.steps=[1", ["train.steps"]),
        ("train.steps='5'", ["train.steps", "without quotes: 5"]),
        ("train.steps=-1", ["train.steps", "-1", "> 0"]),
        ("train.seed=!!python/name:os.system", ["tags"]),
    ],
)
def test_wrong_overrides(override: str, parts: list[str]) -> None:
    message = refusal(None, override)
    assert message.startswith("command line: ")
    for part in parts:
        assert part in message, message


def test_an_override_does_not_hide_where_another_mistake_stands(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 0\n")
    message = refusal(path, "train.seed=-1")
    assert f"{path}:2: train.steps" in message and "command line: train.seed" in message


def test_an_override_leaves_a_section_that_shares_an_anchor_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError):  # the anchor is no key; what matters is that no other section changes with the first
        resolve(write(tmp_path, "train: &t {seed: 1}\nrun: *t\n"), ["train.seed=2"])


text_values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
configs = st.builds(
    lambda path, field, lr, betas, layers, seed, clip, flag: RunConfig.model_validate(
        {
            "data": {"path": path, "text_field": field, "document_mask": flag},
            "optim": {"lr": lr, "betas": betas, "clip_norm": clip},
            "model": {"layers": layers},
            "train": {"seed": seed},
        }
    ),
    st.none() | text_values,
    text_values,
    st.floats(1e-300, 1e300),
    st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    st.lists(st.sampled_from(["swa", "full", "memory"]), min_size=1, max_size=5),
    st.integers(0, 2**63 - 1),
    st.none() | st.floats(1e-12, 1e12),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_dump_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert resolve(path) == config


@pytest.mark.parametrize(
    "word", ["no", "null", "true", "1e5", "0x1", "~", "", " a", "a: b", "*a", "a#b", "é", "\u2028", "\x85", "😀", ".inf", "-"]
)
def test_dump_of_words_that_yaml_reads_otherwise(tmp_path: Path, word: str) -> None:
    config = RunConfig.model_validate({"data": {"text_field": word}})
    assert resolve(write(tmp_path, dump(config))) == config


def test_a_section_with_a_field_named_keys_can_be_shown() -> None:
    section = RunConfig().data.synthetic
    assert section.keys is None and "keys: null" in _scalar(section)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_give_a_config_or_a_short_message(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_bytes(content)
    try:
        resolve(path)
    except UserError as error:
        assert all(str(path) in line or line.startswith("and ") for line in str(error).splitlines()), str(error)


keys = st.sampled_from([line.split()[0] for line in help_config().splitlines() if line.startswith("  ") and not line.startswith("    ")])
yaml_values = st.sampled_from(
    [
        "-1",
        "0",
        "1",
        "1.5",
        "true",
        "null",
        "[]",
        "[1, 2]",
        "{a: 1}",
        "text",
        "'5'",
        "1e400",
        ".nan",
        "2026-01-01",
        "!!str 5",
        "&a 1",
        "*a",
        '"',
    ]
)


@settings(max_examples=120, deadline=None)
@given(keys, yaml_values)
def test_any_value_for_any_key_gives_a_config_or_names_the_key(key: str, value: str) -> None:
    try:
        resolve(None, [f"{key}={value}"])
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
        assert key.rsplit(".", 1)[-1] in str(error) or key.split(".")[0] in str(error), str(error)


def test_help_lists_every_key_with_its_meaning() -> None:
    text = help_config()
    for key in ("run.root", "data.seq_len", "parallel.dp_replicate", "memory.budget_gib", "optim.schedule.kind", "model.memory.chunk_size"):
        assert f"  {key}  (" in text
    listed = [line for line in text.splitlines() if line.startswith("  ") and not line.startswith("    ")]
    meanings = [line.strip() for line in text.splitlines() if line.startswith("      ")]
    assert len(listed) == len(meanings) and all(meanings)


def test_changed_keys() -> None:
    old, new = resolve(None), resolve(None, ["train.steps=7", "model.layers=[full]"])
    assert changed_keys(old, new) == ["train.steps", "model.layers"] or set(changed_keys(old, new)) == {"train.steps", "model.layers"}
    assert value_of(new, "train.steps") == 7


def test_find(tmp_path: Path) -> None:
    (tmp_path / "debug_cpu.yaml").write_text("train: {steps: 1}\n")
    assert find("debug_cpu", tmp_path) == find("debug_cpu.yaml", tmp_path) == tmp_path / "debug_cpu.yaml"
    with pytest.raises(UserError, match="did you mean 'debug_cpu'"):
        find("debug_cpus", tmp_path)


@pytest.mark.parametrize("name", ["debug_cpu", "quickstart", "million", "llama_8b_one_gpu", "recall"])
def test_shipped_configs_are_valid(name: str) -> None:
    root = Path(__file__).resolve().parents[1]
    config = resolve(root / "configs" / f"{name}.yaml")
    assert config == resolve(find(name, root / "configs"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=7"],
        ["parallel.cp=2"],
        ["memory.recompute=block"],
        ["checkpoint.save_every_steps=1"],
        ["parallel.dp_shard=2", "train.grad_accum=2"],
        ["model.memory.kernel=eager"],
    ],
)
def test_lawful_changes_on_resume(overrides: list[str]) -> None:
    resume_rules.check(resolve(None, ["train.grad_accum=4"]), resolve(None, ["train.grad_accum=4", *overrides]))


def test_how_memories_of_a_mixture_are_computed_may_change() -> None:
    mixture = ["model.memory.kind=mom"]
    resume_rules.check(resolve(None, mixture), resolve(None, [*mixture, "model.memory.mom.compute=dense"]))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.seed=1"], ["train.seed (0 -> 1)"]),
        (["optim.lr=1", "data.seq_len=2048"], ["optim.lr", "data.seq_len"]),
        (["model.d_model=64"], ["model.d_model"]),
        (["run.name=other"], ["run.name"]),
        (["parallel.dp_shard=2"], ["sequences per step from 4 to 8", "train.grad_accum=2"]),
        (["parallel.dp_shard=3"], ["divide 4"]),
        (["parallel.kv_dtype=bf16"], ["parallel.kv_dtype (compute -> bf16)", "not parallel.kv_dtype", "--allow parallel.kv_dtype"]),
        (["train.steps=29"], ["train.steps 29 lies behind step 30"]),
    ],
)
def test_unlawful_changes_on_resume(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resume_rules.check(resolve(None, ["train.grad_accum=4"]), resolve(None, ["train.grad_accum=4", *overrides]), saved_step=30)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


WORDS = ["train.\x1dsteps=3", "a\x85b\u2028c\x1b[31m", "x" * 4000, "data.source=\x1d\x85é\x98", "\U000e0e27=1", "two\nlines=3"]


@pytest.mark.parametrize("word", WORDS)
def test_words_that_a_terminal_would_obey_are_spelled_out(word):
    with pytest.raises(UserError) as caught:
        resolve(None, [word])
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 400


@pytest.mark.parametrize(
    ("line", "text"),
    [("model.attention_dropout=0.1", "attention has no dropout: fused kernels draw"), ("model.dropout=0.1", "optim.weight_decay")],
)
def test_what_is_declined_says_why(line, text):
    with pytest.raises(UserError, match=f"'{line.split('=')[0]}' is no setting: .*{text}"):
        resolve(None, [line])
