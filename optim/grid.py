"""From the names of parts in a configuration (``composition.py``) to the method they make, with the papers' defaults."""

from __future__ import annotations

from collections.abc import Callable

from optim.adafactor import Adafactor
from optim.composed import Columns, Composed
from optim.config import OptimConfig
from optim.coordinate_rules import AdamRule, CoordinateRule, LinearRule, MethodRule, NaturalAdam
from optim.elementwise import ElementwiseAdam, Rule
from optim.lifts import Back, Lift, Residual, ScaledGradient, ScaledResidual, SignResidual
from optim.methods import Method
from optim.muon import Muon
from optim.projectors import GaussianProjector, Projector, Refresh, SingularProjector
from optim.rules import GROWTH, Adam, RmsClip


def composed_method(config: OptimConfig) -> Rule | Method:
    """What ``config.parts`` say. Without a projector and a guard, adam and muon are elementwise Adam and Muon themselves."""
    projector, rule, _, guard = config.parts
    if (projector, guard) == ("none", "none") and rule in ("adam", "muon"):
        return ElementwiseAdam(_adam(config)) if rule == "adam" else Muon(_muon_momentum(config))
    guards = {"none": None, "norm_growth": GROWTH, "rms_clip": RmsClip()}
    return Composed(_projector(config), _rule(config), _lift(config), guards[guard])


def _adam(config: OptimConfig) -> Adam:
    """In torch's form where it sees elements of the matrix; in a subspace of others in that of the reference packages."""
    return Adam(config.betas, config.eps, "torch" if config.parts.projector in ("none", "columns") else "hf")


def _muon_momentum(config: OptimConfig) -> float:
    return 0.95 if config.momentum is None else config.momentum


def singular_projector(config: OptimConfig) -> SingularProjector:
    """As ``optim.svd`` says. The basis of a tall matrix is dealt to the ranks like every other state, for one message per step."""
    how = "exact" if config.svd == "exact" else "subspace"
    refresh = Refresh(config.update_gap or 200)
    return SingularProjector(config.rank or 128, refresh, how, precise=config.svd == "precise", shard_basis=True)


def _projector(config: OptimConfig) -> Projector | Columns | None:
    refresh = Refresh(config.update_gap or 200)
    known: dict[str, Callable[[], Projector | Columns | None]] = {
        "none": lambda: None,
        "singular": lambda: singular_projector(config),
        "gaussian": lambda: GaussianProjector(config.rank or 256, refresh),
        "columns": lambda: Columns(config.density or 0.25, refresh),
    }
    return known[config.parts.projector]()


def _rule(config: OptimConfig) -> CoordinateRule:
    adam = _adam(config)
    beta = config.betas[0] if config.momentum is None else config.momentum
    known: dict[str, Callable[[], CoordinateRule]] = {
        "adam": lambda: AdamRule(adam),
        "natural": lambda: NaturalAdam(adam),
        "momentum": lambda: LinearRule(Adam((beta, 0.0)), divides=False),
        "subset_norm": lambda: LinearRule(adam),
        "adafactor": lambda: MethodRule(Adafactor(clip=None)),
        "muon": lambda: MethodRule(Muon(_muon_momentum(config))),
    }
    return known[config.parts.rule]()


def _lift(config: OptimConfig) -> Lift | Residual:
    def scale(default: float) -> float:
        return default if config.scale is None else config.scale

    known: dict[str, Callable[[], Lift | Residual]] = {
        "back": lambda: Back(1.0 if config.parts.projector == "none" else scale(0.25)),
        "channel": lambda: ScaledGradient("channel", scale(1.0)),
        "tensor": lambda: ScaledGradient("tensor", scale(128.0)),
        "scaled_residual": lambda: ScaledResidual(scale(0.25)),
        "residual": Residual,
        "sign": SignResidual,
    }
    return known[config.parts.lift]()
