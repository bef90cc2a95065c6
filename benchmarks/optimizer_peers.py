"""The optimizers that the benchmark of steps compares: longstride's presets and other packages' own classes, built alike."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from optim.build import build_optimizer, quantise_matrices_
from optim.config import READ, Preset
from optim.routing import route

LR = 1e-4
PRESETS = [name for name in get_args(Preset) if name not in ("composed", "lomo")]
"""longstride's, without the one whose parts a config must name and the one that takes gradients in the backward pass."""
NEVER = 10**6
"""Steps between new projections when none is wanted after the first."""


@dataclass(frozen=True)
class Workload:
    """Matrices and gradients that every system gets."""

    name: str
    model: nn.Module
    rank: int
    gradients: list[dict[str, Tensor]]
    """By parameter name, of moments of one training run that lie some steps apart."""

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class Stepper:
    """An optimizer in the middle of training. ``held``: what it keeps between steps is reachable from here."""

    def __init__(self, held: Any, step: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> None:
        self.held, self.step, self.prepare = held, step, prepare


@dataclass(frozen=True)
class System:
    """An optimizer by name. ``build(model, rank, gap)`` raises what the package raises."""

    name: str
    package: str
    build: Callable[[nn.Module, int, int], Stepper]
    reference: str | None = None
    """The peer that this one is measured against."""
    renews: bool = False
    """A projection (or another structure) is made anew every ``gap`` steps."""
    note: str = ""
    warm: int = 0
    """Steps after the first until a step is like those that follow."""


def _stepper(optimizer: Any) -> Stepper:
    return Stepper(optimizer, optimizer.step)


_SHAMPOO_GAP = 40
"""Steps between Shampoo's renewals, which its steps have to see two of before they precondition everywhere: not ``NEVER``."""


def ours(name: str, preset: str, reference: str | None = None, **settings: Any) -> System:
    """A preset of longstride's; settings that it does not read are not passed."""

    def build(model: nn.Module, rank: int, gap: int) -> Stepper:
        if preset == "q_galore":  # as the trainer keeps its weights: matrices in eight bits, everything else in bfloat16
            quantise_matrices_(model.bfloat16())
        read = READ.get(preset, ())
        wanted = {"rank": rank, "update_gap": gap, "rest": "adamw", **settings}
        if preset == "apollo_mini":
            del wanted["rank"]
        if preset == "shampoo_4bit":
            wanted["statistics_gap"] = wanted["root_gap"] = min(gap, _SHAMPOO_GAP)
        chosen = {key: value for key, value in wanted.items() if key in read and value is not None}
        return _stepper(build_optimizer(model, preset=preset, lr=LR, betas=(0.9, 0.999), weight_decay=0.0, **chosen))

    renews = not {"update_gap", "root_gap"}.isdisjoint(READ.get(preset, ()))
    return System(name, "longstride", build, reference, renews, warm=2 * _SHAMPOO_GAP if preset == "shampoo_4bit" else 0)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of hidden layers, and the rest."""
    routed = route(model)
    return [one.parameter for one in routed if one.part == "matrix"], [one.parameter for one in routed if one.part == "rest"]


def _groups(model: nn.Module, of_matrices: dict[str, Any], of_rest: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    matrices, rest = _split(model)
    groups = [{"params": matrices, **of_matrices}, {"params": rest, **(of_rest or {})}]
    return [group for group in groups if group["params"]]


def plain(name: str, package: str, of: str, note: str = "", **settings: Any) -> System:
    """``of``: ``module:class`` of an optimizer that takes all parameters alike."""

    def build(model: nn.Module, rank: int, gap: int) -> Stepper:
        return _stepper(_class(of)(model.parameters(), lr=LR, **settings))

    return System(name, package, build, note=note)


def projected(name: str, package: str, of: str, keys: dict[str, Any], rank: int | None = None, note: str = "", **settings: Any) -> System:
    """``of``: of an optimizer that projects the groups that have a rank."""

    def build(model: nn.Module, default_rank: int, gap: int) -> Stepper:
        groups = _groups(model, {"rank": rank or default_rank, "update_proj_gap": gap, **keys})
        return _stepper(_class(of)(groups, lr=LR, **settings))

    return System(name, package, build, renews=True, note=note)


def _class(of: str) -> Any:
    module, _, name = of.partition(":")
    return getattr(importlib.import_module(module), name)


def _torch_muon(model: nn.Module, rank: int, gap: int) -> Stepper:
    matrices, rest = _split(model)
    both = [torch.optim.Muon(matrices, lr=LR, weight_decay=0.0)]
    both += [torch.optim.AdamW(rest, lr=LR, weight_decay=0.0, fused=True)] if rest else []
    return Stepper(both, lambda: [optimizer.step() for optimizer in both])


def _other_muon(model: nn.Module, rank: int, gap: int) -> Stepper:
    return _stepper(_class("pytorch_optimizer:Muon")(_groups(model, {"use_muon": True}, {"use_muon": False}), lr=LR))


def _lomo(of: str) -> Callable[[nn.Module, int, int], Stepper]:
    """Consumes gradients in a backward pass: here that of the sum of weights times gradients, whose gradients are those given."""

    def build(model: nn.Module, rank: int, gap: int) -> Stepper:
        os.environ.setdefault("LOCAL_RANK", "0")
        optimizer, wanted = _class(of)(model, lr=LR), [parameter.grad for parameter in model.parameters()]
        loss: list[Tensor] = []

        def prepare() -> None:
            loss[:] = [torch.stack([(p * g).sum() for p, g in zip(model.parameters(), wanted, strict=True) if g is not None]).sum()]

        return Stepper(optimizer, lambda: optimizer.fused_backward(loss[0], LR), prepare)

    return build


_SVD = {"scale": 0.25, "proj_type": "std"}
_OTHER_SVD = {"scale": 0.25, "projection_type": "std"}
_RANDOM = {"proj": "random", "proj_type": "std"}
_LAZY = {**_SVD, "quant": True, "quant_group_size": 256, "quant_n_bit": 4, "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}


def peers() -> Iterator[System]:
    """Every class of another package, whether it runs here or not."""
    yield plain("AdamW, fused", "torch", "torch.optim:AdamW", fused=True, weight_decay=0.0)
    yield plain("AdamW, foreach", "torch", "torch.optim:AdamW", foreach=True, weight_decay=0.0)
    yield plain("Adafactor", "torch", "torch.optim:Adafactor")
    yield System("Muon and AdamW", "torch", _torch_muon)
    yield plain("Adafactor", "transformers", "transformers.optimization:Adafactor", scale_parameter=False, relative_step=False)
    yield plain("AdamW8bit", "bitsandbytes", "bitsandbytes.optim:AdamW8bit", weight_decay=0.0)
    yield plain("AdamW8bit", "torchao", "torchao.optim:AdamW8bit", note="compiles in its first step", weight_decay=0.0)
    yield plain("AdamW4bit", "torchao", "torchao.optim:AdamW4bit", note="compiles in its first step", weight_decay=0.0)
    yield plain("AdamWFp8", "torchao", "torchao.optim:AdamWFp8", note="compiles in its first step", weight_decay=0.0)
    yield projected("GaLoreAdamW", "galore-torch", "galore_torch:GaLoreAdamW", _SVD, no_deprecation_warning=True)
    yield projected("GaLoreAdafactor", "galore-torch", "galore_torch:GaLoreAdafactor", _SVD, scale_parameter=False, relative_step=False)
    yield projected("GaLoreAdamW8bit", "galore-torch", "galore_torch:GaLoreAdamW8bit", _SVD)
    yield projected("QGaLoreAdamW8bit", "q-galore-torch", "q_galore_torch:QGaLoreAdamW8bit", _LAZY)
    yield projected("APOLLOAdamW", "apollo-torch", "apollo_torch:APOLLOAdamW", {**_RANDOM, "scale": 1, "scale_type": "channel"})
    mini = {**_RANDOM, "scale": 128, "scale_type": "tensor"}
    yield projected("APOLLOAdamW, Mini", "apollo-torch", "apollo_torch:APOLLOAdamW", mini, rank=1)
    q_apollo = {**_RANDOM, "scale": 1, "scale_type": "channel", "quant": False}
    yield projected("QAPOLLOAdamW", "apollo-torch", "apollo_torch:QAPOLLOAdamW", q_apollo)
    yield projected("GaLore", "pytorch_optimizer", "pytorch_optimizer:GaLore", _OTHER_SVD)
    yield projected("Fira", "pytorch_optimizer", "pytorch_optimizer:Fira", _OTHER_SVD)
    note = "scales the projected gradient: not APOLLO's update"
    yield projected("APOLLO", "pytorch_optimizer", "pytorch_optimizer:APOLLO", {"scale": 1, "projection_type": "random"}, note=note)
    yield plain("AdaFactor", "pytorch_optimizer", "pytorch_optimizer:AdaFactor")
    yield System("Muon", "pytorch_optimizer", _other_muon)
    note = "its time includes the backward pass of a trivial loss"
    yield System("Lomo", "lomo-optim", _lomo("lomo_optim:Lomo"), note=note)
    yield System("AdaLomo", "lomo-optim", _lomo("lomo_optim:AdaLomo"), note=note)


REFERENCES = {
    "adamw": "torch AdamW, fused",
    "adamw_8bit": "bitsandbytes AdamW8bit",
    "adamw_4bit": "torchao AdamW4bit",
    "adafactor": "torch Adafactor",
    "galore": "galore-torch GaLoreAdamW",
    "fira": "pytorch_optimizer Fira",
    "apollo": "apollo-torch APOLLOAdamW",
    "apollo_mini": "apollo-torch APOLLOAdamW, Mini",
    "muon": "torch Muon and AdamW",
}
"""Of presets: the peer that computes the same; the rest is updated by AdamW in float32 on both sides."""


def systems() -> list[System]:
    """longstride's presets, the leanest forms of some, and the peers."""
    presets = [ours(preset, preset, REFERENCES.get(preset)) for preset in PRESETS]
    lean = [ours(f"{preset}, rest in 8 bits", preset, rest=None) for preset in ("apollo_mini", "apollo", "muon")]
    int8 = [ours(f"{preset}, all in 8 bits", preset, rest=None, state="int8") for preset in ("apollo", "muon")]
    return [*presets, *lean, *int8, *peers()]
