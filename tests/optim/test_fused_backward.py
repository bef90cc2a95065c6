"""Update in the backward pass: the same numbers as after it, gradients that live for one layer, stated clipping."""

from __future__ import annotations

import functools
import gc
import io
import weakref
import zlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

from memory_mgmt.allocator_log import record_cpu_allocations
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.fused_backward import Clip, FusedBackward, fuse_backward
from tests.distributed import run_distributed
from tests.optim.test_driver import PRESETS, Tiny, make, states_of, whole_tensors

FUSED = {**PRESETS, "adamw": {}, "sgd": {}, "lomo": {}}
LINEAR = {"galore": 1e-6, "galore_8bit": 1e-4, "natural_galore": 1e-6}
"""Presets that sum micro-batches in coordinates, and how far that may be from projecting the sum; codes round the other way."""
STEPS = 4


class Part(nn.Module):
    """One unit of ``Given``."""

    def __init__(self, columns: int, rows: int, bias: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rows, bias=bias)

    def forward(self, x: torch.Tensor, name: str, seed: int) -> torch.Tensor:
        return x + dot(self, name, seed)


class Given(nn.Module):
    """A loss that is linear in the parameters, so that gradients are given: matrices' singular values fall, and what rounding does to one
    step has no say in the next gradient. Part ``seldom`` takes part in the first micro-batch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 72)
        self.up, self.down, self.few, self.seldom = Part(72, 90), Part(90, 72), Part(72, 3, bias=True), Part(72, 72)
        self.norm = nn.LayerNorm(72)
        self.head = nn.Linear(72, 67, bias=False)

    def forward(self, seed: int, first: bool) -> torch.Tensor:
        x = dot(self.embed, "embed", seed) + dot(self.norm, "norm", seed) + dot(self.head, "head", seed)
        for name in ("up", "down", "few", *(["seldom"] if first else [])):
            x = getattr(self, name)(x, name, seed)
        return x


def dot(module: nn.Module, name: str, seed: int) -> torch.Tensor:
    found = [(parameter * gradient_of(f"{name}.{key}", parameter.shape, seed)).sum() for key, parameter in module.named_parameters()]
    return torch.stack(found).sum()


@functools.cache
def gradient_of(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + zlib.crc32(name.encode()) % 997))
    if gradient.ndim == 2:
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        gradient = left * 0.5 ** torch.arange(left.shape[1]).clamp(max=20) @ right
    return gradient


def given(replicas: int = 0) -> Given:
    """``replicas`` above 0: on ranks, sharded in units."""
    torch.manual_seed(1)
    model = Given()
    if replicas:
        world = torch.distributed.get_world_size() // replicas
        shape, names = ((replicas, world), ("replicate", "shard")) if replicas > 1 else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in (model.up, model.down, model.few, model.seldom, model):
            fully_shard(unit, mesh=mesh)
    return model


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, fused: FusedBackward | None, losses: Callable, start: int = 0, stop: int = STEPS
):
    """Steps ``start`` to ``stop``; ``losses(step)``: of the micro-batches, one after the other. The norms of the steps, if fused."""
    norms = []
    for step in range(start, stop):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        *first, last = losses(step)
        for loss in first:
            loss().backward()
        if fused is None:
            last().backward()
            optimizer.step()
            optimizer.zero_grad()
            continue
        with fused.update():
            last().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        norms.append(float(fused.norm))  # type: ignore[arg-type]
    return norms


def trained(model: Given, preset: str, is_fused: bool, k: int) -> dict[str, torch.Tensor]:
    optimizer = build_optimizer(model, preset=preset, **FUSED[preset])
    run(model, optimizer, fuse_backward(model, optimizer) if is_fused else None, of_given(model, k))
    return everything(model, optimizer)


def of_given(model: Given, k: int) -> Callable:
    return lambda step: [functools.partial(model, 10 * step + i, i == 0) for i in range(k)]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return whole_tensors({**dict(model.named_parameters()), **states_of(model, optimizer)})


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float((found[name].double() - v.double()).norm() / v.double().norm().clamp(min=1e-30)) for name, v in expected.items()}


# --- the same numbers


def assert_the_same(preset: str, k: int, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, but for sums of coordinates instead of coordinates of sums."""
    near, apart = LINEAR.get(preset, 0.0) if k > 1 else 0.0, distances(found, expected)
    names = [name for name, _ in Given().named_parameters()] if near else list(apart)
    assert all(apart[name] <= near for name in names), (preset, apart)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("preset", FUSED)
def test_fused_is_unfused(preset, k):
    assert_the_same(preset, k, trained(given(), preset, True, k), trained(given(), preset, False, k))


def test_lomo_is_sgd_without_state():
    found, expected = trained(given(), "lomo", True, 2), trained(given(), "sgd", False, 2)
    assert not any(distances(found, expected).values())
    assert {name.rpartition(".")[2] for name in found.keys() - dict(given().named_parameters()).keys()} == {"step"}


def on_ranks(presets: list[str], k: int, replicas: int) -> dict[str, list[dict]]:
    return {preset: [trained(given(replicas), preset, fused, k) for fused in (True, False)] for preset in presets}


@pytest.mark.parametrize(("world", "replicas", "k"), [(2, 1, 2), (4, 2, 1)])
def test_fused_is_unfused_on_ranks(world, replicas, k):
    presets = list(FUSED) if world == 2 else ["adamw", "galore", "adafactor"]
    for results in run_distributed(on_ranks, world, presets, k, replicas):
        for preset, (found, expected) in results.items():
            assert_the_same(preset, k, found, expected)


@pytest.mark.parametrize("first_fused", [True, False])
@pytest.mark.parametrize("preset", ["adamw", "galore", "adamw_4bit"])
def test_a_run_goes_on_fused_or_not(preset, first_fused):
    model, other = given(), given()
    optimizer, resumed = (build_optimizer(one, preset=preset, **FUSED[preset]) for one in (model, other))
    run(model, optimizer, fuse_backward(model, optimizer) if first_fused else None, of_given(model, 1), stop=3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    fused = None if first_fused else fuse_backward(other, resumed)  # before the states are loaded, as a trainer does
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optim"])
    run(other, resumed, fused, of_given(other, 1), start=3)
    assert not any(distances(everything(other, resumed), trained(given(), preset, not first_fused, 1)).values())


def test_hooks_can_be_taken_off():
    model = given()
    optimizer = build_optimizer(model, preset="galore", **FUSED["galore"])
    fused = fuse_backward(model, optimizer)
    run(model, optimizer, fused, of_given(model, 2), stop=2)
    fused.remove()
    run(model, optimizer, None, of_given(model, 2), start=2)
    assert_the_same("galore", 2, everything(model, optimizer), trained(given(), "galore", False, 2))


# --- when a gradient is complete


def of_text(model: nn.Module, k: int, factor: float = 1.0) -> Callable:
    def losses(step: int) -> list[Callable]:
        batches = [(torch.arange(24) * (step + 3) + 11 * i) % 67 for i in range(k)]
        return [lambda ids=ids: factor * cross_entropy(model(ids), (ids + 1) % 67) for ids in batches]

    return losses


class Shared(Tiny):
    """An embedding that is the head too, and matrices that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)


@pytest.mark.parametrize("preset", ["adamw", "apollo"])
def test_tied_and_repeated_parameters(preset):
    results = []
    for is_fused in (True, False):
        torch.manual_seed(2)
        model = Shared()
        optimizer = build_optimizer(model, preset=preset, **FUSED[preset])
        run(model, optimizer, fuse_backward(model, optimizer) if is_fused else None, of_text(model, 2))
        results.append(everything(model, optimizer))
    assert not any(distances(*results).values())
    assert results[0]["embed.weight.step"] == STEPS


class _Inside(torch.autograd.Function):
    """A backward pass inside the backward pass, as recomputation runs it."""

    @staticmethod
    def forward(ctx, layer, x):
        ctx.layer, ctx.x = layer, x.detach()
        return layer(x)

    @staticmethod
    def backward(ctx, *grads):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.layer(x), grads[0])
        return None, x.grad


def test_a_gradient_that_comes_in_parts_is_refused_by_name():
    layer = nn.Linear(4, 4)
    optimizer = build_optimizer(layer, preset="sgd")
    fused = fuse_backward(layer, optimizer)
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"the gradient of '(weight|bias)' came in parts"), fused.update():
        layer(_Inside.apply(layer, x)).sum().backward()
    assert layer.weight.grad is None
    with fused.update():  # and it can be used again
        layer(x).sum().backward()


# --- clipping


def reference(clip: Clip, limit: float, k: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain loop: scale, then AdamW. float64."""
    model = make(torch.float64)
    optimizer = build_optimizer(model, preset="adamw")
    norms: list[float] = []
    for step in range(STEPS):
        for loss in of_text(model, k)(step):
            loss().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        own = [float(g.norm()) for g in gradients]  # type: ignore[union-attr]
        for gradient, n in zip(gradients, own, strict=True):
            measured = (norms[-1] if norms else 0.0) if clip == "previous" else n
            gradient *= min(1.0, limit / (measured + 1e-12))  # type: ignore[operator]
        norms.append(sum(n * n for n in own) ** 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
    return whole_tensors(dict(model.named_parameters())), norms


def clipped(clip: Clip, limit: float, k: int, stops: bool = False) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Every rank has all of the batch, and losses are divided by the number of ranks. ``stops``: goes on from the saved norm."""
    model, ranks = make(torch.float64), 1
    if torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,))
        for unit in (model.up, model.down, model):
            fully_shard(unit, mesh=mesh)
            cast(FSDPModule, unit).set_gradient_divide_factor(1.0)
            cast(FSDPModule, unit).set_force_sum_reduction_for_comms(True)
    optimizer = build_optimizer(model, preset="adamw")
    fused = fuse_backward(model, optimizer, clip_norm=limit, clip=clip)
    norms = run(model, optimizer, fused, of_text(model, k, 1 / ranks), stop=2)
    if stops:
        fused.remove()
        saved = float(fused.state_dict()["norm"])
        fused = fuse_backward(model, optimizer, clip_norm=limit, clip=clip)
        fused.load_state_dict({"norm": saved})
    norms += run(model, optimizer, fused, of_text(model, k, 1 / ranks), start=2)
    return whole_tensors(dict(model.named_parameters())), norms


@pytest.mark.parametrize(("clip", "limit"), [("previous", 0.5), ("per_tensor", 0.2)])
def test_clipping_is_what_it_says(clip, limit):
    for k in (1, 3):
        expected, norms = reference(clip, limit, k)
        unclipped, _ = reference(clip, 1e9, k)
        assert max(distances(expected, unclipped).values()) > 1e-3  # the limit bites
        on_two = run_distributed(clipped, 2, clip, limit, k) if k == 1 else []
        for found, reported in [clipped(clip, limit, k), *on_two, clipped(clip, limit, k, stops=True)]:
            assert max(distances(found, expected).values()) < 1e-9
            assert reported == pytest.approx(norms, rel=1e-9)


# --- memory

WIDTH, DEPTH = 128, 12
ONE = WIDTH * WIDTH * 4
"""Bytes of one layer's gradient."""


def gradient_peak(preset: str, is_fused: bool, k: int, **settings: Any) -> float:
    """Most bytes of a steady step above what is there between steps, in layers. Activations of eight tokens are next to nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
    optimizer = build_optimizer(model, preset=preset, lr=1e-3, **settings)
    fused = fuse_backward(model, optimizer) if is_fused else None
    x = torch.randn(8, WIDTH)

    def step() -> None:
        for _ in range(k - 1):
            model(x).square().mean().backward()
        if fused is not None:
            with fused.update():
                model(x).square().mean().backward()
            return
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with record_cpu_allocations() as log:
        start = log.mark()
        step()
        return log.peak_bytes(start) / ONE


def test_gradients_live_for_one_layer():
    """Of SGD, which makes a copy of the gradient; then of GaLore, whose sums are r / WIDTH of the gradients."""
    assert gradient_peak("sgd", False, 1) > DEPTH
    assert gradient_peak("lomo", True, 1) < 4
    rank = 8
    galore = {"rank": rank, "update_gap": 1000}
    assert gradient_peak("galore", False, 3, **galore) > DEPTH
    assert gradient_peak("galore", True, 3, **galore) < 5 + DEPTH * rank / WIDTH


# --- refusals


def test_what_cannot_be_fused_is_refused():
    model = make()
    optimizer = build_optimizer(model, preset="adamw_8bit")
    with pytest.raises(ValueError, match="exact global norm"):
        fuse_backward(model, optimizer, clip_norm=1.0)
    with pytest.raises(ValueError, match="or neither"):
        fuse_backward(model, optimizer, clip="previous")
    with pytest.raises(ValueError, match="LBFGS cannot be fused"):
        fuse_backward(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"parameters of the optimizer are not the model's"):
        fuse_backward(model.up, optimizer)


def refused_on_ranks() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 8), mesh, [Shard(0)]))
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    texts = []
    for one in (model, wrapped):
        with pytest.raises(ValueError) as error:
            fuse_backward(one, build_optimizer(one, preset="sgd"))
        texts.append(str(error.value))
    return texts


def test_nothing_is_kept_alive_by_its_hooks():
    model = nn.Linear(8, 8)
    optimizer = build_optimizer(model, preset="sgd", clip_norm=None)
    fused = fuse_backward(model, optimizer, clip_norm=None)
    with fused.update():
        model(torch.ones(2, 8)).sum().backward()
    weight, gone = weakref.ref(model.weight), weakref.ref(optimizer)
    del model, optimizer, fused
    gc.collect()
    assert weight() is None and gone() is None


def test_wrappers_that_reduce_later_are_refused():
    for of_dtensor, of_ddp in run_distributed(refused_on_ranks, 2):
        assert "'weight' is sharded, but by no FSDP2 module" in of_dtensor and "DistributedDataParallel" in of_ddp


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "lomo", "fuse_backward": False}, "take preset sgd"),
        ({"fused_clip": "previous"}, "fused_clip is read with fuse_backward true"),
        ({"fuse_backward": True, "clip_norm": None, "fused_clip": "previous"}, "where clip_norm is a number"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_exact_clipping_is_refused_with_its_remedies():
    cases: list[dict[str, Any]] = [{"fuse_backward": True}, {"preset": "lomo"}, {"preset": "auto", "allowed": ("adamw", "lomo")}]
    for settings in cases:
        refused = OptimConfig(**settings).refused_clip()
        assert refused is not None and "optim.fused_clip=previous" in refused and "optim.clip_norm=null" in refused
        assert OptimConfig(**settings, fused_clip="previous").refused_clip() is None
        assert OptimConfig(**settings, clip_norm=None).refused_clip() is None
    assert OptimConfig().refused_clip() is None and not OptimConfig().is_fused and OptimConfig(preset="lomo").is_fused
