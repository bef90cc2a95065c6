"""Affine memories on flash-linear-attention's kernels: what goes in and comes out, on twins of the same signatures in float64; the choice
and its refusals; where the package is installed, its own kernels in triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memory_mgmt.devices import device_named
from models.config import MemoryModuleConfig, ModelConfig
from models.errors import UserError
from models.memory import fla_kernels, kernel_choice, kernels
from models.memory.kernel_choice import Recurrence, choose, explain, missing_fla, recurrence_of
from models.memory.protocol import LocalCarry, build_memory
from tests.models.memory.conformance_cases import CASES, B, D, T, make, make_state, make_x, whole
from tests.models.memory.fla_twins import TWINS
from trainer.config_file import resolve
from trainer.evals.loading import alone
from trainer.interchange.families import hf_config
from trainer.memory_kernels import check_memory_kernel

AFFINE = ("gated_deltanet", "mom, dense", "mamba2", "mamba2, groups", "gsa")
WHOLE, PACKED = whole(), whole(packed=True)
RANGES = {"whole": ((0, T),), "folded": ((0, 9), (30, T), (9, 30)), "starts at a document": ((16, T), (0, 16))}


class OneOfMany(LocalCarry):
    """Makes a module take the path of a split sequence while there is one rank only."""

    local = False


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "by_fla", lambda *case: True)
    monkeypatch.setattr(fla_kernels, "operators", lambda: TWINS)


def results(module, forward, x, state, bounds):
    """Output, state after, gradients of the input, the given state and the parameters."""
    given = {name: value.clone().requires_grad_() for name, value in state.items()}
    y, after = forward(x, given, bounds)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    loss = (y * weight).sum() + sum(value.square().sum() for value in after.values())
    found = torch.autograd.grad(loss, [x, given["state"], *module.parameters()], allow_unused=True)
    return [y, *after.values(), *(g for g in found if g is not None)]


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize(
    ("packed", "ranges", "tile", "split"),
    [
        (False, "whole", 0, False),
        (False, "folded", 0, True),
        (True, "whole", 5, False),
        (True, "folded", 7, True),
        (True, "starts at a document", 0, True),
    ],
)
def test_equals_the_eager_kernel(name, packed, ranges, tile, split, twins, monkeypatch):
    """One process, and the path of a split sequence; tiles; ranges in any order; documents at, beside and far from all of these."""
    module, state = make(name), make_state(name)
    module.tile_tokens, module.carry = tile, OneOfMany() if split else LocalCarry()
    bounds = (PACKED if packed else WHOLE).with_ranges(RANGES[ranges])
    x = torch.cat([make_x()[:, a:b] for a, b in bounds.ranges], 1).requires_grad_()
    got = results(module, module, x, state, bounds)
    monkeypatch.setattr(kernels, "by_fla", lambda *case: False)
    want = results(module, module, x, state, bounds)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", AFFINE)
def test_equals_the_token_recurrence(name, twins):
    module, state, x = make(name), make_state(name), make_x().requires_grad_()
    for a, b in zip(results(module, module, x, state, PACKED), results(module, module.oracle, x, state, PACKED), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", AFFINE)
def test_a_plan_follows_it_on_fake_tensors(name, monkeypatch):
    """Without the package: shapes, dtypes and gradients of a layer are those of the eager kernel."""
    found = []
    for fla in (True, False):
        monkeypatch.setattr(kernels, "by_fla", lambda *case, fla=fla: fla)
        with FakeTensorMode():
            memory = MemoryModuleConfig(**CASES[name].settings)
            module = build_memory(ModelConfig(d_model=D, n_heads=2, layers=("memory",), memory=memory))
            x = torch.randn(B, T, D, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                y, after = module(x, None, WHOLE)
            (y.sum() + after["state"].sum()).backward()
        leaves = [x.grad, y, after["state"], *(p.grad for p in module.parameters() if p.grad is not None)]
        found.append([(one.shape, one.dtype) for one in leaves])
    assert found[0] == found[1]


# --- the choice ---------------------------------------------------------------------------------------------------------------

GOOD = Recurrence("gated_delta_rule", "cuda", "bf16", 128, 128, capability=(9, 0))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_choice, "_installed", lambda: "0.6.0")


def test_auto_takes_fla_where_it_can_and_says_why_not_elsewhere(installed, monkeypatch):
    assert explain(GOOD) == "gated_delta_rule: fla"
    passed_over = {
        "runs on CUDA only": GOOD._replace(device="cpu"),
        "needs compute capability 8.0, not 7.5": GOOD._replace(capability=(7, 5)),
        "takes bf16, fp16 and fp32, not fp64": GOOD._replace(precision="fp64"),
        "takes keys of at most 256, not 512": GOOD._replace(key_dim=512),
        "takes values of at least 16, not 8": GOOD._replace(value_dim=8),
        "takes slots of at least 16, not 4": GOOD._replace(rule="gated_slots", n_slots=4),
        "chooses its block sizes by timing, so that two runs may differ in their last bits (train.deterministic)": GOOD._replace(
            deterministic=True
        ),
        "runs the products of fp32 in TF32": GOOD._replace(precision="fp32"),
    }
    for reason, case in passed_over.items():
        assert choose(case) == ("eager", [("fla", reason)])
    for version, reason in {"": "is not installed", "0.5.1": "knows flash-linear-attention 0.6, and 0.5.1 is installed"}.items():
        monkeypatch.setattr(kernel_choice, "_installed", lambda version=version: version)
        assert explain(GOOD).startswith("gated_delta_rule: eager; not fla: ") and explain(GOOD).endswith(reason)
    assert choose(GOOD._replace(rule="decayed_sum", key_dim=512))[0] == "eager"  # still not installed


def test_what_is_named_is_used_or_refused(installed, monkeypatch):
    assert choose(GOOD._replace(precision="fp32"), "fla") == ("fla", [])  # left alone by auto only
    assert choose(GOOD, "eager") == ("eager", [])
    with pytest.raises(
        UserError, match=r"^model.memory.kernel: fla cannot compute the gated_delta_rule here: it runs on CUDA only; use auto"
    ):
        choose(GOOD._replace(device="cpu"), "fla")
    monkeypatch.setattr(kernel_choice, "_installed", lambda: "")
    with pytest.raises(UserError, match="it cannot be called: the package flash-linear-attention is not installed; pip install"):
        choose(GOOD, "fla")
    assert choose(GOOD, "fla", here=False) == ("fla", [])  # a plan for another machine
    with pytest.raises(UserError, match=r"its block sizes by timing.*; set train.deterministic=false, or use auto or eager"):
        choose(GOOD._replace(deterministic=True), "fla")


def test_a_layer_that_names_it_is_refused_before_it_computes(installed):
    module = make("gsa", kernel="fla")
    assert module.kernel == "fla"
    with pytest.raises(UserError, match="model.memory.kernel: fla cannot compute the gated_slots here: it runs on CUDA only"):
        module(make_x(), None, WHOLE)


def test_the_recurrence_of_a_model(installed):
    shapes = {"d_model": 128, "n_heads": 2, "layers": ("memory", "swa")}
    model = ModelConfig.model_validate({**shapes, "memory": {"kind": "gsa", "gsa": {"n_slots": 32}}})
    assert recurrence_of(model, "cuda", "bf16", (9, 0), False) == Recurrence("gated_slots", "cuda", "bf16", 64, 64, 32, (9, 0), False)
    for compute, chosen in {"routed": "eager", "dense": "fla"}.items():
        mixture = ModelConfig.model_validate({**shapes, "memory": {"kind": "mom", "mom": {"compute": compute}}})
        case = recurrence_of(mixture, "cuda", "bf16", (9, 0), False)
        assert case is not None and choose(case)[0] == chosen
    with pytest.raises(UserError, match=r"it computes every memory for every token.*; set model.memory.mom.compute=dense, or use auto"):
        choose(GOOD._replace(lanes=True), "fla")
    assert recurrence_of(model.model_copy(update={"layers": ("swa",)}), "cuda", "bf16", None, False) is None
    with pytest.raises(ValueError, match="memory.kernel is not read by memory.kind titans; leave it at auto"):
        ModelConfig.model_validate({"memory": {"kind": "titans", "kernel": "eager"}})


def test_plans_by_formula_refuse_it_named_or_chosen(installed):
    settings = ["model.memory.kind=gated_deltanet", "model.memory.head_dim=64", "train.precision=bf16", "train.deterministic=false"]
    for kernel in ("auto", "fla"):
        config = resolve(None, [*settings, f"model.memory.kernel={kernel}", "memory.plan=estimate"])
        with pytest.raises(UserError, match=f"model.memory.kernel: {kernel} takes fla's kernels.*eager"):
            check_memory_kernel(config, device_named("h100"), here=True)
        check_memory_kernel(resolve(None, [*settings, f"model.memory.kernel={kernel}"]), device_named("h100"), here=True)
    eager = resolve(None, [*settings, "model.memory.kernel=eager", "memory.plan=estimate"])
    check_memory_kernel(eager, device_named("h100"), here=True)
    chosen = resolve(None, [*settings, "memory.plan=estimate"])
    check_memory_kernel(chosen, device_named("cpu"), here=True)  # auto is eager there


def test_where_a_run_is_evaluated_or_loaded_the_kernel_is_chosen_anew():
    config = resolve(None, ["model.memory.kernel=fla"])
    assert alone(config).model.memory.kernel == "auto"
    assert hf_config(config.model, 32, "float32", 64)["longstride"]["memory"]["kernel"] == "auto"


# --- the package itself -------------------------------------------------------------------------------------------------------

needs_package = pytest.mark.skipif(missing_fla() is not None, reason=f"{missing_fla()} (pip install flash-linear-attention==0.6.0)")


def _run(*arguments: str, **environment: str) -> dict[str, dict[str, float]]:
    run = Path(__file__).with_name("fla_run.py")
    done = subprocess.run(
        [sys.executable, str(run), *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_package
@pytest.mark.timeout(1200)  # a minute of one core, which is seldom had alone
def test_its_kernels_in_tritons_interpreter_equal_the_oracle():
    found = _run("cpu", TRITON_INTERPRET="1")
    memory = [found.pop(name) for name in list(found) if name.startswith("memory of")]
    assert len(found) == 6 and len(memory) == 3
    for case, errors in found.items():
        assert errors and max(errors.values()) < 2e-5, (case, errors)
    assert all(abs(off) < 0.03 for one in memory for off in one.values()), memory  # what a plan counts, against what they allocate


@needs_package
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: fla's kernels were not tested on one")
def test_its_kernels_on_a_gpu_equal_the_oracle():
    found = _run("cuda")
    assert len(found) == 6
    for case, errors in found.items():  # products in bfloat16
        assert errors and max(errors.values()) < 3e-2, (case, errors)
