"""Settings of the engines: which one updates the model, and what of a run only the native one can do. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from models.config import PositiveInt, Section

if TYPE_CHECKING:
    from trainer.config import RunConfig

EngineName = Literal["native", "deepspeed"]


class DeepSpeedSection(Section):
    """How DeepSpeed's ZeRO shares a model among all ranks, with ``engine: deepspeed`` (docs/engines.md)."""

    stage: Literal[1, 2, 3] = 3
    """What every rank holds a share of. 1: optimizer states; 2: gradients too; 3: parameters too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: master weights and optimizer states live in host memory and are updated there, by DeepSpeed's own AdamW for CPUs."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """cpu: parameters live in host memory between their uses (stage 3)."""
    bucket_elements: PositiveInt = 50_000_000
    """Gradients are reduced so many elements at a time; every rank holds a buffer of them."""

    def bucket_of(self, parameters: int) -> int:
        """Elements of the buffer for a model of so many parameters."""
        return min(self.bucket_elements, parameters)

    @model_validator(mode="after")
    def _check_offload(self) -> DeepSpeedSection:
        if self.offload_parameters == "cpu" and self.stage != 3:
            raise ValueError(
                f"offload_parameters cpu moves shares of parameters, which stage {self.stage} has none of: set stage 3, or "
                "offload_parameters none"
            )
        return self


def refused_engine(config: RunConfig) -> str | None:
    """Why ``config`` cannot run with its engine, and the remedy; None where it can."""
    if config.engine == "native":
        if config.deepspeed == DeepSpeedSection():
            return None
        changed = next(name for name in DeepSpeedSection.model_fields if getattr(config.deepspeed, name) != _default(name))
        return f"deepspeed.{changed} is read with engine deepspeed, and engine is native: set engine deepspeed, or leave it out"
    wrong = next((words for wanted, words in _native_only(config) if wanted), None)
    return None if wrong is None else f"engine deepspeed: {wrong}, or engine native"


def _default(name: str) -> object:
    return DeepSpeedSection.model_fields[name].default


def _native_only(config: RunConfig) -> list[tuple[bool, str]]:
    """(whether it is asked for, what is wrong with it and what to set instead) of everything that DeepSpeed cannot carry out."""
    optim, memory, parallel, train = config.optim, config.memory, config.parallel, config.train
    return [
        (
            optim.preset != "adamw",
            f"optim.preset {optim.preset} needs matrices or states by parameter, and ZeRO updates flat pieces; set optim.preset adamw",
        ),
        (optim.kept_weights != "fp32", f"optim.weights {optim.weights}: ZeRO keeps float32 weights of its own; leave optim.weights null"),
        (optim.is_fused, "optim.fuse_backward: ZeRO updates when all gradients are reduced; set optim.fuse_backward false"),
        (train.precision == "fp64", "train.precision fp64: ZeRO's weights and states are float32; set train.precision fp32 or bf16"),
        (
            train.carry_state != "none",
            f"train.carry_state {train.carry_state} is not known to work there; set train.carry_state none",
        ),
        (
            memory.offload_optimizer != "none",
            f"memory.offload_optimizer {memory.offload_optimizer} is of the native engine; set it none and deepspeed.offload_optimizer cpu",
        ),
        (
            memory.offload_parameters != "none",
            f"memory.offload_parameters {memory.offload_parameters} is of the native engine; set it none and "
            "deepspeed.offload_parameters cpu",
        ),
        (
            memory.recompute == "auto",
            "memory.recompute auto is chosen for the native engine's step; set memory.recompute none, mixer or block",
        ),
        (memory.plan == "estimate", "memory.plan estimate: formulas know the native engine; set memory.plan trace"),
        (
            parallel.kv_residence == "host",
            "parallel.kv_residence host is of the native engine's step; set parallel.kv_residence device",
        ),
        (memory.arena, "memory.arena plans addresses of the native engine's step; set memory.arena false"),
        (
            bool(parallel.chosen_by_plan),
            f"parallel.{next(iter(parallel.chosen_by_plan), '')} auto is chosen for the native engine; give a number",
        ),
        (
            parallel.dp_replicate > 1,
            f"parallel.dp_replicate {parallel.dp_replicate}: ZeRO shares the model among all ranks; set parallel.dp_replicate 1 and "
            f"parallel.dp_shard {parallel.dp_replicate * parallel.dp_shard}",
        ),
        (
            parallel.tp > 1,
            f"parallel.tp {parallel.tp}: ZeRO would take parts of a matrix for the whole; set parallel.tp 1 and "
            f"parallel.dp_shard {parallel.tp * parallel.dp_shard}",
        ),
        (
            bool(config.model.table_shapes),
            "memory layers with product keys and hierarchical memories update rows of a table, and ZeRO knows no rows; take "
            "model.feedforward dense",
        ),
    ]
