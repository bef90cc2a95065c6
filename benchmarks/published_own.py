"""What longstride would do where other systems published a run: the same model, length and devices, everything else left to its planner.

Part of ``plan_published.py --own``. A recipe that gives every GPU a sequence of its own is planned with as many sequences per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from published_methods import estimate
from published_recipes import Recipe

import trainer.choosing
import trainer.planning
import trainer.settling
from memory_mgmt.cost_model import Rates
from memory_mgmt.devices import GIB, Device
from memory_mgmt.plan_view import policy_lines
from memory_mgmt.policy import Policy
from models.errors import UserError
from trainer.choosing_offload import as_planned
from trainer.config import RunConfig
from trainer.config_file import resolve
from trainer.planning import plan_target, predict, target_for
from trainer.settling import degrees_of, settled
from trainer.tracing import trace_step

SETTINGS = (
    "model.layers=[full]",
    "parallel.cp=auto",
    "parallel.dp_shard=auto",
    "parallel.sequence=auto",
    "train.precision=bf16",
    "train.deterministic=false",
    "train.residual=bf16",
    "memory.recompute=auto",
    "memory.offload=kept",
    "memory.quantise=feed_forward",
    "memory.offload_optimizer=auto",
    "memory.offload_parameters=auto",
)


@dataclass(frozen=True)
class Own:
    """longstride's plan for the model, length and devices of one published run."""

    case: str
    fits: bool | None
    """None: refused, see ``words``."""
    peak_gib: float | None
    """Per rank, with what the allocator reserves and the CUDA context."""
    host_gib: float | None
    """Per rank."""
    seconds: float | None
    """With the attention kernel of the published run."""
    mfu: float | None
    words: str
    """What was chosen, or why there is nothing."""
    published_peak_gib: float | None = None
    published_seconds: float | None = None
    their_seconds: float | None = None
    """Predicted for the published method, by the same rates."""
    shipped_seconds: float | None = None
    """As ``seconds``, with the kernel that longstride takes: cuDNN's on Hopper, else torch's FlashAttention 2."""
    settings: tuple[str, ...] = ()
    """What it was planned with: an answer to other settings is made anew."""

    @property
    def slower(self) -> bool:
        """Than the published method, both predicted with the same attention kernel."""
        return bool(self.fits and self.seconds and self.their_seconds and self.seconds > self.their_seconds)


def own_overrides(recipe: Recipe) -> tuple[str, ...]:
    """The same model, length and devices as settings of longstride.

    Differences that remain: the feed-forward is SwiGLU (a GELU one gets as many parameters), queries and keys are not normalised, and
    weights, gradients and moments are float32.
    """
    shape = recipe.shape
    ffn = shape.ffn if shape.gated else -(-2 * shape.ffn // 3 // 64) * 64
    parts = 2 * recipe.sp  # zigzag gives every rank two equal parts
    return (
        f"model.d_model={shape.width}",
        f"model.n_layers={shape.layers}",
        f"model.n_heads={shape.heads}",
        f"model.n_kv_heads={shape.kv_heads}",
        f"model.head_dim={shape.head_dim}",
        f"model.d_ff={ffn}",
        f"model.vocab_size={-(-shape.vocab // 64) * 64}",
        f"model.tie_embeddings={str(shape.tied).lower()}",
        f"data.seq_len={recipe.tokens // parts * parts}",
        f"parallel.ranks={recipe.gpus}",
        f"train.grad_accum={recipe.gpus // recipe.sp}",
        *SETTINGS,
    )


@contextmanager
def _attention_kernel(recipe: Recipe) -> Iterator[None]:
    """Inside, plans are made with the rates of the recipe's attention kernel."""

    def rates(device: Device, deterministic: bool = True) -> Rates:
        return Rates.from_device(device, attention=recipe.attention)

    with patch.object(trainer.planning, "rates_of", rates):
        yield


@contextmanager
def _unhurried() -> Iterator[None]:
    """Inside, a busy machine does not cut tries short: an answer that is kept must not depend on what else ran here."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(trainer.settling, "TIME_LIMIT", math.inf))
        for module in (trainer.settling, trainer.choosing):
            stack.enter_context(patch.object(module, "_SOLVE_SECONDS", 600.0))
        yield


def own_choice(case: str, recipe: Recipe, peak_gib: float | None, seconds: float | None) -> Own:
    """longstride's plan for ``recipe``; ``peak_gib`` and ``seconds`` are the published ones, for comparison."""
    settings = own_overrides(recipe)
    theirs = estimate(recipe).seconds
    try:
        with _attention_kernel(recipe), _unhurried():
            config = settled(resolve(None, list(settings)), recipe.device).config
            target = target_for(config, recipe.device)
            plan = plan_target(target)
    except UserError as error:
        return Own(case, None, None, None, None, None, str(error).splitlines()[0], peak_gib, seconds, theirs, None, settings)
    planned = as_planned(config, plan)
    trace = trace_step(target.with_config(planned).request(plan.policy))
    shipped = predict(target, trace)
    predicted = plan.prediction
    return Own(
        case,
        plan.fits,
        plan.peak_bytes / GIB,
        plan.host_bytes / GIB,
        predicted.step_seconds if predicted else None,
        predicted.mfu if predicted else None,
        _words(planned, plan.policy) if plan.fits else f"needs {plan.peak_bytes / GIB:.1f} GiB at least, as far as the planner finds",
        peak_gib,
        seconds,
        theirs,
        shipped.step_seconds if shipped else None,
        settings,
    )


def _words(config: RunConfig, policy: Policy | None) -> str:
    """Degrees, scheme, what lives in host memory, and the policy."""
    scheme = f", {config.parallel.sequence}" if config.parallel.cp > 1 else ""
    hosted = [name for name in ("optimizer", "parameters") if getattr(config.memory, f"offload_{name}") == "host"]
    places = f"; {' and '.join(hosted)} in host memory" if hosted else ""
    lines = policy_lines(policy) if policy is not None else []
    return " / ".join([f"{degrees_of(config)}{scheme}{places}", *(" ".join(line.split()) for line in lines)])


def own_lines(answers: Sequence[Own]) -> list[str]:
    """The section of the result file."""
    fitting, slower = [one for one in answers if one.fits], [one.case for one in answers if one.slower]
    lines = [
        "## longstride's own choice",
        "",
        "What longstride's planner chooses for the same model, length and devices, everything left open, by a traced step of longstride "
        f"itself with float32 weights, gradients and moments: `{' '.join(SETTINGS)}`. Both step times are predicted with the published "
        "run's attention kernel, so that methods are compared and not kernels; the last but one column is with the kernel that longstride "
        "takes (cuDNN's on Hopper, else torch's FlashAttention 2). A plan, not a measurement.",
        "",
        f"{len(fitting)} of {len(answers)} fit (goal 15 of 22). "
        + (f"Slower than the published method: {'; '.join(slower)}." if slower else "None that fits is slower than the published method."),
        "",
        "| run | outcome | peak GiB | published | host GiB per rank | step s | their method's | measured | MFU | own kernel | chosen |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in answers:
        outcome = "refused" if one.fits is None else "fits" if one.fits else "does not fit"
        cells = [
            one.case,
            outcome if one.settings else f"{outcome} (planned with earlier settings)",
            _number(one.peak_gib, 1),
            _number(one.published_peak_gib, 1),
            _number(one.host_gib, 1),
            _number(one.seconds, 0),
            _number(one.their_seconds, 0),
            _number(one.published_seconds, 0),
            "" if one.mfu is None else f"{one.mfu:.1%}",
            _number(one.shipped_seconds, 0),
            one.words,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
