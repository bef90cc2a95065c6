"""What README.md, docs/ and benchmarks/ name exists: verbs and their options, presets, settings, files, links, make targets, scripts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from longstride import _parsers
from models.errors import UserError
from trainer.config import RunConfig
from trainer.config_file import check_key
from trainer.declined import DECLINED

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
FOLDERS = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))
PRESETS = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(RunConfig.model_fields))})(?:\.\w+)+(?P<rest>\*|\(|/)?")
BLOCK = re.compile(r"```.*?```|^    .*$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
END_OF_COMMAND = re.compile(r"\s{3,}|\s(?:->|&&|\||#)\s|,\s|;|\)\s|$")
FILES_OF_A_RUN = re.compile(r"slurm/(?:job|attempts\.jsonl|submission|health|\*)|tokens/s$")


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks, and what stands in backticks."""
    for block in BLOCK.findall(text):
        yield from block.splitlines()
    yield from SPAN.findall(BLOCK.sub("", text))


def commands(text: str) -> Iterator[list[str]]:
    """The words of every ``longstride VERB ...`` in code."""
    for line in code_lines(text):
        if found := re.search(r"(?:^|\s)longstride ([a-z]+(?: .*)?)$", line):
            words = END_OF_COMMAND.split(found[1], maxsplit=1)[0]
            try:
                yield shlex.split(re.sub(r"[\[\]]", " ", words).replace("...", ""))
            except ValueError:  # half of a quotation: the line goes on elsewhere
                continue


def wrong_commands(text: str) -> list[str]:
    """Verbs, options, presets and settings of commands that are none."""
    verbs = _parsers()[1]
    wrong = []
    for verb, *words in commands(text):
        if verb not in verbs:
            wrong.append(f"longstride {verb}")
            continue
        options = {*verbs[verb]._option_string_actions, "--debug"}
        wrong += [f"longstride {verb} {word}" for word in words if word.startswith("--") and word.split("=")[0] not in options]
        if verb in ("train", "plan", "submit") and words and re.fullmatch(r"[a-z0-9_]+", words[0]) and words[0] not in PRESETS:
            wrong.append(f"longstride {verb} {words[0]}")
        keys = [word.split("=")[0] for word in words if re.fullmatch(r"[\w.]+=.*", word)]
        wrong += [f"longstride {verb} {key}=" for key in keys if key not in ("key", "device", "gpus") and not is_key(key)]
    return wrong


def is_key(name: str) -> bool:
    try:
        check_key(name)
    except UserError:
        return name in DECLINED
    return True


def all_keys(section: type = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():  # pyright: ignore[reportAttributeAccessIssue]
        yield f"{prefix}{name}"
        if hasattr(field.annotation, "model_fields"):
            yield from all_keys(field.annotation, f"{prefix}{name}.")


KEYS = set(all_keys())


def wrong_settings(text: str) -> list[str]:
    """Every ``section.key`` in code that is no setting or section (with ``*``: no beginning of one), no function and no file."""
    wrong = []
    for found in (found for line in code_lines(text) for found in KEY.finditer(line)):
        name, rest = found[0].removesuffix(found["rest"] or ""), found["rest"]
        first, *others = name.split(".")
        is_name = others[-1] in ("py", "md", "json", "cpp", "yaml", "jsonl")
        is_code = rest in ("(", "/") or (ROOT / first / f"{others[0]}.py").is_file() or name in ("deepspeed.initialize", "torch")
        is_place = any(word.isupper() for word in others)
        if not (name in KEYS or is_name or is_code or is_place or is_key(name)) and not (
            rest == "*" and any(key.startswith(name) for key in KEYS)
        ):
            wrong.append(found[0])
    return wrong


def wrong_files(text: str, folder: Path) -> list[str]:
    """Files below the rooms that are not there, and targets of links."""
    wrong = []
    for line in code_lines(text):
        for name in re.findall(rf"(?<![\w./<{{-])(?:{FOLDERS})/[\w./*-]*", line):
            name = name.rstrip(".,/")
            if not is_file(name) and not FILES_OF_A_RUN.match(name):
                wrong.append(name)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", SPAN.sub("", BLOCK.sub("", text)))
    return wrong + [target for target in links if "://" not in target and not (folder / target).exists()]


def is_file(name: str) -> bool:
    """``trainer/trainer.py``, ``trainer/*.py``, ``trainer/trainer``, ``trainer/trainer.Trainer``, ``docs/decisions/0023``."""
    if any(ROOT.glob(f"{name}-*.md" if re.search(r"/\d{4}$", name) else name)) or (ROOT / f"{name}.py").is_file():
        return True
    module, _, attribute = name.rpartition(".")
    source = ROOT / f"{module}.py"
    return (
        bool(module)
        and source.is_file()
        and re.search(rf"\b(?:def|class) {attribute}\b|^{attribute}\b", source.read_text(), re.M) is not None
    )


def wrong_scripts(text: str) -> list[str]:
    """``make`` targets, scripts, their options and modules that are not there."""
    wrong = []
    for line in code_lines(text):
        wrong += [f"make {name}" for name in re.findall(r"^\s*make ([a-z-]+)(?=\s*(?:#|$)|\s\s|\s[A-Z]+=)", line) if name not in TARGETS]
        for script, rest in re.findall(r"python ((?:benchmarks|scripts|docs)/[\w/]+\.py)(.*)", line):
            source = (ROOT / script).read_text() if (ROOT / script).is_file() else None
            wrong += [script] if source is None else []
            wrong += [f"{script} {option}" for option in re.findall(r"(?<=\s)--[a-z-]+", rest) if source and f'"{option}"' not in source]
        for module in re.findall(r"python -m ((?:tests|benchmarks)[\w.]*)", line):
            place = ROOT / module.replace(".", "/")
            wrong += [] if place.is_dir() or place.with_suffix(".py").is_file() else [module]
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(path: Path) -> None:
    text = path.read_text()
    wrong = [*wrong_commands(text), *wrong_settings(text), *wrong_files(text, path.parent), *wrong_scripts(text)]
    assert not wrong


def test_what_is_not_there_is_found() -> None:
    text = """Say `longstride trian` or `longstride train quickstrat train.stepz=3 --nprocs 2`, set `guards.on_spik` or `guards.hung_*`,
read `trainer/nowhere.py`, `trainer/trainer.Nowhere` and [this](nowhere.md). `make quickstrat`, `python benchmarks/fuzz.py --inputz 3`,
`python -m tests.fault 8`.
```
longstride submit my.yaml --node 4 --time 24:00:00     (and so on)
python benchmarks/nowhere.py
```
"""
    found = [command.removeprefix("longstride ") for command in wrong_commands(text)]
    assert found == ["submit --node", "trian", "train --nprocs", "train quickstrat", "train train.stepz="]
    assert wrong_settings(text) == ["train.stepz", "guards.on_spik", "guards.hung_*"]
    assert wrong_files(text, ROOT) == ["benchmarks/nowhere.py", "trainer/nowhere.py", "trainer/trainer.Nowhere", "nowhere.md"]
    assert wrong_scripts(text) == ["benchmarks/nowhere.py", "make quickstrat", "benchmarks/fuzz.py --inputz", "tests.fault"]
    read = (ROOT / "README.md").read_text()
    assert {words[0] for words in commands(read)} >= set(_parsers()[1]), "README.md shows every verb"
