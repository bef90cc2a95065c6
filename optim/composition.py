"""The grid of which matrix methods are points: projector x rule x lift x guard (x how states are kept). Which combinations have a meaning,
and why the others have none. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Projector = Literal["none", "singular", "gaussian", "columns"]
Rule = Literal["adam", "natural", "momentum", "subset_norm", "adafactor", "muon"]
Lift = Literal["back", "channel", "tensor", "scaled_residual", "residual", "sign"]
Guard = Literal["none", "norm_growth", "rms_clip"]


class Parts(NamedTuple):
    """One point of the grid."""

    projector: Projector
    rule: Rule
    lift: Lift
    guard: Guard


POINTS: dict[str, Parts] = {
    "adafactor": Parts("none", "adafactor", "back", "rms_clip"),
    "galore": Parts("singular", "adam", "back", "none"),
    "galore_8bit": Parts("singular", "adam", "back", "none"),
    "natural_galore": Parts("singular", "natural", "back", "none"),
    "fira": Parts("singular", "adam", "scaled_residual", "norm_growth"),
    "apollo": Parts("gaussian", "adam", "channel", "norm_growth"),
    "apollo_mini": Parts("gaussian", "adam", "tensor", "norm_growth"),
    "frugal": Parts("columns", "adam", "sign", "none"),
    "subset_norm_sm": Parts("singular", "subset_norm", "residual", "none"),
    "muon": Parts("none", "muon", "back", "none"),
}
"""Presets and their parts. adalomo is none of them: its update is relative to the weights."""


def refusal(parts: Parts) -> str | None:
    """Why ``parts`` together have no meaning, in one sentence with the remedy; None where they have one."""
    projector, rule, lift, _ = parts
    if projector == "none" and lift != "back":
        return f"lift {lift} fills in what a projector leaves out, and there is none; set projector, or lift back"
    if projector == "none" and rule == "natural":
        return "rule natural keeps the last 20 gradients, without a projector in full; set projector"
    if projector == "gaussian" and lift in ("scaled_residual", "residual", "sign"):
        return (
            f"lift {lift} needs what lies outside the subspace, and P Pᵀ G of a gaussian projector is no orthogonal projection; "
            "set projector singular or columns, or lift back, channel or tensor"
        )
    if projector == "singular" and lift == "sign":
        return (
            "lift sign moves every element by 1 however little of it lies outside the subspace, and with projector singular that may be "
            "float32's rounding alone; set projector columns, or lift scaled_residual"
        )
    if lift == "residual" and rule not in ("momentum", "subset_norm"):
        return (
            f"lift residual adds the gradient outside the subspace as it is, which is of another scale than what rule {rule} makes inside; "
            "set rule momentum or subset_norm, or lift scaled_residual"
        )
    if lift == "sign" and rule not in ("adam", "natural", "adafactor"):
        return (
            f"lift sign moves every element outside the subspace by 1, which is of another scale than what rule {rule} makes inside; "
            "set rule adam, natural or adafactor"
        )
    return None


def settings_read(parts: Parts) -> tuple[str, ...]:
    """The further settings of ``optim`` that ``parts`` read."""
    projector, rule, lift, _ = parts
    found = ["rest"]
    if projector != "none":
        found += ["update_gap", "density" if projector == "columns" else "rank"]
    if projector == "singular":
        found.append("svd")
    if projector != "none" and lift in ("back", "channel", "tensor", "scaled_residual"):
        found.append("scale")
    if rule != "adafactor":  # its second moment is a row and a column in float32
        found.append("state")
    if rule in ("momentum", "muon"):
        found.append("momentum")
    return tuple(found)
