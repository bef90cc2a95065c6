"""parallel.memory_exchange auto is settled before a run; what a memory cannot do is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from models.errors import UserError
from trainer.config import RunConfig
from trainer.explain import explain_run
from trainer.planning import plan_run, target_for
from trainer.settling import open_settings, settled
from trainer.tracing import trace_steps


def config(kind: str = "gated_deltanet", seq_len: int = 65536, layers: tuple[str, ...] = ("memory",), **parallel: Any) -> RunConfig:
    given = {"d_model": 512, "n_heads": 8, "layers": layers, "n_layers": 2, "memory": {"kind": kind, "n_heads": 8}}
    return RunConfig.model_validate({"model": given, "data": {"seq_len": seq_len}, "train": {"precision": "bf16"}, "parallel": parallel})


def test_auto_becomes_an_exchange_and_says_why() -> None:
    asked = config(cp=4, memory_exchange="auto")
    assert open_settings(asked) == ["parallel.memory_exchange"]
    found = settled(asked, "h100")
    assert found.config.parallel.memory_exchange in ("ring", "ulysses") and not open_settings(found.config)
    assert found.lines()[0].startswith(f"parallel.memory_exchange: {found.config.parallel.memory_exchange}, for 4 ranks (inside a node)")
    assert settled(config("titans", cp=4, memory_exchange="auto"), "h100").config.parallel.memory_exchange == "ulysses"
    both = settled(config(layers=("full", "memory"), cp=4, memory_exchange="auto", sequence="auto"), "h100")
    assert [line.split(":")[0] for line in both.lines() if line[0] != " "] == ["parallel.sequence", "parallel.memory_exchange"]


@pytest.mark.parametrize(("kind", "layers", "cp"), [("slots", ("memory",), 4), ("titans", ("full",), 4), ("gsa", ("memory",), 1)])
def test_one_exchange_needs_no_choice(kind: str, layers: tuple[str, ...], cp: int) -> None:
    found = settled(config(kind, layers=layers, cp=cp, memory_exchange="auto"), "h100")
    assert found.config.parallel.memory_exchange == "states" and len(found.lines()) == 1


def test_exchange_and_degrees_are_settled_together() -> None:
    found = settled(config(seq_len=4096, ranks=2, dp_shard="auto", cp="auto", memory_exchange="auto"), "h100")
    assert not open_settings(found.config) and found.config.parallel.memory_exchange != "auto"
    assert any(line.startswith("parallel.memory_exchange: ") for line in found.lines())


@pytest.mark.parametrize(
    ("kind", "layers", "parallel", "words"),
    [
        ("titans", ("memory",), {"cp": 2, "memory_exchange": "ring"}, r"ring sends .* affine states .*; model.memory.kind titans .*states"),
        ("slots", ("memory",), {"cp": 2, "memory_exchange": "ulysses"}, r"ulysses deals out heads .*; those of model.memory.kind slots do"),
        ("gsa", ("memory",), {"cp": 16, "memory_exchange": "ulysses"}, r"16 ranks .* has 8; .*states, or model.memory.n_heads=16"),
        ("gsa", ("full",), {"cp": 2, "memory_exchange": "ring"}, r"ring: no layer of model.layers is a memory"),
    ],
)  # fmt: skip
def test_what_a_memory_cannot_do_is_refused_by_name(kind: str, layers: tuple[str, ...], parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(kind, layers=layers, **parallel)


def test_formulas_are_refused_and_explain_names_it() -> None:
    other = config(cp=2, memory_exchange="ring")
    with pytest.raises(UserError, match=r"parallel\.memory_exchange: ring needs a traced step"):
        plan_run(other.model_copy(update={"memory": other.memory.model_copy(update={"plan": "estimate"})}), "h100")
    both = config(cp=2, layers=("full", "memory"), memory_exchange="ring")
    assert "memory layers: ring over 2 ranks" in explain_run(both, "h100")


def test_a_plan_knows_what_an_exchange_holds() -> None:
    """Titans' fast weights of every chunk are on all ranks where sums are reduced, of its own heads where heads are exchanged."""
    targets = [target_for(config("titans", seq_len=4096, cp=4, memory_exchange=each), "h100") for each in ("states", "ulysses")]
    reduced, heads = (trace.peak()[0] for trace in trace_steps([target.request() for target in targets]))
    states = 2 * 64 * 8 * 2 * (2 * 64 * 256) * 4  # layers, chunks, heads, weights and momentum, numbers, bytes
    assert reduced - heads > states / 2
