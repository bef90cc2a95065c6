"""Which settings may change when a run is resumed: those that move it, lengthen it or watch it, not those that make it another
experiment under the same name. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import UserError
from trainer.config import RunConfig
from trainer.config_file import changed_keys, value_of

LAWFUL_SECTIONS = ("parallel.", "checkpoint.", "memory.", "guards.", "deepspeed.")
UNLAWFUL_KEYS = ("parallel.kv_dtype",)
"""Of lawful sections, what changes results on one rank too: keys and values are rounded."""
LAWFUL_KEYS = (
    "run.private",
    "engine",  # the same updates, in the same checkpoints
    "train.steps",
    "train.device",
    "train.compile",  # announced: equal to rounding
    "train.deterministic",
    "train.threads_per_rank",
    "train.eval_every_steps",
    "train.eval_sequences",
    "train.peak_tflops",
    "train.micro_batch_size",  # with grad_accum and the data-parallel degrees: only their product matters, and it is checked
    "train.grad_accum",
    "optim.fuse_backward",  # the same update; who clips must change optim.fused_clip with it, which is another experiment
    "data.cache_dir",
    "data.tokenize_workers",
    "data.prefetch_batches",
    "model.memory.chunk_size",
    "model.memory.gsa.chunk_size",
    "model.memory.mom.compute",  # the same sums in another order
    "model.memory.kernel",  # equal to the products' rounding
)


def _lawful(key: str) -> bool:
    return key in LAWFUL_KEYS or (key.startswith(LAWFUL_SECTIONS) and key not in UNLAWFUL_KEYS)


def check(old: RunConfig, new: RunConfig, allowed: Sequence[str] = (), saved_step: int = 0) -> None:
    """Raise UserError naming every changed setting that would make the resumed run another experiment.

    ``allowed``: settings that a person lets change all the same. ``saved_step``: of the newest checkpoint. What a checkpoint does not
    fit is refused when it is loaded.
    """
    if new.train.steps != old.train.steps and new.train.steps < saved_step:
        raise UserError(
            f"resume: train.steps {new.train.steps} lies behind step {saved_step}, which is saved already; give more, or leave it out"
        )
    changed = changed_keys(old, new)
    idle = [key for key in allowed if key not in changed]
    if idle:
        raise UserError(f"--allow {idle[0]}: this setting is not changed; give it as {idle[0]}=value too")
    unlawful = [key for key in changed if not _lawful(key) and key not in allowed]
    if unlawful:
        changes = ", ".join(f"{key} ({value_of(old, key)} -> {value_of(new, key)})" for key in unlawful)
        raise UserError(
            f"resume: {changes} would change the experiment under the same name\n"
            f"may change: train.steps, {', '.join(section + '*' for section in LAWFUL_SECTIONS)} "
            f"(not {', '.join(UNLAWFUL_KEYS)}) and how it runs; "
            f"for anything else start a new run, or insist: {' '.join(f'--allow {key}' for key in unlawful)}"
        )
    if old.global_batch_sequences != new.global_batch_sequences:
        per_pass = new.global_batch_sequences // new.train.grad_accum
        if old.global_batch_sequences % per_pass == 0:
            way_out = f"also set train.grad_accum={old.global_batch_sequences // per_pass}"
        else:
            way_out = f"choose parallel.dp_replicate x parallel.dp_shard x train.micro_batch_size to divide {old.global_batch_sequences}"
        raise UserError(
            f"resume: parallel.dp_replicate x parallel.dp_shard x train.micro_batch_size x train.grad_accum would change the sequences "
            f"per step from {old.global_batch_sequences} to {new.global_batch_sequences}; {way_out}"
        )
