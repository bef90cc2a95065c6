"""Settings of the optimizer and the learning-rate schedule. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config import PositiveInt, Section
from optim import composition


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step."""

    kind: Literal["wsd", "cosine", "constant", "inverse_sqrt", "infinite"] = "wsd"
    """wsd: warm up, stay, decay linearly at the end; cosine: warm up, then half a cosine down; constant: warm up, then stay;
    inverse_sqrt: warm up, then fall as one over the root of the step; infinite: warm up, half a cosine down to a rate that stays for as
    long as training goes on, and an exponential decay at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up from 0."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of train.steps spent in the final decay (wsd, infinite)."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the last step as a fraction of optim.lr (wsd, cosine, infinite)."""
    cooldown_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps from the end of the warm-up until the rate stays (infinite only)."""
    constant_lr_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The rate that stays as a fraction of optim.lr (infinite only)."""

    @model_validator(mode="after")
    def _check_rates(self) -> ScheduleConfig:
        if self.kind == "infinite" and not 0 < self.min_lr_ratio <= self.constant_lr_ratio:
            raise ValueError(
                f"min_lr_ratio {self.min_lr_ratio} must be above 0 and at most constant_lr_ratio {self.constant_lr_ratio} "
                "with kind infinite"
            )
        return self


Preset = Literal[
    "adamw",
    "adamw_8bit",
    "adamw_4bit",
    "sgd",
    "lomo",
    "adafactor",
    "adalomo",
    "galore",
    "galore_8bit",
    "q_galore",
    "natural_galore",
    "fira",
    "apollo",
    "apollo_mini",
    "frugal",
    "subset_norm_sm",
    "muon",
    "shampoo_4bit",
    "composed",
]
_LOW_RANK = ("rank", "update_gap", "scale", "rest", "state")
READ: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum",),
    "adafactor": ("rest",),
    "adalomo": ("rest",),
    "galore": (*_LOW_RANK, "svd"),
    "galore_8bit": (*_LOW_RANK, "svd"),
    "q_galore": (*_LOW_RANK, "svd"),
    "natural_galore": (*_LOW_RANK, "svd"),
    "fira": (*_LOW_RANK, "svd"),
    "frugal": ("density", "choice", "update_gap", "rest", "state"),
    "subset_norm_sm": ("rank", "update_gap", "svd", "rest", "state"),
    "apollo": _LOW_RANK,
    "apollo_mini": _LOW_RANK,
    "muon": ("momentum", "rest", "state"),
    "shampoo_4bit": ("block_order", "statistics_gap", "root_gap", "rest", "state"),
}
"""Which of the optional settings a preset reads; one that it does not read is refused. What composed reads depends on its parts."""
PARTS = ("projector", "rule", "lift", "guard")
OPTIONAL = (
    *PARTS,
    *("momentum", "density", "rank", "update_gap", "scale", "svd", "rest", "state"),
    *("choice", "block_order", "statistics_gap", "root_gap"),
)


class GroupConfig(Section):
    """Parameters with a rate or decay of their own."""

    match: str
    """Pattern of their names, such as blocks.*.norm* (* and ? as in file names); the first group that matches a name counts."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: as without this group."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay; null: as without this group."""
    schedule: Literal["run", "none"] = "run"
    """run: its rate follows optim.schedule; none: it has its rate from the first step to the last, as values of memory layers in
    arXiv 2412.09764."""

    @model_validator(mode="after")
    def _check_something_is_set(self) -> GroupConfig:
        if self.lr is None and self.weight_decay is None and self.schedule == "run":
            raise ValueError(f"group {self.match} sets nothing; give it lr, weight_decay or schedule")
        return self


MUP_PRESETS = ("adamw", "adamw_8bit", "adamw_4bit", "adafactor", "frugal")


Weights = Literal["fp32", "bf16", "bf16_stochastic", "bf16_24bit", "int8_stochastic"]
"""How parameters are kept between steps."""


class OptimConfig(Section):
    """The optimizer."""

    preset: Literal["auto"] | Preset = "adamw"
    """Which optimizer (docs/optimizers.md). auto: the first of optim.allowed whose step fits the memory budget; composed: put together by
    projector, rule, lift and guard."""
    allowed: Annotated[tuple[Preset, ...], Field(min_length=1, strict=False)] = ("adamw", "adamw_8bit")
    """What preset auto may choose, the most wanted first."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    rest_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of everything but the matrices of hidden layers (embedding, head, norms, biases, gates); null: lr."""
    groups: Annotated[tuple[GroupConfig, ...], Field(strict=False)] = ()
    """Parameters with a learning rate or weight decay of their own, by name."""
    mup_base_width: PositiveInt | None = None
    """Width at which the learning rate was found: rates of linear layers' weights are multiplied by it over model.d_model and their initial
    values scaled, as in arXiv 2203.03466, so that one rate serves all widths (grow heads, not the size of one). null: off."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    projector: composition.Projector | None = None
    """Of preset composed: the subspace in which rule works. none (null): the whole matrix; singular: leading singular vectors of the
    gradient; gaussian: random, made from a seed; columns: some columns, drawn anew every update_gap steps."""
    rule: composition.Rule | None = None
    """Of preset composed: what is done with the gradient there. adam (null); natural: Adam of the natural gradient of the last 20;
    momentum; subset_norm: momentum over one second moment per channel; adafactor; muon."""
    lift: composition.Lift | None = None
    """Of preset composed: what becomes of the matrix. back (null): what the rule made, taken back; channel, tensor: the gradient, scaled as
    the rule scaled its projection; scaled_residual, residual, sign: back, and outside the subspace the gradient scaled channel by
    channel, as it is, or its sign."""
    guard: composition.Guard | None = None
    """Of preset composed: limit of updates. none (null); norm_growth: a norm grows by 1 percent per step at most (with scaled_residual the
    norm outside the subspace); rms_clip: the root of the mean square is 1 at most."""
    momentum: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of sgd (null: 0, which keeps no state), of muon (null: 0.95) and of rule momentum (null: the first of betas)."""
    density: float | None = Field(default=None, gt=0, le=1)
    """Share of a matrix's columns that frugal and projector columns keep moments for; null: 0.25."""
    rank: PositiveInt | None = None
    """Rank of the projection (null: 128; apollo and projector gaussian 256, apollo_mini 1)."""
    update_gap: PositiveInt | None = None
    """Steps after which a projection is made anew; null: 200."""
    scale: float | None = Field(default=None, gt=0)
    """Factor of projected updates; null: galore, q_galore, natural_galore, fira, lifts back and scaled_residual 0.25, apollo and lift
    channel 1, apollo_mini and lift tensor 128."""
    svd: Literal["subspace", "precise", "exact"] | None = None
    """How a projection to singular vectors is found. subspace (null): iterated from the one before; precise: the same in float64, equal
    to 1e-6 on any number of ranks, for about twice the time; exact: by decomposition."""
    choice: Literal["columns", "blocks"] | None = None
    """Which columns frugal keeps moments for. columns (null): a random part; blocks: a run of them, each in its turn, the last first."""
    rest: Literal["adamw", "adamw_8bit", "adamw_4bit", "sgd"] | None = None
    """Preset of what is not a matrix of a hidden layer, where the preset is for matrices; null: adamw_8bit."""
    state: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """How moments of matrices are kept between steps; null: as the preset says."""
    block_order: PositiveInt | None = None
    """Rows and columns at most of the blocks that shampoo_4bit preconditions apart; null: 1200."""
    statistics_gap: PositiveInt | None = None
    """Steps after which shampoo_4bit takes up a gradient in its statistics; null: 100."""
    root_gap: PositiveInt | None = None
    """Steps after which shampoo_4bit makes inverse roots of its statistics, a multiple of statistics_gap; null: 5 statistics_gap."""
    weights: Weights | None = None
    """How parameters are kept. fp32; bf16: rounded to nearest at each step, which loses small updates; bf16_stochastic: rounded by chance,
    right on average; bf16_24bit: as bf16 for the model and 8 more bits for the update; int8_stochastic: matrices of hidden layers in eight
    bits, everything else as bf16_stochastic. All but fp32 need train.precision bf16. null: fp32, and int8_stochastic with q_galore."""
    gradients: Literal["bf16", "fp32"] | None = None
    """How gradients of bfloat16 parameters (optim.weights) are kept from pass to pass of a step. bf16: 2 bytes, a sum of many loses what is
    below 1/256 of it; fp32: 4 bytes, the sum is exact to float32. null: bf16."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay on matrices; never on norms, biases, gates, convolutions and embeddings."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; null switches clipping off."""
    kernel: Literal["auto", "eager", "fused"] = "auto"
    """What updates parameters. auto: one kernel where there is one (Adam: in eight and four bits triton on CUDA, C++ on CPU, there in
    float32 too; low-rank methods on whole matrices: C++ on CPU), else torch's own operations; eager: the latter; fused: a run of which
    no parameter has a kernel is refused. Same numbers for Adam, low-rank methods to 1e-6."""
    fuse_backward: bool | None = None
    """Update every parameter inside the backward pass, as soon as its gradient is complete, and free the gradient. null: only with lomo,
    which is that."""
    fused_clip: Literal["previous", "per_tensor"] | None = None
    """How optim.clip_norm is kept in a fused update, where the global norm is known too late. previous: gradients are scaled by what the
    norm of the step before asks for; per_tensor: each tensor's own norm is limited to clip_norm."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    @property
    def parts(self) -> composition.Parts:
        """The parts of preset composed."""
        return composition.Parts(self.projector or "none", self.rule or "adam", self.lift or "back", self.guard or "none")

    def reads(self, preset: Preset) -> tuple[str, ...]:
        """The optional settings that ``preset`` reads, of these."""
        return (*PARTS, *composition.settings_read(self.parts)) if preset == "composed" else READ.get(preset, ())

    @model_validator(mode="after")
    def _check_what_is_read(self) -> OptimConfig:
        presets = self.allowed if self.preset == "auto" else (self.preset,)
        reason = composition.refusal(self.parts) if "composed" in presets else None
        if reason is not None:
            raise ValueError(reason)
        for name in OPTIONAL:
            if getattr(self, name) is not None and not any(name in self.reads(preset) for preset in presets):
                readers = [preset for preset, names in READ.items() if name in names]
                what = f"{', '.join(presets)} of {', '.join(self.parts)}" if "composed" in presets else ", ".join(presets)
                by = ", ".join([*readers, "composed"] if name in PARTS else readers)
                raise ValueError(f"{name} is not read by preset {what}; leave it null (it is read by {by})")
        return self

    def with_preset(self, preset: Preset) -> OptimConfig:
        """These settings for one preset, without those that it does not read."""
        unread = {name: None for name in OPTIONAL if name not in self.reads(preset)}
        return self.model_copy(update={"preset": preset, **unread})

    @property
    def is_fused(self) -> bool:
        """Whether parameters are updated inside the backward pass."""
        return self.preset == "lomo" if self.fuse_backward is None else self.fuse_backward

    @model_validator(mode="after")
    def _check_fused(self) -> OptimConfig:
        presets = self.allowed if self.preset == "auto" else (self.preset,)
        if self.fuse_backward is False and "lomo" in presets:
            raise ValueError("fuse_backward false contradicts lomo, which is sgd updated in the backward pass; take preset sgd")
        if self.fused_clip is not None and not (self.fuse_backward or "lomo" in presets):
            raise ValueError("fused_clip is read with fuse_backward true (or preset lomo); leave it null")
        if self.fused_clip is not None and self.clip_norm is None:
            raise ValueError("fused_clip is read where clip_norm is a number; leave it null")
        return self

    def refused_clip(self) -> str | None:
        """Why a loop with these settings cannot clip, for who runs one; None where it can."""
        presets = self.allowed if self.preset == "auto" else (self.preset,)
        if self.clip_norm is None or self.fused_clip is not None or not (self.fuse_backward or "lomo" in presets):
            return None
        cause = "optim.fuse_backward" if self.fuse_backward else "optim.preset lomo"
        return (
            f"optim.clip_norm {self.clip_norm} needs the gradients of all parameters before the first update, and {cause} updates in the "
            "backward pass\nset optim.fused_clip=previous (scale by the norm of the step before) or per_tensor, or optim.clip_norm=null"
        )

    @property
    def kept_weights(self) -> Weights:
        """``weights``, or what null means."""
        return self.weights or ("int8_stochastic" if self.preset == "q_galore" else "fp32")

    @property
    def bfloat16_weights(self) -> bool:
        """Whether the model's parameters are bfloat16 (or fewer bits)."""
        return self.kept_weights != "fp32"

    @property
    def is_torch_adamw(self) -> bool:
        """Whether torch's own AdamW updates all parameters: what formulas know and what can be moved to host memory."""
        return self.preset == "adamw" and not self.bfloat16_weights

    @model_validator(mode="after")
    def _check_gradients(self) -> OptimConfig:
        if self.gradients is not None and not self.bfloat16_weights:
            raise ValueError(
                f"gradients {self.gradients} is of bfloat16 parameters, and weights are fp32 with gradients to match; leave it null or set "
                "optim.weights to one of few bits"
            )
        return self

    @model_validator(mode="after")
    def _check_gaps(self) -> OptimConfig:
        if self.root_gap is not None and self.root_gap % (self.statistics_gap or 100):
            raise ValueError(f"root_gap {self.root_gap} must be a multiple of statistics_gap {self.statistics_gap or 100}")
        return self

    @model_validator(mode="after")
    def _check_mup(self) -> OptimConfig:
        presets = self.allowed if self.preset == "auto" else (self.preset,)
        for preset in presets if self.mup_base_width is not None else ():
            if preset in MUP_PRESETS or (preset == "composed" and self.parts[:2] == ("none", "adam") and self.parts.guard == "none"):
                continue
            raise ValueError(
                f"mup_base_width scales rates as they transfer for methods that move every element by about the rate; those of {preset} "
                f"do not: leave it null, or take preset {', '.join(MUP_PRESETS)}"
            )
        return self

    @model_validator(mode="after")
    def _check_betas(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        return self
