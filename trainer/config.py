"""The settings of one run: what is validated once, saved resolved, and never changed. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from memory_mgmt.config import MemoryConfig
from models.config import ModelConfig, Section
from optim.config import OptimConfig
from parallel.config import ParallelConfig
from trainer import exchange_rules, tensor_rules
from trainer.carry_rules import refused_carrying
from trainer.compile_rules import refused_compile
from trainer.config_sections import RUN_NAME, CheckpointSection, DataSection, GuardsSection, RunSection, TrainSection
from trainer.engine_config import DeepSpeedSection, EngineName, refused_engine
from trainer.prefix_rules import refused_prefixes
from trainer.segment_rules import refused_segments

__all__ = ["RUN_NAME", "CheckpointSection", "DataSection", "GuardsSection", "RunConfig", "RunSection", "TrainSection"]

VALUE_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Of a value computed under a precision."""


class RunConfig(Section):
    """Everything about one run."""

    engine: EngineName = "native"
    """Who shards the model and updates it. native: FSDP2 and this package's optimizers; deepspeed: DeepSpeed's ZeRO (section deepspeed)."""
    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    guards: GuardsSection = GuardsSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def _check_across(self) -> RunConfig:
        self._check_guards()
        if self.optim.mup_base_width is not None and self.model.tie_embeddings:
            raise ValueError("optim.mup_base_width scales embedding and output matrix differently; set model.tie_embeddings false")
        for refused in (
            refused_carrying(self),
            refused_engine(self),
            refused_segments(self),
            refused_prefixes(self),
            refused_compile(self),
        ):
            if refused:
                raise ValueError(refused)
        if refused := self.optim.refused_clip():
            raise ValueError(refused)
        weights = self.optim.kept_weights
        if self.optim.bfloat16_weights and self.train.precision != "bf16":
            raise ValueError(
                f"optim.weights {weights}{'' if self.optim.weights else ' (of preset q_galore)'} keeps parameters in few bits; "
                f"set train.precision bf16, not {self.train.precision}, or optim.weights fp32"
            )
        if self.optim.weights == "fp32" and self.train.precision == "fp64":
            raise ValueError("optim.weights fp32 contradicts train.precision fp64, which keeps parameters in float64; leave it null")
        if self.memory.offload_optimizer == "host" and self.optim.is_fused:
            raise ValueError(
                "memory.offload_optimizer host updates bucket after bucket once all gradients are there, optim.fuse_backward frees them in "
                "the backward pass: set offload_optimizer none or fuse_backward false"
            )
        if self.data.cluster_key is not None and "hierarchical" not in self.model.feedforward_kinds:
            raise ValueError("data.cluster_key is read by layers of model.feedforward hierarchical, and there is none: leave it out")
        if self.model.table_shapes:
            self._check_tables()
        movable = (self.optim.is_torch_adamw or self.optim.preset == "auto") and not self.optim.is_fused
        if self.memory.offload_parameters == "host" and not movable:
            if self.optim.is_fused:
                reason = "optim.fuse_backward updates them inside it, where they are"
            elif self.optim.bfloat16_weights:
                reason = f"optim.weights {weights} rounds them where they are, on the device"
            else:
                reason = f"optim.preset {self.optim.preset} updates them where they are, on the device"
            raise ValueError(
                "memory.offload_parameters host moves parameters with adamw's states, bucket by bucket after the backward pass; "
                f"{reason}: set offload_parameters none"
            )
        self._check_kv_residence()
        self._check_kv_dtype()
        self._check_per_document()
        parallel = self.parallel
        if parallel.tp > 1 and (refused := tensor_rules.refusal(self)):
            raise ValueError(refused)
        if refused := exchange_rules.refusal(self):
            raise ValueError(refused)
        if parallel.chosen_by_plan:
            return self  # checked for every choice
        if parallel.ranks not in (None, parallel.ranks_asked):
            raise ValueError(
                f"parallel.ranks {parallel.ranks} is not {parallel.product} = {parallel.ranks_asked}; "
                "leave it null or make one of them auto"
            )
        self._check_scheme()
        if parallel.scheme_is_auto and parallel.cp > 1:
            return self  # checked with the scheme that is chosen
        parts = parallel.cp * parallel.tp * (2 if self.layout == "zigzag" else 1)
        if self.data.seq_len % parts:
            tp = f"parallel.tp {parallel.tp}, " if parallel.tp > 1 else ""
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is not divisible by {parts} "
                f"(parallel.cp {parallel.cp}, {tp}{self.layout} layout); the next length that is: {-(-self.data.seq_len // parts) * parts}"
            )
        return self

    def _check_guards(self) -> None:
        for key, wanted in (("on_not_finite", self.guards.on_not_finite), ("on_spike", self.guards.on_spike)):
            if wanted == "skip_step" and self.optim.is_fused:
                raise ValueError(
                    f"guards.{key} skip_step decides after the backward pass, in which optim.fuse_backward has updated everything already: "
                    f"set guards.{key} rollback or stop"
                )
            if wanted == "rollback" and not self.checkpoint.save_every_steps:
                raise ValueError(f"guards.{key} rollback goes back to a checkpoint: set checkpoint.save_every_steps")

    def _check_tables(self) -> None:
        """Refuse what layers that read value tables cannot do."""
        if "hierarchical" in self.model.feedforward_kinds and self.data.cluster_key is None:
            raise ValueError(
                "model.feedforward hierarchical fetches parameters by the clusters of documents: set data.cluster_key to the key that "
                "holds them (`longstride cluster` writes one)"
            )
        memory, optim = self.memory, self.optim
        if "hierarchical" in self.model.feedforward_kinds and optim.mup_base_width is not None:
            raise ValueError("optim.mup_base_width does not scale the hidden units of model.feedforward hierarchical: leave it null")
        if memory.quantise == "feed_forward" and memory.recompute != "auto":
            raise ValueError(
                "memory.quantise feed_forward keeps dense feed-forwards in eight bits, not layers that read value tables: "
                "set quantise none, or recompute auto, which leaves those out"
            )
        if memory.offload == "kept" and memory.recompute == "none" and not memory.ffn_tile_tokens:
            raise ValueError(
                "memory.offload kept would swap the inside of layers that read value tables, which are kept or recomputed: "
                "set recompute block or auto, or offload inputs"
            )
        if optim.is_torch_adamw and optim.preset != "auto":
            raise ValueError(
                "optim.preset adamw is torch's and updates every row of the value table, of which a step touches few; "
                "set optim.preset adamw_8bit, or another with optim.rest of your choice"
            )
        if optim.kept_weights != "fp32":
            raise ValueError(
                f"optim.weights {optim.kept_weights} does not know rows that are updated alone, as those of value tables are: set it fp32"
            )

    def _check_scheme(self) -> None:
        """Refuse a scheme that the heads or the number of ranks do not allow, naming one that can."""
        cp, sequence, ulysses = self.parallel.cp, self.parallel.sequence, self.parallel.ulysses
        heads = self.model.n_heads // self.parallel.tp  # of one tensor-parallel rank
        if cp > 1 and self.layout == "zigzag" and self.model.has_sequential_memory:
            raise ValueError(
                f"parallel.layout zigzag: the states of model.memory.kind {self.model.memory.kind} go from rank to rank, in order; "
                "set parallel.layout=contiguous"
            )
        if cp == 1 or not self.model.has_attention:
            return
        possible = [n for n in range(2, min(heads, cp - 1) + 1) if cp % n == 0]
        degrees = f"parallel.sequence=ring_x_ulysses with parallel.ulysses one of {', '.join(map(str, possible))}, " if possible else ""
        if sequence == "ulysses" and heads < cp:
            raise ValueError(
                f"parallel.sequence ulysses gives every one of parallel.cp {cp} ranks a query head, and model.n_heads is {heads}; "
                f"set {degrees}parallel.sequence=ring or allgather_kv"
            )
        inner = [n for n in range(2, cp) if cp % n == 0]
        if sequence == "double_ring" and (self.parallel.ring_inner not in (None, *inner) or not inner):
            named = f"parallel.ring_inner one of {', '.join(map(str, inner))}, or " if inner else ""
            raise ValueError(
                f"parallel.ring_inner {self.parallel.ring_inner} does not divide parallel.cp {cp} into several rings of several ranks; "
                f"set {named}parallel.sequence=ring"
            )
        if sequence == "ring_x_ulysses" and (ulysses not in (None, *possible) or not possible):
            asked = f"parallel.ulysses {ulysses}" if ulysses else "parallel.sequence ring_x_ulysses"
            raise ValueError(
                f"{asked} does not divide parallel.cp {cp} into a ring of Ulysses groups of at most model.n_heads {heads} ranks; "
                f"set {degrees}parallel.sequence={'ulysses or ring' if cp <= heads else 'ring'}"
            )

    def _check_kv_residence(self) -> None:
        """Refuse keys in host memory where there are none, or where a planner does not know them."""
        if self.parallel.kv_residence == "device":
            return
        if "full" not in self.model.layer_kinds:
            raise ValueError("parallel.kv_residence host moves keys and values of full attention, and model.layers has none: set it device")
        if self.model.memory.around_stack or self.engine != "native":
            other = f"model.memory.kind {self.model.memory.kind} and engine {self.engine}"
            raise ValueError(
                "parallel.kv_residence host has only been shown with layers read once per sequence and engine native, "
                f"not with {other}: set it device"
            )
        if self.memory.recompute == "auto":
            raise ValueError(
                "parallel.kv_residence host: the planner of memory.recompute auto counts keys and values on the device; set "
                "memory.recompute none, mixer or block, or kv_residence device"
            )

    def _check_kv_dtype(self) -> None:
        """Refuse a dtype that would send more bytes, or that nothing would be sent in."""
        kv_dtype, precision = self.parallel.kv_dtype, self.train.precision
        if kv_dtype == "compute":
            return
        if VALUE_BYTES[kv_dtype] > VALUE_BYTES[precision]:
            raise ValueError(f"parallel.kv_dtype {kv_dtype} is wider than keys and values of train.precision {precision}: set it compute")
        if not self.model.has_attention:
            raise ValueError(f"parallel.kv_dtype {kv_dtype} is of keys and values of attention, and model.layers has none: set it compute")
        if self.train.segment_tokens is not None:
            raise ValueError(
                f"parallel.kv_dtype {kv_dtype}: windows hand their keys from segment to segment of train.segment_tokens as they are "
                "computed: set it compute"
            )

    def _check_per_document(self) -> None:
        """Refuse to deal out every document by itself where another layer or scheme needs to know where tokens are without documents."""
        if self.parallel.layout != "per_document":
            return
        wrong = [
            remedy
            for held, remedy in (
                (self.parallel.sequence in ("ring", "double_ring"), "parallel.sequence=ring or double_ring"),
                (self.train.micro_batch_size == 1, "train.micro_batch_size=1 (rows differ in their documents)"),
                (self.data.document_mask, "data.document_mask=true (else there is one document: zigzag)"),
                ("memory" not in self.model.layer_kinds, "layers without memory (its state and convolution cross few, ordered ranges)"),
            )
            if not held
        ]
        if wrong:
            raise ValueError(f"parallel.layout per_document needs {', '.join(wrong)}; or set parallel.layout=zigzag")

    @property
    def layout(self) -> Literal["contiguous", "zigzag", "per_document"]:
        """Sequence layout after resolving ``auto``."""
        if self.parallel.layout != "auto":
            return self.parallel.layout
        balanced = self.parallel.sequence == "ulysses"  # by itself: every rank has all tokens of its heads
        zigzag = self.parallel.cp > 1 and "full" in self.model.layer_kinds and not balanced and not self.model.has_sequential_memory
        return "zigzag" if zigzag else "contiguous"

    @property
    def global_batch_sequences(self) -> int:
        """Sequences consumed by one optimizer step over all ranks; a degree that is ``auto`` counts as 1."""
        groups = max(1, self.parallel.dp_replicate) * max(1, self.parallel.dp_shard)
        return groups * self.train.micro_batch_size * self.train.grad_accum
