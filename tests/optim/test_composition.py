"""The grid of projector, rule, lift and guard: every lawful cell against formulas in float64 and over ranks, every other refused."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from optim import composition
from optim.adafactor import Adafactor
from optim.build import build_optimizer
from optim.composed import Columns, Composed
from optim.composition import Parts
from optim.config import OptimConfig
from optim.coordinate_rules import NaturalAdam
from optim.grid import composed_method
from optim.lifts import Residual, SignResidual
from optim.plan import plan
from optim.projectors import GaussianProjector, Refresh, SingularProjector
from optim.recipes import recipe_of
from optim.rules import RmsClip
from tests.optim.lockstep import Simulator
from tests.optim.tape import SHAPES, close, tape

AXES = (composition.Projector, composition.Rule, composition.Lift, composition.Guard)
CELLS = [Parts(*cell) for cell in itertools.product(*map(get_args, AXES))]
LAWFUL = [cell for cell in CELLS if composition.refusal(cell) is None]
GAP, RANK, BETAS = 4, 3, (0.9, 0.95)
by_name = {"ids": lambda cell: "-".join(cell)}


def method_of(parts: Parts, **changes: object) -> Composed:
    """Of ``parts``, even where the configuration makes the plain rule or method of it; all bases renewed in one step."""
    settings = {**parts._asdict(), "rank": RANK, "density": 0.3, "svd": "exact", "update_gap": GAP, "eps": 1e-6, **changes}
    config = OptimConfig(betas=BETAS, preset="composed", **parts._asdict())
    known = {name: value for name, value in settings.items() if name in (*config.reads("composed"), "eps")}
    config = OptimConfig.model_validate({"betas": BETAS, "preset": "composed", **parts._asdict(), **known})
    if (parts.projector, parts.guard) == ("none", "none"):
        config = config.model_copy(update={"guard": "rms_clip"})
    method = composed_method(config)
    assert isinstance(method, Composed)
    refresh = Refresh(GAP, stagger=False)
    projector = {
        "none": None,
        "singular": SingularProjector(RANK, refresh, "exact"),
        "gaussian": GaussianProjector(RANK, refresh),
        "columns": Columns(0.3, refresh),
    }[parts.projector]
    return Composed(projector, method.rule, method.lift, None if parts.guard == "none" else method.guard)


# --- formulas, in float64, of a tall matrix (a wide one is transposed where its rows are projected)


class Reference:
    """One matrix, written for the orientation [long side, r]."""

    def __init__(self, parts: Parts, scale: float) -> None:
        self.parts, self.scale = parts, scale
        self.form_torch = parts.projector in ("none", "columns")
        self.restart()
        self.limited = 0.0

    def restart(self) -> None:
        self.mean = self.square = self.row = self.column = np.zeros(())
        self.past: list[np.ndarray] = []

    def adam(self, r: np.ndarray, t: int) -> np.ndarray:
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * r
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * r**2
        if self.form_torch:
            return self.mean / (np.sqrt(self.square / (1 - BETAS[1] ** t)) + 1e-6) / np.sqrt(1 - BETAS[1] ** t)
        return self.mean / (np.sqrt(self.square) + 1e-6)

    def natural(self, r: np.ndarray, t: int) -> np.ndarray:
        self.past = [*self.past[-19:], r.reshape(-1)]
        fisher = sum(np.outer(old, old) for old in self.past) + 1e-3 * np.eye(r.size)
        return self.adam(np.linalg.solve(fisher, r.reshape(-1)).reshape(r.shape), t)

    def adafactor(self, r: np.ndarray, t: int) -> np.ndarray:
        keep = 1 - t**-0.8
        squares = r**2 + 1e-30
        self.row = keep * self.row + (1 - keep) * squares.mean(axis=1)
        self.column = keep * self.column + (1 - keep) * squares.mean(axis=0)
        return r / np.sqrt(np.outer(self.row, self.column) / self.row.mean())

    def muon(self, r: np.ndarray) -> np.ndarray:
        self.mean = 0.95 * self.mean + 0.05 * r
        x = 0.05 * r + 0.95 * self.mean
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        return max(1.0, r.shape[0] / r.shape[1]) ** 0.5 * x

    def linear(self, r: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * r
        if self.parts.rule == "momentum":
            return self.mean, np.ones((1, 1))
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * squares.sum(axis=1, keepdims=True)
        return self.mean, np.sqrt(self.square) + 1e-6

    def bias(self, t: int) -> float:
        known = self.parts.rule in ("adam", "natural", "subset_norm")
        return float(np.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)) if known else 1.0

    def guarded(self, value: np.ndarray, bias: float) -> np.ndarray:
        norm = np.linalg.norm(value)
        if self.parts.guard == "rms_clip":
            return value / max(1.0, bias * norm / np.sqrt(self.elements))
        if self.parts.guard == "norm_growth":
            allowed = norm if self.limited == 0 else min(norm, 1.01 * self.limited)
            self.limited = allowed
            return value * (allowed / norm)
        return value

    def step(self, g: np.ndarray, basis: np.ndarray, index: int) -> np.ndarray:
        """``basis`` [short side, r]; ``index`` from 0."""
        self.elements = g.size
        renewed, parts = index % GAP == 0, self.parts
        if renewed and parts.projector == "columns" and parts.lift != "residual":
            self.restart()
        t = index % GAP + 1 if parts.projector == "columns" and parts.lift != "residual" else index + 1
        r, bias = g @ basis, self.bias(t)
        if parts.lift == "residual":
            self.mean = np.zeros(()) if renewed else self.mean
            mean, divisor = self.linear(r, g**2)
            return bias * self.guarded((mean @ basis.T + g - r @ basis.T) / divisor, bias)
        if parts.rule in ("momentum", "subset_norm"):
            mean, divisor = self.linear(r, r**2)
            n = mean / divisor
        else:
            n = {"adam": lambda: self.adam(r, t), "natural": lambda: self.natural(r, t), "adafactor": lambda: self.adafactor(r, t)}.get(
                parts.rule, lambda: self.muon(r)
            )()
        lifted = n @ basis.T
        if parts.lift == "back":
            return bias * self.guarded(self.scale * lifted, bias)
        if parts.lift == "sign":
            signs = np.sign(g) * (np.abs(basis).sum(axis=1) == 0)
            return self.guarded(bias * lifted + signs, 1.0)
        axis = None if parts.lift == "tensor" else 1
        factor = np.linalg.norm(n, axis=axis, keepdims=True) / np.linalg.norm(r, axis=axis, keepdims=True)
        if parts.lift == "scaled_residual":
            return bias * (self.scale * lifted + self.guarded(factor * (g - r @ basis.T), bias))
        return bias * self.guarded(np.sqrt(self.scale) * factor * g, bias)


def bases(parts: Parts, method: Composed, simulator: Simulator, shape: tuple[int, int], step: int) -> np.ndarray:
    """[short side, r], or of columns: of all columns."""
    if parts.projector == "none":
        return np.eye(shape[1])
    if isinstance(method.projector, Columns):
        return np.eye(shape[1])[:, method.projector.chosen(shape[1], step, simulator.key, torch.device("cpu")).numpy()]
    if parts.projector == "singular":
        return simulator.states[0]["basis"].double().numpy()
    from optim.counter_random import gaussian_rows

    rows = gaussian_rows(simulator.key, (step - 1) // GAP, 0, min(shape), RANK, torch.device("cpu"))
    return rows.double().numpy() / np.sqrt(RANK)


@pytest.mark.parametrize("parts", LAWFUL, **by_name)
def test_formulas_in_float64(parts: Parts) -> None:
    for shape in ((9, 6), (6, 10)):
        method = method_of(parts)
        simulator = Simulator(method, shape)
        reference = Reference(parts, getattr(method.lift, "scale", 1.0))
        transposed = shape[0] < shape[1] and parts.projector in ("singular", "gaussian")
        for index, gradient in enumerate(tape(shape, noise=8.0 if parts.rule == "natural" else 0.3)[:6]):
            actual = simulator.step(gradient)
            g = gradient.double().numpy()
            expected = reference.step(g.T if transposed else g, bases(parts, method, simulator, shape, index + 1), index)
            # Newton-Schulz in float32 is held to 3e-6 (tests/optim/test_muon.py); the Fisher matrix multiplies rounding by its condition.
            close(actual, expected.T if transposed else expected, {"muon": 5e-6, "natural": 5e-6}.get(parts.rule, 1e-6))


@pytest.mark.parametrize("parts", LAWFUL, **by_name)
def test_over_ranks(parts: Parts) -> None:
    """7 rows lie as 3, 3, 1 and 4 as 2, 2, 0."""
    noise, bound = 8.0 if parts.rule == "natural" else 0.3, 5e-6 if parts.rule in ("muon", "natural") else 1e-6
    for shape in ((7, 4), (4, 10)):
        alone, dealt = Simulator(method_of(parts), shape), Simulator(method_of(parts), shape, 3)
        for gradient in tape(shape, noise=noise)[:2]:
            close(dealt.step(gradient), alone.step(gradient).double().numpy(), bound)
        assert dealt.requests == alone.requests
        for name, expected in alone.whole_states().items():
            close(dealt.whole_states()[name], expected.double().numpy(), bound)


# --- the configuration


def test_what_has_no_meaning_is_refused_with_the_reason() -> None:
    assert 200 < len(LAWFUL) < len(CELLS)
    for cell in CELLS:
        reason = composition.refusal(cell)
        if reason is None:
            OptimConfig(preset="composed", **cell._asdict())
            continue
        assert "; " in reason and "set " in reason
        with pytest.raises(ValueError) as refused:
            OptimConfig(preset="composed", **cell._asdict())
        assert reason in str(refused.value)
    with pytest.raises(ValueError, match="there is none; set projector, or lift back"):
        OptimConfig(preset="composed", lift="channel")
    with pytest.raises(ValueError, match="no orthogonal projection"):
        OptimConfig(preset="composed", projector="gaussian", lift="scaled_residual")
    with pytest.raises(ValueError, match=r"projector is not read by preset galore; leave it null \(it is read by composed\)"):
        OptimConfig(preset="galore", projector="gaussian")
    with pytest.raises(ValueError, match="state is not read by preset composed of none, adafactor, back, none"):
        OptimConfig(preset="composed", rule="adafactor", state="int8")
    with pytest.raises(ValueError, match="svd is not read by preset composed of gaussian"):
        OptimConfig(preset="composed", projector="gaussian", svd="exact")


def test_auto_may_choose_what_is_composed() -> None:
    config = OptimConfig(preset="auto", allowed=("adamw", "composed"), projector="gaussian", rank=8)
    assert config.with_preset("composed").rank == 8 and config.with_preset("adamw").projector is None


@pytest.mark.parametrize("preset", composition.POINTS)
def test_presets_are_points(preset: str) -> None:
    """Bit for bit, but Adafactor, which multiplies in another order."""
    parts = composition.POINTS[preset]
    named = OptimConfig(preset=preset)  # pyright: ignore[reportArgumentType]
    rank = {"apollo_mini": {"rank": 1}, "apollo": {"rank": 256}}.get(preset, {})
    composed = OptimConfig(preset="composed", **parts._asdict(), **rank)
    for shape in SHAPES.values():
        one, other = (Simulator(recipe_of(config).matrix, shape) for config in (named, composed))  # pyright: ignore[reportArgumentType]
        for gradient in tape(shape, noise=8.0)[:3]:
            close(one.step(gradient), other.step(gradient).double().numpy(), 1e-6 if preset == "adafactor" else 0.0)


def sizes(config: OptimConfig) -> tuple[int, int]:
    """Planned and measured bytes of a matrix's states after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 130, bias=False))
    optimizer = build_optimizer(model, config)
    model(torch.randn(8, 96)).square().mean().backward()
    optimizer.step()
    assert torch.isfinite(model[0].weight).all()
    (row,) = plan(optimizer)
    return row.planned_bytes, row.measured_bytes


KEPT = [
    (projector, rule, state)
    for projector, rule, state in itertools.product(*map(get_args, AXES[:2]), ("fp32", "bf16", "int8", "int4"))
    if composition.refusal(Parts(projector, rule, "back", "none")) is None and (state == "fp32" or rule != "adafactor")
]


@pytest.mark.parametrize(("projector", "rule", "state"), KEPT)
def test_states_in_few_bits_are_what_is_planned(projector: str, rule: str, state: str) -> None:
    """Of rules and projectors: lifts and guards keep a number at most."""
    shape = {"singular": {"rank": 33}, "gaussian": {"rank": 33}, "columns": {"density": 0.5}}.get(projector, {})
    settings = {"preset": "composed", "projector": projector, "rule": rule, "guard": "norm_growth", **shape}
    kept = {} if rule == "adafactor" else {"state": state}
    planned, measured = sizes(OptimConfig.model_validate({**settings, **kept}))
    assert planned == measured
    if state != "fp32":
        assert planned < sizes(OptimConfig.model_validate(settings))[0]


def test_parts_refuse_what_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="history 0"):
        NaturalAdam(history=0)
    assert RmsClip().states() == {} and not hasattr(Residual(), "update") and SignResidual().scale == 1.0
    assert isinstance(recipe_of(OptimConfig(preset="adafactor")).matrix, Adafactor)
    assert torch.equal(RmsClip(2.0).factor(Tensor([8.0]), {}, 1.0, 4), Tensor([0.5]))
