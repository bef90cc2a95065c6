"""Presets: which rule or method updates matrices and the rest, and how their states are kept. Defaults are the papers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from optim.adafactor import Adafactor, adalomo
from optim.apollo import Apollo
from optim.config import OptimConfig, Preset
from optim.elementwise import ElementwiseAdam, Rule, Sgd, Storage
from optim.frugal import Frugal
from optim.grid import composed_method, singular_projector
from optim.lazy_projector import LazyProjector
from optim.low_rank import Fira, GaLore
from optim.methods import Method
from optim.muon import Muon
from optim.natural_galore import NaturalGaLore
from optim.projectors import GaussianProjector, Refresh
from optim.rules import Adam
from optim.shampoo import Shampoo
from optim.subset_norm import SubsetNormMomentum


@dataclass(frozen=True)
class Recipe:
    """How matrices of hidden layers and the rest are updated, and how their states are kept."""

    matrix: Rule | Method
    rest: Rule
    matrix_storage: Storage = "fp32"
    rest_storage: Storage = "fp32"
    matrix_everywhere: bool = False
    """Embedding and head are updated as matrices too."""


def recipe_of(config: OptimConfig) -> Recipe:
    """The recipe of ``config.preset``. Raises ValueError for one that is unknown or still ``auto``."""
    make = RECIPES.get(config.preset)
    if make is None:
        raise ValueError(f"optim.preset {config.preset!r} is unknown; known: {', '.join(get_args(Preset))}")
    return make(config)


def _adam(storage: Storage) -> Callable[[OptimConfig], Recipe]:
    def recipe(config: OptimConfig) -> Recipe:
        rule = ElementwiseAdam(Adam(config.betas, config.eps, "torch"))
        return Recipe(rule, rule, storage, storage)

    return recipe


def _sgd(config: OptimConfig) -> Recipe:
    rule = Sgd(config.momentum or 0.0)
    return Recipe(rule, rule)


def _with_rest(config: OptimConfig, method: Rule | Method, storage: Storage = "fp32", everywhere: bool = False) -> Recipe:
    """``method`` for matrices; the rest as ``optim.rest`` says, in eight bits unless it says otherwise."""
    rest = RECIPES[config.rest or "adamw_8bit"](config)
    return Recipe(method, rest.rest, config.state or storage, rest.rest_storage, everywhere)


def _galore(storage: Storage) -> Callable[[OptimConfig], Recipe]:
    def recipe(config: OptimConfig) -> Recipe:
        scale = 0.25 if config.scale is None else config.scale
        return _with_rest(config, GaLore(singular_projector(config), Adam(config.betas, config.eps), scale), storage)

    return recipe


def _q_galore(config: OptimConfig) -> Recipe:
    scale = 0.25 if config.scale is None else config.scale
    lazy = LazyProjector(singular_projector(config), packed=True)
    return _with_rest(config, GaLore(lazy, Adam(config.betas, config.eps), scale), "int8")


def _fira(config: OptimConfig) -> Recipe:
    scale = 0.25 if config.scale is None else config.scale
    return _with_rest(config, Fira(singular_projector(config), Adam(config.betas, config.eps), scale))


def _natural_galore(config: OptimConfig) -> Recipe:
    scale = 0.25 if config.scale is None else config.scale
    return _with_rest(config, NaturalGaLore(singular_projector(config), Adam(config.betas, config.eps), scale))


def _frugal(config: OptimConfig) -> Recipe:
    adam = Adam(config.betas, config.eps, "torch")
    return _with_rest(config, Frugal(config.density or 0.25, Refresh(config.update_gap or 200), adam, choice=config.choice or "columns"))


def _subset_norm(config: OptimConfig) -> Recipe:
    return _with_rest(config, SubsetNormMomentum(singular_projector(config), Adam(config.betas, config.eps)))


def _apollo(config: OptimConfig) -> Recipe:
    projector = GaussianProjector(config.rank or 256, Refresh(config.update_gap or 200))
    scale = 1.0 if config.scale is None else config.scale
    return _with_rest(config, Apollo(projector, "channel", Adam(config.betas, config.eps), scale))


def _apollo_mini(config: OptimConfig) -> Recipe:
    projector = GaussianProjector(config.rank or 1, Refresh(config.update_gap or 200))
    scale = 128.0 if config.scale is None else config.scale
    return _with_rest(config, Apollo(projector, "tensor", Adam(config.betas, config.eps), scale))


def _muon(config: OptimConfig) -> Recipe:
    return _with_rest(config, Muon(0.95 if config.momentum is None else config.momentum))


def _shampoo(config: OptimConfig) -> Recipe:
    gap = config.statistics_gap or 100
    rule = Adam(config.betas, config.eps, "torch")
    return _with_rest(config, Shampoo(config.block_order or 1200, gap, config.root_gap or 5 * gap, rule=rule))


RECIPES: dict[str, Callable[[OptimConfig], Recipe]] = {
    "adamw": _adam("fp32"),
    "adamw_8bit": _adam("int8"),
    "adamw_4bit": _adam("int4"),
    "sgd": _sgd,
    "lomo": lambda config: Recipe(Sgd(), Sgd()),
    "adafactor": lambda config: _with_rest(config, Adafactor(), everywhere=True),
    "adalomo": lambda config: _with_rest(config, adalomo(), everywhere=True),
    "galore": _galore("fp32"),
    "galore_8bit": _galore("int8"),
    "q_galore": _q_galore,
    "natural_galore": _natural_galore,
    "fira": _fira,
    "frugal": _frugal,
    "subset_norm_sm": _subset_norm,
    "apollo": _apollo,
    "apollo_mini": _apollo_mini,
    "muon": _muon,
    "shampoo_4bit": _shampoo,
    "composed": lambda config: _with_rest(config, composed_method(config)),
}
"""``optim.preset`` -> its recipe. ``adamw`` is torch's own unless parameters are bfloat16."""
