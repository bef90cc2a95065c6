"""From a YAML file and ``key=value`` overrides to one validated RunConfig, and back to text.

Every mistake becomes a UserError that names the file and line (or the command line), the key, the value, the limit and the
way out. Nothing in a file is executed, and no file can cost more than a second or a few megabytes. Imports no torch.

Try alone: ``python -c "from trainer.config_file import help_config; print(help_config())"``.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode

from models.errors import UserError
from trainer.config import RunConfig
from trainer.declined import DECLINED

MAX_BYTES = 64 * 1024
"""Largest config file read: some twenty times a config that sets every key."""
MAX_VALUES = 10_000
"""Most values a config may hold once its aliases are expanded."""
MAX_BRACKETS = 1_000
MAX_DEPTH = 16
MAX_ERRORS_SHOWN = 5
COMMAND_LINE = "command line"

_LIMITS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<"), "less_than_equal": ("le", "<=")}
_WANTED = {"int": "a whole number", "float": "a number", "string": "text", "bool": "true or false", "tuple": "a list"}
_PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


class _Key(NamedTuple):
    """One setting: its dotted path and its pydantic field."""

    path: str
    field: FieldInfo

    @property
    def is_section(self) -> bool:
        return _section_of(self.field) is not None


def find(name: str, configs: Path) -> Path:
    """The config file at path ``name``, or the one of that bare name (with or without .yaml) in the folder ``configs``.

    Raises UserError naming the configs there are.
    """
    if Path(name).exists():
        return Path(name)
    if "/" not in name:
        for candidate in (configs / name, configs / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted(path.stem for path in configs.glob("*.yaml"))
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    way_out = f"did you mean '{close[0]}'?" if close else f"{configs} holds: {', '.join(known)}"
    raise UserError(f"{name}: no such config file; {way_out}")


def resolve(path: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated settings of ``path`` (None: all defaults) with ``key=value`` overrides applied in order, the last one winning.

    Raises UserError with one line per mistake, at most ``MAX_ERRORS_SHOWN``.
    """
    text = _read(Path(path)) if path is not None else ""
    values = _load_file(text, Path(path)) if path is not None else {}
    from_command_line = set()
    for override in overrides:
        from_command_line.add(_apply_override(values, override))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, path, text, from_command_line)) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of another YAML file, read as guardedly as a config. Raises UserError naming file and line."""
    return _load_file(_read(path), path)


def dump(config: RunConfig) -> str:
    """Every setting as YAML that ``resolve`` reads back equal; ends with a newline."""
    return "\n".join(_dump_section(config, "")) + "\n"


def help_config() -> str:
    """Every key with type, limits, default and meaning, grouped by section."""
    lines: list[str] = []
    for key in _keys():
        meaning = " ".join((key.field.description or "").split())
        if key.is_section:
            lines += ["", f"{key.path}: {meaning}".rstrip(": ")]
        else:
            default = _scalar(key.field.get_default())
            lines += [f"  {key.path}  ({_type_text(key.field)}; default {default})", f"      {meaning}"]
    return "\n".join(lines).lstrip("\n")


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted paths of the settings in which two configs differ."""
    return [key.path for key in _keys() if not key.is_section and value_of(old, key.path) != value_of(new, key.path)]


def check_key(path: str) -> None:
    """Raises UserError when ``path`` is not the dotted path of a setting, naming the nearest one."""
    _apply_override({}, f"{path}=null")


def value_of(config: RunConfig, path: str) -> Any:
    """The value of a dotted key, for example ``optim.lr``. Raises AttributeError for a key that does not exist."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


# --- the shape of the config


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[_Key]:
    """All sections and settings, each section before what it holds; nested sections last."""
    for name, field in sorted(section.model_fields.items(), key=lambda item: _section_of(item[1]) is not None):
        yield _Key(prefix + name, field)
        inner = _section_of(field)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _nearest(path: str) -> str | None:
    """The real key most like ``path``, judged by the whole path and by its last part (a key in the wrong section)."""
    last = path.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, path, candidate).ratio()
        tail = difflib.SequenceMatcher(None, last, candidate.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.9 * tail + 0.1 * whole)

    best = max((key.path for key in _keys()), key=likeness)
    return best if likeness(best) > 0.6 else None


def _unknown(path: str) -> str:
    if path in DECLINED:
        return f"'{path}' is no setting: {DECLINED[path]}"
    nearest = _nearest(path)
    way_out = f"did you mean '{nearest}'?" if nearest else "see longstride train --help-config for all keys"
    return f"unknown key '{_visible(path)}'; {way_out}"


# --- reading YAML


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-4 is a number, 'no' is text; a duplicate key is an error
    yaml.allow_duplicate_keys = False
    return yaml


def _read(path: Path) -> str:
    """The text of a config file. Raises UserError if it is missing, no file, too large, empty or not UTF-8."""
    if not path.exists():
        raise UserError(f"{path}: no such config file")
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give a YAML file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES // 1024} KiB; a config file holds settings only, data belongs under data.path")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; start from a file in configs/")
    return text


def _load_file(text: str, path: Path) -> dict[str, Any]:
    if re.search(r"^%", text, re.MULTILINE):
        raise UserError(f"{path}: YAML directives (lines that begin with '%') are not accepted; remove them")
    if text.count("[") + text.count("{") > MAX_BRACKETS:  # the parser takes seconds over thousands of open brackets
        raise UserError(f"{path}: more than {MAX_BRACKETS} lists or mappings in brackets; a config file holds settings only")
    values = _parse(text, str(path))
    if values is None:
        raise UserError(f"{path}: sets no key; start from a file in configs/")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {_scalar(values)}; expected sections such as 'train:' with keys below them")
    return {key: {} if value is None and key in RunConfig.model_fields else value for key, value in values.items()}


def _parse(text: str, where: str) -> Any:
    try:
        value = _yaml().load(text)
        _check_size(value, where)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and where != COMMAND_LINE else ""
        problem = " ".join(str(error.problem or error.context or "not YAML").split())
        if "could not determine a constructor" in problem:
            problem = "YAML tags ('!...') are not accepted; write the plain value"
        raise UserError(f"{where}{line}: {problem}") from None
    except YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; settings are at most {MAX_DEPTH} levels deep") from None
    except (ValueError, ArithmeticError, TypeError) as error:  # a number or date that YAML's own rules cannot build
        raise UserError(f"{where}: a value cannot be read ({str(error)[:120]}); quote it if it is text") from None
    return value


def _check_size(value: Any, where: str) -> None:
    """Refuse what would grow when aliases are expanded, before anything walks it."""
    left = MAX_VALUES
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise UserError(
                f"{where}: more than {MAX_VALUES} values or {MAX_DEPTH} levels once its aliases are expanded; write the values out"
            )
        if isinstance(item, dict):
            stack.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list | tuple | set):
            stack.extend((child, depth + 1) for child in item)


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set one ``key=value`` in ``values``; the dotted key."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise UserError(f"{COMMAND_LINE}: '{_visible(override)}' is not key=value; for example train.steps=100")
    key = next((key for key in _keys() if key.path == path), None)
    if key is None:
        raise UserError(f"{COMMAND_LINE}: {_unknown(path)}")
    if key.is_section:
        example = next(inner.path for inner in _keys() if inner.path.startswith(path + ".") and not inner.is_section)
        raise UserError(f"{COMMAND_LINE}: '{path}' is a section; set one of its keys, for example {example}=...")
    *sections, name = path.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        elif not isinstance(inner, dict):
            return path  # validation says what is wrong with the section
        else:
            inner = values[section] = dict(inner)  # an alias may share it with another section
        values = inner
    values[name] = _override_value(key, text)
    return path


def _override_value(key: _Key, text: str) -> Any:
    """``text`` as a YAML value; for a key that holds free text, as it stands unless quoted or null."""
    if not text.strip():
        raise UserError(f"{COMMAND_LINE}: {key.path}= has no value; write {key.path}=null for none")
    if str in (typing.get_args(key.field.annotation) or (key.field.annotation,)) and text.strip()[0] not in "\"'":
        return None if text.strip() == "null" else text
    try:
        return _parse(text, COMMAND_LINE)
    except UserError as error:
        raise UserError(f"{COMMAND_LINE}: {key.path}: {_visible(text)}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}") from None


# --- explaining what validation found


def _explain(error: ValidationError, path: Path | str | None, text: str, from_command_line: set[str]) -> str:
    errors = error.errors(include_url=False)
    inside = {entry["loc"][:-1] for entry in errors}  # a list whose entries are wrong is reported as too short as well
    errors = [entry for entry in errors if entry["type"] != "too_short" or entry["loc"] not in inside]
    root = _yaml().compose(text)
    lines = []
    for entry in errors[:MAX_ERRORS_SHOWN]:
        dotted = ".".join(str(part) for part in entry["loc"])
        key = next((key for key in from_command_line if dotted == key or dotted.startswith(key + ".")), None)
        where = COMMAND_LINE if key is not None or path is None else f"{path}{_line_of(root, entry['loc'])}"
        lines.append(f"{where}: {describe(dotted, entry)}")
    if len(errors) > MAX_ERRORS_SHOWN:
        lines.append(f"and {len(errors) - MAX_ERRORS_SHOWN} more")
    return "\n".join(lines)


def describe(dotted: str, entry: Any) -> str:
    """What is wrong with one setting, as ``key: value: limit; way out``. ``entry``: of a pydantic ValidationError's ``errors()``."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(dotted)
    if kind == "value_error":
        message = entry["msg"].removeprefix("Value error, ")
        is_setting = any(key.path == dotted and not key.is_section for key in _keys())
        return ": ".join([part for part in (dotted, _shorten(_scalar(value)) if is_setting else "", message) if part])
    if kind == "invalid_key":
        return f"key {_shorten(_scalar(value))} is not text; keys are names such as 'train.steps'"
    shown = f"{dotted}: {_shorten(_scalar(value))}"
    if kind in _LIMITS:
        name, sign = _LIMITS[kind]
        return f"{shown} is out of range; it must be {sign} {_scalar(context[name])}"
    if kind == "literal_error":
        return f"{shown} is none of: {context['expected'].replace(' or ', ', ')}" + _nearest_choice(value, context["expected"])
    if kind == "finite_number":
        return f"{shown} is not a finite number"
    if kind in ("too_short", "too_long"):
        return f"{shown} has {context['actual_length']} entries; it needs at " + (
            f"least {context['min_length']}" if kind == "too_short" else f"most {context['max_length']}"
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{shown} stands where a section is expected; indent its keys below '{dotted}:'"
    wanted = _WANTED.get(kind.split("_")[0])
    if wanted is not None and (kind.endswith("_type") or kind == "int_from_float"):
        return f"{shown} is not {wanted}" + _type_hint(value, kind)
    return f"{shown}: {entry['msg']}"


def _type_hint(value: Any, kind: str) -> str:
    """How to write what was meant, where that can be told."""
    if kind.startswith("string") and not isinstance(value, dict | list):
        return f'; write it in quotes: "{_scalar(value)}"'
    if kind.startswith("int") and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if kind.startswith(("int", "float")) and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value):
        return f"; write it without quotes: {value}"
    if kind.startswith("bool") and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if kind.startswith("tuple"):
        return "; write [" + _scalar(value).strip("[]") + "]"
    return ""


def _nearest_choice(value: Any, expected: str) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean '{close[0]}'?" if close and len(choices) > 1 else ""


def _line_of(node: Any, loc: tuple[int | str, ...]) -> str:
    """``:line`` of the deepest part of ``loc`` that stands below ``node``, the root of the file."""
    line = ""
    for part in loc:
        if not isinstance(node, MappingNode):
            break
        entry = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        if entry is None:
            break
        line, node = f":{entry[0].start_mark.line + 1}", entry[1]
    return line


# --- writing


def _dump_section(section: BaseModel, indent: str) -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _dump_section(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """A value as YAML flow text: JSON, with plain words left unquoted."""
    if isinstance(value, BaseModel):  # an entry of a list of sections
        value = {name: getattr(value, name) for name in type(value).model_fields}  # dict() would take a field named keys for a method
    if isinstance(value, str):
        plain = _PLAIN_TEXT.fullmatch(value) and value.lower() not in _YAML_WORDS
        return value if plain else _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_scalar(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, default=str)


def _quoted(text: str) -> str:
    """A double-quoted YAML string; what is not printable is escaped by code point (JSON's surrogate pairs are not YAML)."""
    escaped = (f"\\{c}" if c in '"\\' else c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return '"' + "".join(escaped) + '"'


def _visible(text: str) -> str:
    """Short, and on one line of a terminal whatever it holds."""
    return _shorten(text if text.isprintable() else _quoted(text)[1:-1])


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _type_text(field: FieldInfo) -> str:
    """Type and limits in words."""
    limits = " and ".join(_limits_text(field.metadata))
    if not limits:
        return _annotation_text(field.annotation)
    name, null, _ = _annotation_text(field.annotation).partition(" or null")
    return f"{name} {limits}{null}"


def _limits_text(metadata: Sequence[Any]) -> Iterator[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits_text(item.metadata)
        for name, sign in signs.items():
            if isinstance(item, getattr(annotated_types, name.capitalize())):
                yield f"{sign} {_scalar(getattr(item, name))}"


def _annotation_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return " ".join([_annotation_text(arguments[0]), " and ".join(_limits_text(arguments[1:]))]).rstrip()
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _annotation_text(argument) for argument in arguments)
    if origin is tuple:
        return "list of " + _annotation_text(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[annotation]
