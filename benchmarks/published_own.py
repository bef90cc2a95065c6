"""What longstride would do where other systems published a run: the same model, length and devices, the policy chosen by its planner.

Part of ``plan_published.py --own``. A recipe that gives every GPU a sequence of its own is planned so, the others share one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from published_recipes import Recipe

from memory_mgmt.devices import GIB
from memory_mgmt.plan_view import policy_lines
from models.errors import UserError
from trainer.config_file import resolve
from trainer.planning import plan_run


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
    mfu: float | None
    words: str
    """The policy, or why there is none."""
    published_peak_gib: float | None = None
    published_seconds: float | None = None


def own_overrides(recipe: Recipe) -> list[str]:
    """The same model, length and devices as settings of longstride, with everything else left to the planner.

    Differences that remain: the feed-forward is SwiGLU (a GELU one gets as many parameters), queries and keys are not normalised, and
    weights, gradients and moments are float32.
    """
    shape = recipe.shape
    ffn = shape.ffn if shape.gated else -(-2 * shape.ffn // 3 // 64) * 64
    parts = 2 * recipe.sp  # zigzag gives every rank two equal parts
    return [
        f"model.d_model={shape.width}",
        f"model.n_layers={shape.layers}",
        "model.layers=[full]",
        f"model.n_heads={shape.heads}",
        f"model.n_kv_heads={shape.kv_heads}",
        f"model.head_dim={shape.head_dim}",
        f"model.d_ff={ffn}",
        f"model.vocab_size={-(-shape.vocab // 64) * 64}",
        f"model.tie_embeddings={str(shape.tied).lower()}",
        f"data.seq_len={recipe.tokens // parts * parts}",
        f"parallel.cp={recipe.sp}",
        f"parallel.dp_shard={recipe.gpus // recipe.sp}",
        "train.precision=bf16",
        "memory.recompute=auto",
        "memory.offload=kept",
    ]


def own_choice(case: str, recipe: Recipe, peak_gib: float | None, seconds: float | None) -> Own:
    """longstride's plan for ``recipe``; ``peak_gib`` and ``seconds`` are the published ones, for comparison."""
    try:
        plan = plan_run(resolve(None, own_overrides(recipe)), recipe.device, with_changes=False)
    except UserError as error:
        return Own(case, None, None, None, None, None, str(error).splitlines()[0], peak_gib, seconds)
    words = " / ".join(" ".join(line.split()) for line in policy_lines(plan.policy)) if plan.policy is not None else ""
    if not plan.fits:
        words = f"needs {plan.peak_bytes / GIB:.1f} GiB with the leanest policy that the planner finds"
    predicted = plan.prediction
    return Own(
        case,
        plan.fits,
        plan.peak_bytes / GIB,
        plan.host_bytes / GIB,
        predicted.step_seconds if predicted else None,
        predicted.mfu if predicted else None,
        words,
        peak_gib,
        seconds,
    )


def own_lines(answers: Sequence[Own]) -> list[str]:
    """The section of the result file."""
    lines = [
        "## longstride's own choice",
        "",
        "What longstride's planner chooses for the same model, length and devices (`memory.recompute=auto memory.offload=kept`), by a "
        "traced step of longstride itself: ring attention, float32 weights, gradients and moments sharded over all ranks, nothing of them "
        "offloaded. The attention kernel is that of the device table. A plan, not a measurement; published figures beside it where there "
        "are any.",
        "",
        "| run | outcome | peak GiB | published | host GiB per rank | step s | published | MFU | policy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in answers:
        outcome = "refused" if one.fits is None else "fits" if one.fits else "does not fit"
        cells = [
            one.case,
            outcome,
            _number(one.peak_gib, 1),
            _number(one.published_peak_gib, 1),
            _number(one.host_gib, 1),
            _number(one.seconds, 0),
            _number(one.published_seconds, 0),
            "" if one.mfu is None else f"{one.mfu:.1%}",
            one.words,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
