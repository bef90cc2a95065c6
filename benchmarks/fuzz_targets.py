"""What ``benchmarks/fuzz.py`` feeds with inputs: everything that people, clusters and other programs hand to this product.

A target takes bytes and says ``accepted`` or ``refused``. Refused means a clean error: a UserError of a few lines, a bad document, or a
manifest that is not believed. Any other exception, a crash, a value that is not data any more, a started process, a connection or
seconds of processor time are failures.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from models.errors import UserError
from slurm.script import Job, render
from slurm.site import Site, read_site
from trainer import config_file
from trainer.config import RunConfig
from trainer.data.documents import Document
from trainer.data.sources import open_source
from trainer.manifest import FileEntry, Manifest, ManifestError, verify

CANARY = "executed"
"""A file of this name in the working directory means that an input was run."""
ALLOWED: list[bool] = []
"""Not empty while the harness itself starts a process."""
MAX_LINES = config_file.MAX_ERRORS_SHOWN + 1

SHELL = [
    f"$(touch {CANARY})", f"`touch {CANARY}`", f"'; touch {CANARY}; '", f'"; touch {CANARY}; "', f"; touch {CANARY} #", f"| touch {CANARY}",
    f"\ntouch {CANARY}\n", f"&& touch {CANARY}", "a b", "-rf", "--wrap=x", "\\", "'", '"', "%x/%j", "@RUN@", "#SBATCH --wrap=x", "${IFS}",
    "~", "*", "!!", "\0", "\r", "\x1b[31m", "\u2028", "\ud800", "é", "../../etc", "/", "",
]  # fmt: skip
YAML = [
    f"!!python/object/apply:os.system ['touch {CANARY}']", f"!!python/object/new:os.system [touch {CANARY}]", "&a [*a]", "<<: *a", "? ",
    "- ", "{", "}", "[", "]", ": ", "\n", "  ", "|", ">", "null", "true", ".nan", ".inf", "1e999", "1_000", "0x1F", "2001-01-01", "'",
    '"', "#", "%YAML 1.1", "---", "...", "!!binary", "!!set", "\t", "\ufeff", "9" * 5000, "train:", "steps", "run:", "name:", "model:",
    "layers:",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One kind of input."""

    name: str
    weight: int
    """Its share of the inputs."""
    inputs: st.SearchStrategy[bytes]
    check: Callable[[bytes], str]
    """``accepted`` or ``refused``; raises for anything else."""
    words: Sequence[str | bytes] = ()
    """What means something in the format; put into variants."""


# --- making inputs


def mutated(seeds: Sequence[bytes], tokens: Sequence[str | bytes] = ()) -> st.SearchStrategy[bytes]:
    """Valid inputs with some bytes changed, cut out, doubled, or replaced by something that means something in the format."""
    words = [token.encode("utf-8", "surrogatepass") if isinstance(token, str) else token for token in tokens] or [b"\0"]
    place = st.integers(0, 1 << 20)
    change = st.tuples(st.sampled_from("bcdit"), place, st.integers(0, 255), st.sampled_from(words))
    return st.builds(_mutate, st.sampled_from(list(seeds)), st.lists(change, max_size=6))


def _mutate(seed: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    data = bytearray(seed)
    for kind, place, number, word in changes:
        i = place % (len(data) + 1)
        if kind == "b" and i < len(data):
            data[i] ^= 1 << number % 8
        elif kind == "c":
            del data[i:]
        elif kind == "d":
            del data[i : i + 1 + number % 16]
        elif kind == "i":
            data[i:i] = bytes([number]) * (1 + number % 5)
        else:
            data[i : i + (number % 3) * len(word)] = word
    return bytes(data)


def variants(data: bytes, words: Sequence[str | bytes], count: int) -> Iterator[bytes]:
    """``data`` changed at chance places, the same for the same ``data``."""
    chance = random.Random(data)
    known = [word.encode("utf-8", "surrogatepass") if isinstance(word, str) else word for word in words] or [b"\0"]
    for _ in range(count):
        changes = [
            (chance.choice("bcdit"), chance.randrange(1 << 20), chance.randrange(256), chance.choice(known))
            for _ in range(chance.randint(1, 4))
        ]
        yield _mutate(data, changes)


def _text(tokens: Sequence[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(list(tokens)) | st.text(max_size=12), max_size=5).map("".join)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _string(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


# --- settings


def _refused(error: UserError) -> str:
    lines = str(error).splitlines()
    assert error.exit_code == 2 and 0 < len(lines) <= MAX_LINES, f"not a clean error: {str(error)[:300]!r}"
    return "refused"


def config_text(data: bytes) -> str:
    """A config file; what is accepted must come back from its own dump."""
    file = Path("run.yaml")
    file.write_bytes(data)
    try:
        config = config_file.resolve(file)
    except UserError as error:
        return _refused(error)
    file.write_text(config_file.dump(config))
    assert config_file.resolve(file) == config, "another config comes back"
    return "accepted"


def overrides(data: bytes) -> str:
    """``key=value`` words of a command line, split at zero bytes."""
    try:
        config_file.resolve(None, _string(data).split("\0"))
    except UserError as error:
        return _refused(error)
    return "accepted"


def site_text(data: bytes) -> str:
    """site.yaml, and a script that is made with what it says."""
    Path("site.yaml").write_bytes(data)
    try:
        site = read_site(Path("site.yaml"))
        render(_JOB, site)
    except UserError as error:
        return _refused(error)
    return "accepted"


_KEYS = [key.path for key in config_file._keys()]
_VALUES = _text([*YAML, *SHELL, "1", "-1", "1e-4", "auto", "full", "[swa, memory]", "debug", "runs", "1e400", "yes"])
_DEFAULTS = [f"{key}={config_file._scalar(config_file.value_of(RunConfig(), key))}" for key in _KEYS]
_OVERRIDE = st.sampled_from(_DEFAULTS) | st.builds(
    lambda key, equals, value: f"{key}{equals}{value}",
    st.sampled_from(_KEYS) | _text([*_KEYS, ".", "run"]),
    st.sampled_from(["=", "=", "=", "==", "", " = "]),
    _VALUES,
)
_CONFIGS = [
    "".join(config_file.dump(RunConfig()).splitlines(keepends=True)[:30]).encode(),
    b"model: {d_model: 64, layers: [swa, memory, full]}\ntrain:\n  steps: 3\n  precision: bf16\n",
    b"run:\n  name: a\ndata: {source: text, path: x.txt, seq_len: 64}\noptim: {preset: galore, rank: 4}\nparallel: {cp: 2}\n",
]

# --- the job script

_JOB = Job("name", "0123", Path("/runs/name"), Path("/runs/name/l.py"), "/venv/bin/python", Path("/work"), 2, 4, gpus=True)
_TELL = "cd() { printf '%s\\0' \"$2\"; }\nmodule() { printf '%s\\0' \"$2\"; }\n"
_TOLD = '\nprintf "%s\\0" "$run" "$longstride" "$python" "${VALUE:-}"'


def job_script(data: bytes) -> str:
    """A run's name, paths and options and a site's values in the job script, which bash then reads: all must come out as they went in."""
    text = _string(data)
    with contextlib.suppress(UserError):  # names are refused before
        config_file.resolve(None, [f"run.name={text}"])
    path = Path("/" + text.lstrip("/"))
    try:
        script = _script(text, path)
    except (UserError, ValueError):
        return "refused"
    options = [
        [line.partition("=")[0] for line in s.splitlines() if line.startswith("#SBATCH")] for s in (script, _script("a", Path("/a")))
    ]
    assert options[0] == options[1], options
    done = _bash(_TELL + script.split("attempt=$(")[0] + _TOLD)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    wanted = [str(path), text, str(path), str(path / "l.py"), text, text]
    assert done.stdout.split(b"\0")[:-1] == [word.encode() for word in wanted], done.stdout
    return "accepted"


def _script(text: str, path: Path) -> str:
    asked = {"name": text, "python": text, "partition": text, "qos": text, "account": text, "dependency": text}
    job = replace(_JOB, run=path, longstride=path / "l.py", submit_dir=path, **asked)
    return render(job, Site(environment={"VALUE": text}, modules=(text,), rendezvous_host=text))


def _bash(script: str) -> subprocess.CompletedProcess[bytes]:
    ALLOWED.append(True)
    try:
        env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        return subprocess.run(["bash"], input=script.encode(), env=env, capture_output=True, timeout=60)
    finally:
        ALLOWED.pop()


# --- data


def _documents(kind: Any, name: str) -> Callable[[bytes], str]:
    def check(data: bytes) -> str:
        Path(name).write_bytes(data)
        try:
            source = open_source(kind, name)
            items = [item for unit in source.units() for _, item in source.read(unit)]
            source.fingerprint()
        except UserError as error:
            return _refused(error)
        for item in items:
            if isinstance(item, Document):
                item.text.encode("utf-8")
            else:
                _refused(item.error())
        return "accepted" if items and all(isinstance(item, Document) for item in items) else "refused"

    return check


def _parquet() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for options in (
        {"compression": "none"},
        {"compression": "snappy", "use_dictionary": False},
        {"row_group_size": 2, "compression": "zstd"},
    ):
        last = None if options["compression"] == "none" else "x"
        table, sink = pa.table({"text": ["one", "two", "three" * 50, last], "n": [1, 2, 3, 4]}), io.BytesIO()
        pq.write_table(table, sink, **options)
        files.append(sink.getvalue())
    return files


def _arrow() -> list[bytes]:
    import pyarrow as pa

    files = []
    for new, last in ((pa.ipc.new_stream, None), (pa.ipc.new_file, "\u00e9"), (pa.ipc.new_stream, "x")):
        table, sink = pa.table({"text": ["one", "two", "three" * 50, last]}), io.BytesIO()
        with new(sink, table.schema) as writer:
            writer.write_table(table)
        files.append(sink.getvalue())
    return files


_JSONL = [
    b'{"text": "one"}\n{"text": "two"}\n',
    b'{"text": "\\ud83d\\ude00", "n": [1, {"a": null}]}\n\n{"text": ""}\n{"other": 1}',
    b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}",
]
_JSON = ["{", "}", "[", "]", '"', "\\ud800", "\\u0000", "null", "NaN", "1e999", "\n", ",", ":", "9" * 5000, '"text"', "\ufeff"]

# --- tokenizers


def tokenizer_text(data: bytes) -> str:
    """tokenizer.json."""
    from trainer.data.tokenizers import load_tokenizer

    Path("tokenizer.json").write_bytes(data)
    try:
        tokenizer = load_tokenizer("tokenizer.json")
        tokenizer.encode_batch(["a b", ""])
        assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    except UserError as error:
        return _refused(error)
    return "accepted"


_TOKENIZER = json.dumps(
    {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [
            {"id": 2, "content": "<eos>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<eos>": 2, "?": 3}, "unk_token": "?"},
    }
).encode()  # fmt: skip

# --- checkpoints


def manifest_bytes(data: bytes) -> str:
    """A checkpoint's manifest: only the canonical bytes of a manifest are believed, and a folder that does not match is named."""
    folder = Path("step_00000003")
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(b"content")
    (folder / "manifest.json").write_bytes(data)
    problems = verify(folder)
    assert all(line and "\n" not in line for line in problems), problems
    try:
        manifest = Manifest.from_bytes(data)
    except ManifestError:
        assert problems
        return "refused"
    assert manifest.to_bytes() == data and not any("/" in name for name in manifest.files)
    assert problems == [] or data != _manifest()
    return "accepted"


def _manifest(**files: FileEntry) -> bytes:
    content = files or {"a": FileEntry(7, "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73")}
    return Manifest(3, 1, "cafe", {"torch": "2"}, content).to_bytes()


def metadata_pickle(data: bytes) -> str:
    """``.metadata``, the pickle of torch's distributed checkpoint: read without doing what it says."""
    from trainer.restricted_unpickle import RefusedMetadata, read_metadata

    try:
        metadata = read_metadata(data, {"__0_0.distcp"})
    except RefusedMetadata as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    assert set(metadata.state_dict_metadata)
    return "accepted"


def _metadata() -> list[bytes]:
    import torch
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    ALLOWED.append(True)
    try:
        save({"model.a": torch.ones(3, 4), "model.b": torch.zeros(5)}, storage_writer=FileSystemWriter("dcp", overwrite=True), no_dist=True)
    finally:
        ALLOWED.pop()
    real = Path("dcp/.metadata").read_bytes()
    return [real, real, *(pickle.dumps(_Runs(how), protocol) for how in range(4) for protocol in (0, 2, 4))]


class _Runs:
    """A pickle that runs something where it is loaded without care."""

    def __init__(self, how: int) -> None:
        self._how = how

    def __reduce__(self) -> tuple[Any, ...]:
        command = f"touch {CANARY}"
        opened = f"open({CANARY!r}, 'w')"
        return [(os.system, (command,)), (subprocess.Popen, (["touch", CANARY],)), (exec, (opened,)), (eval, (opened,))][self._how]


_PICKLE = [
    b"cos\nsystem\n",
    b"cposix\nsystem\n",
    b"(S'touch executed'\ntR.",
    b"\x93",
    b"\x81",
    b"b",
    b"R",
    b"\x8c\x02os\x8c\x06system\x93",
    b".",
]

# --- models of others


def safetensors_bytes(data: bytes) -> str:
    """A file of weights: what its header says is checked before any of it is read."""
    from trainer.interchange.safetensors_files import DTYPES, open_weights

    Path("model").mkdir(exist_ok=True)
    Path("model/model.safetensors").write_bytes(data)
    try:
        weights = open_weights("model")
        for name in weights.names:
            values = weights.read(name)
            assert values.dtype == DTYPES[weights.entries[name].dtype] and tuple(values.shape) == weights.entries[name].shape
    except UserError as error:
        return _refused(error)
    return "accepted"


def hf_config_text(data: bytes) -> str:
    """config.json of a model; one that is accepted is written back and read again as the same model."""
    from trainer.interchange.families import hf_config, model_config, read_hf_config

    Path("model").mkdir(exist_ok=True)
    file = Path("model/config.json")
    file.write_bytes(data)
    try:
        config = model_config(read_hf_config(file.parent), file)
    except UserError as error:
        return _refused(error)
    again = model_config(hf_config(config, config.vocab_size or 0, "float32", 64), file)
    assert (again.layer_kinds, again.kv_heads, again.norm_eps, again.rope.theta) == (
        config.layer_kinds, config.kv_heads, config.norm_eps, config.rope.theta
    )  # fmt: skip
    return "accepted"


def _safetensors() -> list[bytes]:
    def file(header: dict[str, Any], data: bytes) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    one = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}
    return [
        file(one, bytes(32)),
        file({"__metadata__": {"format": "pt"}, "x": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, b"ab"),
    ]


_HF = [
    json.dumps(
        {
            "model_type": family, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
            "vocab_size": 96, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "sliding_window": 8, "use_sliding_window": True,
            "max_window_layers": 1, "rope_theta": 1e4, "rope_scaling": scaling,
        }
    ).encode()
    for family in ("llama", "mistral", "qwen2", "qwen3")
    for scaling in (None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"type": "linear", "factor": 2})
]  # fmt: skip


def targets() -> Iterator[Target]:
    """All of them. Called in the working directory of the inputs."""
    shell, yaml, json_words = SHELL, [*YAML, *SHELL], [*_JSON, "true", "-1", "0"]
    yield Target("config files", 10, mutated(_CONFIGS, yaml) | _text(YAML).map(_bytes) | st.binary(max_size=200), config_text, yaml)
    words = st.lists(_OVERRIDE, min_size=1, max_size=4).map(lambda words: _bytes("\0".join(words)))
    yield Target("overrides", 14, words, overrides, [*yaml, *_KEYS, "="])
    sites = [
        b"device: h100\nmodules: [cuda/12.8]\nenvironment: {NCCL_DEBUG: WARN}\nsetup: ['source a']\n",
        b"sbatch: ['--exclusive']\nexport: [HOME]\n",
    ]
    yield Target("site.yaml", 5, mutated(sites, yaml) | _text(YAML).map(_bytes), site_text, yaml)
    names = _text(shell).map(_bytes) | st.text(max_size=40).map(_bytes)
    yield Target("names and paths in job.sbatch, run by bash", 8, names, job_script, shell)
    yield Target("JSONL", 16, mutated(_JSONL, _JSON) | st.binary(max_size=300), _documents("jsonl", "data.jsonl"), json_words)
    yield Target("text", 10, st.binary(max_size=300) | st.text(max_size=80).map(_bytes), _documents("text", "data.txt"), shell)
    yield Target("Parquet", 8, mutated(_parquet()) | st.binary(max_size=200), _documents("parquet", "data.parquet"))
    yield Target("Arrow", 6, mutated(_arrow()) | st.binary(max_size=200), _documents("arrow", "data.arrow"))
    yield Target("tokenizer.json", 5, mutated([_TOKENIZER], _JSON), tokenizer_text, json_words)
    files = [_manifest(), _manifest(**{"../a": FileEntry(7, "0" * 64)})]
    found = [*_JSON, "../", "files", "self_sha256"]
    yield Target("checkpoint manifests", 12, mutated(files, found) | st.binary(max_size=200), manifest_bytes, found)
    yield Target("checkpoint metadata (pickles)", 8, mutated(_metadata(), _PICKLE) | st.binary(max_size=200), metadata_pickle, _PICKLE)
    places = [*_JSON, "data_offsets", "F64"]
    yield Target("safetensors", 8, mutated(_safetensors(), places) | st.binary(max_size=100), safetensors_bytes, places)
    keys = [*json_words, "layer_types", "head_dim"]
    yield Target("config.json of models", 10, mutated(_HF, keys), hf_config_text, keys)
