"""What Hugging Face's Llama, Mistral, Qwen2 and Qwen3 are in this product's settings, and back: ``config.json`` and names of parameters.

Everything in a ``config.json`` that changes what a model computes is either carried over or refused by name. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models.config import LayerKind, ModelConfig
from models.errors import UserError

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""``model_type`` -> class."""
OWN = "longstride"
"""``model_type`` of models that no other family describes (``modeling_longstride.py``)."""
_LAYER_TYPES: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "swa"}
_THETA = 10_000.0
_IGNORED_ROPE_KEYS = {"rope_type", "type", "rope_theta", "finetuned"}
_ROPE_KEYS = {
    "default": {"factor"},  # Mistral's and Qwen's files carry it along; nothing reads it
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"
    },
}  # fmt: skip


# --- from config.json


def read_hf_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model directory. Raises UserError naming what is wrong with it, or that the directory is none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such directory; import reads local directories and downloads nothing\n"
            f"a model of the hub is fetched with: hf download {folder} --local-dir DIR"
        )
    file = folder / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a directory that save_pretrained wrote") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: is not valid JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object")
    return content


def model_config(hf: Mapping[str, Any], file: Path) -> ModelConfig:
    """The model that ``config.json`` (``file``, for messages) describes. Raises UserError naming a key that this product cannot follow."""
    try:
        return _model_config(hf, file)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{file}: a value is not of the kind that transformers writes there: {' '.join(str(error).split())[:200]}"
        ) from None


def _model_config(hf: Mapping[str, Any], file: Path) -> ModelConfig:
    family = hf.get("model_type")
    if family == OWN:
        return _validated(dict(hf.get("longstride") or {}) | {"vocab_size": hf.get("vocab_size")}, file)
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{file}: model_type {family!r} cannot be imported; these can: {', '.join(FAMILIES)}")
    _refuse(hf, file)
    read = _Reader(hf, file)
    d_model, n_heads, n_layers = read.number("hidden_size"), read.number("num_attention_heads"), read.number("num_hidden_layers")
    head_dim = hf.get("head_dim") or (128 if family == "qwen3" else d_model // n_heads)
    kinds, window = _layers(hf, file, n_layers)
    values = {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": hf.get("num_key_value_heads") or (8 if family == "mistral" else n_heads),
        "head_dim": head_dim,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "d_ff": read.number("intermediate_size"),
        "layers": kinds if len(set(kinds)) > 1 else kinds[:1],
        "n_layers": n_layers,
        "vocab_size": read.number("vocab_size"),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "init_std": float(hf.get("initializer_range", 0.02)),
        "rope": _rope(hf, file),
    }
    return _validated(values | ({} if window is None else {"window": window}), file)


def _validated(values: dict[str, Any], file: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}: as model.{place}: {first['msg'].removeprefix('Value error, ')}".replace("model.:", "the model:")
        ) from None


def _refuse(hf: Mapping[str, Any], file: Path) -> None:
    """What would make the model compute something else."""
    plain = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "attention_dropout": 0.0,
    }
    for key, value in plain.items():
        if hf.get(key, value) not in (value, None):
            shown = "is set" if isinstance(hf[key], dict) else str(hf[key])
            raise UserError(f"{file}: {key} {shown}: such models cannot be imported, only with {key} {json.dumps(value)}")
    if hf.get("auto_map"):
        raise UserError(f"{file}: auto_map names code of the model's own, which is not run, so what it computes is not known")


class _Reader:
    def __init__(self, hf: Mapping[str, Any], file: Path) -> None:
        self._hf, self._file = hf, file

    def number(self, key: str) -> int:
        """A whole number above 0."""
        value = self._hf.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"{self._file}: {key} is {json.dumps(value)}, not a whole number above 0")
        return value


def _layers(hf: Mapping[str, Any], file: Path, n_layers: int) -> tuple[list[LayerKind], int | None]:
    """Kind of every layer, and the window."""
    family = hf["model_type"]
    window = hf.get("sliding_window", 4096) if family == "mistral" else hf.get("sliding_window")
    if family == "llama" or window is None or (family != "mistral" and not hf.get("use_sliding_window", False)):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"{file}: sliding_window is {json.dumps(window)}, not a whole number above 0")
    kinds: list[LayerKind]
    types = hf.get("layer_types") if family in ("qwen2", "qwen3") else None
    if types is None:
        first = hf.get("max_window_layers", 28) if family != "mistral" else 0
        kinds = ["full" if window is None or i < first else "swa" for i in range(n_layers)]
    else:
        unknown = [each for each in types if each not in _LAYER_TYPES]
        if unknown or len(types) != n_layers:
            what = f"layer type {unknown[0]!r}" if unknown else f"{len(types)} entries for {n_layers} layers"
            raise UserError(f"{file}: layer_types: {what}; known types: {', '.join(_LAYER_TYPES)}")
        kinds = [_LAYER_TYPES[each] for each in types]
        if "swa" in kinds and window is None:
            raise UserError(f"{file}: layer_types has sliding_attention, but use_sliding_window and sliding_window name no window")
    return kinds, window if "swa" in kinds else None


def _rope(hf: Mapping[str, Any], file: Path) -> dict[str, Any]:
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", hf.get("rope_theta") or _THETA))
    if kind not in _ROPE_KEYS:
        raise UserError(f"{file}: rope type {kind!r} cannot be imported; these can: {', '.join(_ROPE_KEYS)}")
    if rope.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UserError(f"{file}: partial_rotary_factor: heads that are rotated in part cannot be imported")
    unknown = sorted(set(rope) - _IGNORED_ROPE_KEYS - _ROPE_KEYS[kind])
    if unknown:
        raise UserError(f"{file}: rope {kind}: the key {unknown[0]!r} is not known")
    if kind == "default":
        return {"theta": theta}
    original = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    factor = rope.get("factor") or (hf.get("max_position_embeddings", 0) / original if original and kind == "yarn" else None)
    if factor is None or (kind != "linear" and type(original) is not int):
        raise UserError(f"{file}: rope {kind}: 'factor' and the original length are needed")
    values: dict[str, Any] = {"theta": theta, "scaling": kind, "factor": float(factor)}
    if kind == "linear":
        return values
    values["original_max_positions"] = original
    bands = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow", "attention_factor")
    values |= {key: float(rope[key]) for key in bands if rope.get(key) is not None}
    if kind == "yarn":
        if rope.get("truncate", True) is not True:
            raise UserError(f"{file}: rope yarn: truncate {rope['truncate']}: only true can be imported")
        if rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            values["attention_factor"] = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return values


def _mscale(factor: float, times: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0


# --- to config.json


def family_of(config: ModelConfig) -> str:
    """``model_type`` of the family that ``config`` belongs to; ``longstride`` where there is none."""
    kinds = set(config.layer_kinds)
    if "memory" in kinds or config.table_shapes or (config.qkv_bias and config.qk_norm):
        return OWN
    if config.qkv_bias or config.qk_norm:
        return "qwen2" if config.qkv_bias else "qwen3"
    return {frozenset({"full"}): "llama", frozenset({"swa"}): "mistral"}.get(frozenset(kinds), OWN)


def hf_config(config: ModelConfig, vocab_size: int, dtype: str, max_positions: int) -> dict[str, Any]:
    """``config.json`` of ``config`` in its family, in the spelling that all releases of transformers read."""
    family = family_of(config)
    common = {
        "model_type": family,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "num_hidden_layers": len(config.layer_kinds),
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if family == OWN:
        own = config.model_dump(mode="json", exclude={"vocab_size"})
        own["memory"]["kernel"] = "auto"  # whoever loads it has another machine
        auto_map = {
            "AutoConfig": "configuration_longstride.LongstrideConfig",
            "AutoModelForCausalLM": "modeling_longstride.LongstrideForCausalLM",
        }
        return {"architectures": ["LongstrideForCausalLM"], "auto_map": auto_map, **common, "longstride": own}
    values = {
        "architectures": [FAMILIES[family]],
        **common,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.ff_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        **_rope_keys(config),
    }
    windowed = "swa" in config.layer_kinds
    if family == "llama":
        return values | {"attention_bias": False, "mlp_bias": False}
    if family == "mistral":
        return values | {"sliding_window": config.window}
    types = {kind: name for name, kind in _LAYER_TYPES.items()}
    return values | {
        **({"attention_bias": False} if family == "qwen3" else {}),
        "use_sliding_window": windowed,
        "sliding_window": config.window if windowed else None,
        "max_window_layers": config.layer_kinds.index("swa") if windowed else len(config.layer_kinds),
        "layer_types": [types[kind] for kind in config.layer_kinds],
    }


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.scaling == "ntk":  # is another base, and nothing else
        head_dim = config.attention_head_dim
        theta = rope.theta * rope.factor ** (head_dim / (head_dim - 2)) if head_dim > 2 else rope.theta
        return {"rope_theta": theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


# --- names of parameters

_IN_BLOCK = {
    "norm1": "input_layernorm",
    "mixer.wq": "self_attn.q_proj",
    "mixer.wk": "self_attn.k_proj",
    "mixer.wv": "self_attn.v_proj",
    "mixer.wo": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "norm2": "post_attention_layernorm",
    "ffn.w_gate": "mlp.gate_proj",
    "ffn.w_up": "mlp.up_proj",
    "ffn.w_down": "mlp.down_proj",
}
_OUTSIDE = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""What old files hold besides parameters; it follows from the settings."""


def hf_name(name: str, family: str) -> str:
    """The name that ``family`` gives to this product's parameter ``name``."""
    if family == OWN:
        return f"model.{name}"
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} has no name in family {family}")
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"
