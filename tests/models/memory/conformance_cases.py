"""The small modules on which the conformance suite runs: one entry of ``CASES`` per kind (or more, for options that change the model).

To add an architecture: register it in ``models.memory.protocol.BUILDERS`` and give it a case here; ``test_conformance.py`` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from models.batch import Bounds
from models.config import MemoryModuleConfig, ModelConfig, TitansConfig
from models.memory.context import MemoryAsContext
from models.memory.protocol import MemoryModule, State, build_memory
from models.memory.stack import Stacked, StackMemory
from models.memory.stack_shapes import StackShapes
from models.memory.titans import Titans
from models.memory_config import HEADWISE
from models.transformer import Block

D, B, T = 12, 2, 41
DOCUMENTS = ((0, 1, 7, 8, 16, 33), (0, 20, 21, 22))
SPLIT_T = 48
"""Length of the sequences that are split: divides by 2, 3 and 4 ranks in both layouts, and no shard is a multiple of a chunk of 8."""


def as_it_comes(module: Any) -> None:
    """A module whose memory lasts with its initial gates."""


@dataclass(frozen=True)
class Case:
    """A module of one architecture, small, and what the suite needs to know of it that ``traits`` do not say."""

    settings: Mapping[str, Any]
    """``model.memory``, kind included."""
    slow: Callable[[Any], None] = as_it_comes
    """Makes the memory last (gates that hardly forget): a leak hides below rounding where an early token is forgotten anyway."""
    at_size: Mapping[str, Any] = field(default_factory=dict)
    """Settings changed where bytes and flops are measured, on longer sequences."""
    chooses: bool = False
    """It reads the few entries that are nearest: rounded to bfloat16 some are others, which is no error of arithmetic."""
    scale: float = 0.5
    """Of the projections' weights: smaller where one projection reads what another one made, twice over per segment."""


def _slow_deltanet(module: Any) -> None:
    module.A_log.fill_(-4.0)
    module.dt_bias.fill_(-4.0)


def _slow_slots(module: Any) -> None:
    module.w_decay.weight.mul_(0.2)
    module.gate_temperature = 40.0


def _slow_titans(module: Any) -> None:
    for i, gate in enumerate(module.gates):
        if gate in ("alpha", "eta"):  # hardly forgets; momentum does not last
            module.rate_bias[:, i] = -7.0 if gate == "alpha" else -0.5
    if module.network.kind == "linear":  # begins at 0, and what reads 0 does not show what it sees
        module.start_in.normal_(generator=torch.Generator().manual_seed(5))


def _slow_context(module: Any) -> None:
    _slow_titans(module.memory)


def _mac(segment: int = 8, at_size: int = 64, expand_v: float = 1.5, persistent: int = 2, residual: bool = False, **titans: Any) -> Case:
    titans = {"expansion": 1.5, **titans}
    sized = {**titans, **({"reset_every": 256} if "reset_every" in titans else {})}
    return Case(
        {
            "kind": "titans",
            "attach": "mac",
            "expand_v": expand_v,
            "titans": TitansConfig(**titans),
            "mac": {"segment": segment, "persistent": persistent, "residual": residual},
        },
        slow=_slow_context,
        at_size={"titans": TitansConfig(**sized), "mac": {"segment": at_size, "persistent": persistent, "residual": residual}},
        scale=0.25,
    )


def _titans(expand_v: float = 1.5, **settings: Any) -> Case:
    titans = {"chunk_size": 8, "expansion": 1.5, **settings}
    return Case(
        {"kind": "titans", "expand_v": expand_v, "titans": TitansConfig(**titans)},
        slow=_slow_titans,
        at_size={"titans": TitansConfig(**{**titans, "chunk_size": 64, **({"reset_every": 256} if "reset_every" in settings else {})})},
    )


def _slow_slot_gates(module: Any) -> None:
    module.gate_bias.fill_(4.0 if module.lm2 else -4.0)


def _slots(variant: str) -> Case:
    return Case(
        {"kind": "slots", "slots": {"variant": variant, "n_slots": 5, "segment": 8}},
        slow=_slow_slot_gates,
        at_size={"slots": {"variant": variant, "n_slots": 16, "segment": 64}},
    )


def _neurocache(chooses: bool = False, **settings: Any) -> Case:
    own = {"compression": 2, "segment": 8, **settings}
    at_size = {**own, "compression": 4, "segment": 64, "cache_size": 1024, "top_k": 16}
    return Case({"kind": "neurocache", "neurocache": own}, at_size={"neurocache": at_size}, chooses=chooses)


CASES: dict[str, Case] = {
    "gated_deltanet": Case(
        {"kind": "gated_deltanet", "chunk_size": 8, "expand_v": 1.5},
        slow=_slow_deltanet,
        at_size={"chunk_size": 64},
    ),
    "gsa": Case(
        {"kind": "gsa", "expand_v": 1.5, "gsa": {"n_slots": 5, "chunk_size": 8}},
        slow=_slow_slots,
        at_size={"gsa": {"n_slots": 32, "chunk_size": 16}},
    ),
    "mamba2": Case(
        {"kind": "mamba2", "chunk_size": 8, "mamba2": {"state_dim": 5, "expand": 1.5}},
        slow=_slow_deltanet,
        at_size={"chunk_size": 64, "mamba2": {"state_dim": 32, "expand": 2.0}},
    ),
    "mamba2, groups": Case(
        {"kind": "mamba2", "chunk_size": 8, "conv_kernel": 1, "mamba2": {"state_dim": 5, "expand": 1.0, "n_groups": 2}},
        slow=_slow_deltanet,
        at_size={"chunk_size": 32, "mamba2": {"state_dim": 32, "expand": 2.0, "n_groups": 2}},
    ),
    "infini": Case(
        {"kind": "infini", "infini": {"segment": 8}},
        at_size={"infini": {"segment": 64}},
    ),
    "infini, delta": Case(
        {"kind": "infini", "infini": {"segment": 5, "delta": True}},
        at_size={"infini": {"segment": 64, "delta": True}},
    ),
    "mom": Case(
        {"kind": "mom", "chunk_size": 8, "expand_v": 1.5, "mom": {"n_memories": 3, "top_k": 2}},
        slow=_slow_deltanet,
        at_size={"chunk_size": 64},
    ),
    "mom, dense": Case(
        {"kind": "mom", "chunk_size": 8, "expand_v": 1.5, "mom": {"n_memories": 3, "top_k": 2, "compute": "dense"}},
        slow=_slow_deltanet,
        at_size={"chunk_size": 64},
    ),
    "mom, one of four": Case(
        {"kind": "mom", "chunk_size": 4, "conv_kernel": 1, "mom": {"n_memories": 4, "top_k": 1, "shared": False}},
        slow=_slow_deltanet,
        at_size={"chunk_size": 32},
    ),
    "slots": _slots("memformer"),
    "slots, lm2": _slots("lm2"),
    "fam": Case(
        {"kind": "fam", "fam": {"n_feedback": 3, "block": 4, "memory_blocks": 2}},
        at_size={"fam": {"n_feedback": 16, "block": 32, "memory_blocks": 2}},
    ),
    "neurocache": _neurocache(cache_size=64, top_k=64, neighborhood=1),
    "neurocache, nearest": _neurocache(cache_size=44, top_k=12, neighborhood=2, chooses=True),
    "titans": _titans(),
    "titans, linear, reset": _titans(network="linear", reset_every=16),
    "titans, lact": _titans(variant="lact"),
    "titans, token, reset": _titans(network="linear", read="token", reset_every=16),
    "titans, shifted": _titans(read="shifted"),
    "titans, mac": _mac(),
    "titans, mac, lact": _mac(segment=6, persistent=0, residual=True, variant="lact"),
    "titans, mac, linear, reset": _mac(network="linear", reset_every=16),
    "hmt": Case(
        {"kind": "hmt", "hmt": {"segment": 8, "summary": 3, "sensory": 2, "cache": 4}},
        at_size={"hmt": {"segment": 128, "sensory": 16, "cache": 6}},
    ),
    "armt": Case(
        {"kind": "armt", "armt": {"segment": 8, "tokens": 3, "key_dim": 4, "features": 2}},
        at_size={"armt": {"segment": 128, "tokens": 8, "key_dim": 16}},
    ),
    "rmt": Case({"kind": "rmt", "rmt": {"segment": 8, "tokens": 3}}, at_size={"rmt": {"segment": 128, "tokens": 8}}),
}


def _of_heads(case: Case) -> Case:
    """The case with heads that divide among no number of ranks, some of which share keys where the kind has groups."""
    if case.settings["kind"] != "mamba2":
        return replace(case, settings={**case.settings, "n_heads": 5, "head_dim": 4})
    groups = 3 if case.settings["mamba2"].get("n_groups", 1) > 1 else 1
    sizes = {"state_dim": 5, "expand": 1.0 if groups > 1 else 1.25, "n_groups": groups}
    return replace(case, settings={**case.settings, "n_heads": 6 if groups > 1 else 5, "mamba2": sizes})


_SAME_HEADS = ("mom, dense", "mom, one of four", "titans, linear, reset", "titans, shifted")
"""Cases that differ from others in what happens inside a head."""

BY_HEADS: dict[str, Case] = {
    f"{name}, by heads": _of_heads(case)
    for name, case in CASES.items()
    if case.settings["kind"] in HEADWISE and case.settings.get("attach", "mixer") == "mixer" and name not in _SAME_HEADS
}
"""The kinds whose heads ranks may share: ``CASES`` have two."""


def config_of(name: str, d_model: int = D, **changed: Any) -> ModelConfig:
    """The settings of case ``name``; ``changed``: those of its memory."""
    memory, heads = MemoryModuleConfig(**{**{**CASES, **BY_HEADS}[name].settings, **changed}), 2
    layers = ("full", "swa") if memory.around_stack else ("swa", "memory")
    return ModelConfig(d_model=d_model, n_heads=heads, head_dim=d_model // heads * 2, layers=layers, window=d_model // 2, memory=memory)


def make(name: str, dtype: torch.dtype = torch.float64, slow: bool = True, d_model: int = D, **changed: Any) -> MemoryModule:
    """The module of case ``name`` with weights large enough that every part of it matters. ``changed``: settings."""
    case, config = {**CASES, **BY_HEADS}[name], config_of(name, d_model, **changed)
    memory, layers = config.memory, config.layers
    module = (MemoryAsContext(config) if memory.attach == "mac" else build_memory(config)).to(dtype)
    if isinstance(module, StackMemory):
        module = Stacked(module, nn.ModuleList(Block(config, kind) for kind in layers), StackShapes.of(config)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for owner in module.modules():
            for parameter_name, p in owner.named_parameters(recurse=False):
                own = owner is module or isinstance(owner, Titans)
                value = owner.init_parameter(parameter_name, p.shape, generator) if own else None  # type: ignore[operator]
                p.copy_(torch.randn(p.shape, generator=generator) * case.scale if value is None else value)
        if slow:
            case.slow(module)
    return module


def make_x(tokens: int = T, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inputs [B, tokens, D]."""
    return torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def make_state(name: str, slow: bool = True) -> State:
    """The state that some earlier text left in `make(name, slow=slow)`."""
    with torch.no_grad():
        earlier = torch.randn(B, SPLIT_T, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        return make(name, slow=slow)(earlier, None, whole(SPLIT_T))[1]


def whole(tokens: int = T, packed: bool = False) -> Bounds:
    """Bounds of a whole sequence; ``packed``: documents that begin at, beside and far from bounds of chunks and shards."""
    return Bounds(tokens, ((0, tokens),), DOCUMENTS) if packed else Bounds.whole(B, tokens)
