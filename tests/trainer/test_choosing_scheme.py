"""parallel.sequence auto is settled before a run; what a scheme cannot do is refused by name, with the setting that can."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from models.errors import UserError
from parallel.dims import ParallelDims
from trainer.config import RunConfig
from trainer.explain import explain_run
from trainer.planning import plan_run, predict, target_for
from trainer.settling import open_settings, settled
from trainer.tracing import trace_steps


def config(seq_len: int = 65536, layers: tuple[str, ...] = ("full",), heads: tuple[int, int] = (8, 2), **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"d_model": 256, "n_heads": heads[0], "n_kv_heads": heads[1], "layers": layers, "n_layers": 2},
            "data": {"seq_len": seq_len},
            "train": {"precision": "bf16"},
            "parallel": parallel,
        }
    )


def test_auto_becomes_a_scheme_and_says_why() -> None:
    asked = config(cp=8, sequence="auto")
    assert open_settings(asked) == ["parallel.sequence"]
    found = settled(asked, "h100")
    assert found.config.parallel.sequence == "ring" and not open_settings(found.config)
    assert found.lines()[0].startswith("parallel.sequence: ring, for 8 ranks (inside a node), 8 query and 2 key/value heads, 8,192 tokens")
    assert len(found.lines()) == 2 + 5, "the choice, three schemes and two degrees of the hybrid, the reason"


def test_short_shards_over_nodes_become_a_hybrid_with_its_degree() -> None:
    found = settled(config(seq_len=32768, heads=(32, 8), cp=32, sequence="auto"), "h100").config.parallel
    assert found.sequence == "ring_x_ulysses" and found.ulysses in (2, 4, 8)
    degree = settled(config(cp=8, sequence="ring_x_ulysses"), "h100").config.parallel
    assert degree.sequence == "ring_x_ulysses" and degree.ulysses in (2, 4)


@pytest.mark.parametrize(("layers", "cp"), [(("full",), 1), (("swa",), 8), (("memory",), 8)])
def test_nothing_to_exchange_is_a_ring(layers: tuple[str, ...], cp: int) -> None:
    found = settled(config(layers=layers, cp=cp, sequence="auto"), "h100")
    assert found.config.parallel.sequence == "ring" and len(found.lines()) == 1


def test_scheme_and_degrees_are_settled_together() -> None:
    asked = config(seq_len=4096, ranks=2, dp_shard="auto", cp="auto", sequence="auto")
    found = settled(asked, "h100")
    assert not open_settings(found.config) and found.config.parallel.sequence != "auto"
    assert any(line.startswith("parallel.sequence: ") for line in found.lines())


@pytest.mark.parametrize(
    ("parallel", "heads", "words"),
    [
        ({"cp": 8, "sequence": "ulysses"}, (4, 2), r"ulysses .* 8 ranks .*n_heads is 4.*ulysses one of 2, 4.*ring"),
        ({"cp": 8, "sequence": "ring_x_ulysses", "ulysses": 3}, (8, 2), r"ulysses 3 does not divide .* one of 2, 4.*ulysses or ring"),
        ({"cp": 2, "sequence": "ring_x_ulysses"}, (8, 2), r"ring_x_ulysses does not divide parallel\.cp 2"),
        ({"cp": 8, "ulysses": 2}, (8, 2), r"parallel\.ulysses 2 is the degree inside ring_x_ulysses.*leave parallel\.ulysses null"),
        ({"cp": 8, "head_chunk": 2}, (8, 2), r"parallel\.head_chunk 2: .* ring passes all heads.*ulysses, ring_x_ulysses or allgather_kv"),
        ({"cp": 8, "sequence": "auto", "head_chunk": 2}, (8, 2), r"parallel\.head_chunk 2: parallel\.sequence auto"),
    ],
)  # fmt: skip
def test_what_a_scheme_cannot_do_is_refused_by_name(parallel: dict[str, Any], heads: tuple[int, int], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(heads=heads, **parallel)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, r"parallel\.kv_dtype fp32 is wider than keys and values of train\.precision bf16: set it compute"),
        ({"train": {"precision": "fp64"}, "model": {"layers": ["memory"]}}, r"kv_dtype fp32 is of keys .* model\.layers has none: set it"),
        (
            {"train": {"precision": "fp64", "segment_tokens": 64}, "model": {"layers": ["swa", "memory"], "window": 32}},
            r"kv_dtype fp32: windows hand .* train\.segment_tokens .*: set it compute",
        ),
    ],
)
def test_a_dtype_of_keys_that_makes_no_sense_is_refused(sections: dict[str, Any], words: str) -> None:
    values = config().model_dump() | {"parallel": {"kv_dtype": "fp32"}}
    values = {name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value for name, value in values.items()}
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(values)


def test_keys_that_travel_in_fewer_bits_are_counted_and_explained() -> None:
    asked = config(cp=8, sequence="auto", kv_dtype="bf16")
    asked = RunConfig.model_validate(asked.model_dump() | {"train": {"precision": "fp32"}})
    wide = asked.model_copy(update={"parallel": asked.parallel.model_copy(update={"kv_dtype": "compute"})})
    lines = ["\n".join(settled(one, "h100").lines()) for one in (asked, wide)]
    sent = [float(re.findall(r" ring +sends ([\d,.]+) MiB", text)[0].replace(",", "")) for text in lines]
    assert sent[0] == pytest.approx(sent[1] * 2 / 3, rel=0.01), "keys twice, their gradients once and as they were"
    assert "keys and values: rounded to bf16 once, on one rank too, and sent so" in explain_run(settled(asked, "h100").config, "h100")


def test_two_rings_are_refused_where_they_are_one_and_offered_across_nodes() -> None:
    cases: list[dict[str, Any]] = [{"cp": 8, "ring_inner": 3}, {"cp": 8, "ring_inner": 8}, {"cp": 5, "ring_inner": 5}]
    for wrong in cases:
        with pytest.raises(ValidationError, match=r"set (parallel\.ring_inner one of 2, 4, or )?parallel\.sequence=ring"):
            config(sequence="double_ring", **wrong)
    with pytest.raises(ValidationError, match=r"parallel\.ring_inner 2 is the inner ring of double_ring"):
        config(cp=8, ring_inner=2)
    found = settled(config(cp=8, sequence="double_ring"), "h100").config.parallel
    assert found.sequence == "double_ring" and found.ring_inner in (2, 4) and found.ulysses is None


def test_formulas_and_unsettled_schemes_are_refused() -> None:
    settings: list[tuple[dict[str, Any], str]] = [
        ({"kv_residence": "host"}, "kv_residence: host"),
        ({"cp": 2, "layout": "per_document"}, "layout: per_document"),
    ]
    for parallel, words in settings:
        other = config(**parallel)
        estimated = other.model_copy(update={"memory": other.memory.model_copy(update={"plan": "estimate"})})
        with pytest.raises(UserError, match=f"parallel.{words} needs a traced step"):
            plan_run(estimated, "h100")
    with pytest.raises(UserError, match=r"parallel\.sequence: auto has not been resolved"):
        ParallelDims.from_config(config(cp=2, sequence="auto").parallel)


def test_ulysses_needs_no_zigzag() -> None:
    assert [config(cp=2, sequence=s).layout for s in ("ring", "allgather_kv", "ulysses")] == ["zigzag", "zigzag", "contiguous"]


def test_a_plan_knows_the_buffers_and_the_time_of_a_scheme() -> None:
    targets = {}
    for name, settings in {
        "whole": {"sequence": "ulysses"},
        "by one head": {"sequence": "ulysses", "head_chunk": 1},
        "gathered": {"sequence": "allgather_kv", "head_chunk": 2},
        "gathered by one": {"sequence": "allgather_kv", "head_chunk": 1},
    }.items():
        given = config(seq_len=1 << 18, cp=2, **settings)
        memory = given.memory.model_copy(update={"recompute": "block", "ffn_tile_tokens": 1024, "loss_tile_tokens": 1024})
        targets[name] = target_for(given.model_copy(update={"memory": memory}), "h100")
    traces = dict(zip(targets, trace_steps([target.request() for target in targets.values()]), strict=True))
    peak = {name: trace.peak()[0] / 2**20 for name, trace in traces.items()}
    # Values of 131,072 tokens in bf16: 8 MiB per head. Of 8 + 2 heads, three times the queries, two messages: a quarter by stages.
    assert peak["whole"] - peak["by one head"] > 200
    assert peak["gathered"] - peak["gathered by one"] > 100
    exposed = {}
    for name, target in targets.items():
        prediction = predict(target, traces[name])
        assert prediction is not None
        exposed[name] = prediction.exposed_communication_seconds
    assert 0 < exposed["by one head"] < exposed["whole"] and 0 < exposed["gathered by one"] < exposed["gathered"]
