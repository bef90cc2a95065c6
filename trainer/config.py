"""The settings of one run: what is validated once, saved resolved, and never changed. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from memory_mgmt.config import MemoryConfig
from models.config import ModelConfig, PositiveInt, Section
from models.stack_config import STACK_KINDS
from optim.config import OptimConfig
from parallel.config import ParallelConfig
from trainer import tensor_rules
from trainer.engine_config import DeepSpeedSection, EngineName, refused_engine
from trainer.evals.settings import OF_IDS, SyntheticSection

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunSection(Section):
    """Where a run lives."""

    root: str = "runs"
    """Directory that holds run directories."""
    name: str | None = None
    """Name of the run directory; null makes one from the config file's name and the time."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not RUN_NAME.fullmatch(name):
            raise ValueError("a run name is 1 to 128 letters, digits, '.', '_' or '-' and begins with a letter or digit")
        return name


class DataSection(Section):
    """What is read and how it is packed into sequences."""

    source: Literal[
        "python_stdlib",
        "text",
        "jsonl",
        "parquet",
        "arrow",
        "hub",
        "synthetic/mqar",
        "synthetic/associative",
        "synthetic/copy",
        "synthetic/reverse",
        "synthetic/sort",
        "synthetic/passkey",
        "synthetic/needle_single",
        "synthetic/needle_multikey",
        "synthetic/needle_haystack",
        "synthetic/variables",
        "synthetic/qa1",
        "synthetic/qa2",
        "synthetic/qa3",
        "synthetic/qa4",
        "synthetic/qa5",
    ] = "python_stdlib"
    """python_stdlib: the running Python's standard library, one package one document; text, jsonl, parquet, arrow: local
    files or folders at data.path; hub: a data set name for the datasets library; synthetic/TASK: generated (docs/evaluation.md)."""
    path: str | None = None
    """File, folder or glob (local sources), data set name (hub), or another library folder (python_stdlib; null: the running one)."""
    hub_config: str | None = None
    """Configuration (subset) name of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set."""
    text_field: str = "text"
    """Column or JSON key that holds the document."""
    valid_path: str | None = None
    """Held-out data of the same source kind; null holds out documents of data.path by valid_fraction."""
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of documents held out when valid_path is null: chosen by a hash of the document, at least one when above 0."""
    tokenizer: str = "bytes"
    """bytes: built-in byte-level tokenizer; else a local path of a Hugging Face tokenizer (folder or tokenizer.json)."""
    seq_len: PositiveInt = 1024
    """Tokens of one sequence (before it is split over parallel.cp ranks)."""
    document_mask: bool = True
    """Attention and memory stop at document bounds; false lets packed documents see one another."""
    shuffle: Literal["sequences", "documents", "none"] = "sequences"
    """sequences: documents and then packed sequences are permuted each epoch; documents: only documents; none: file order."""
    streaming: bool = False
    """Tokenise while reading, in file order with an exact cursor, instead of tokenising the source once; needs data.shuffle none and
    data.valid_path or data.valid_fraction 0."""
    on_bad_document: Literal["error", "skip"] = "error"
    """error: stop at an unreadable document, naming file and line; skip: leave it out and count it."""
    cache_dir: str | None = None
    """Where tokenised sources are cached; null means ~/.cache/longstride/tokens."""
    tokenize_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise; 0 uses every core."""
    prefetch_batches: Annotated[int, Field(ge=0, le=64)] = 2
    """Batches made ready in the background, rounded up to whole steps."""
    synthetic: SyntheticSection = SyntheticSection()
    """Of generated data (data.source synthetic/...)."""

    @model_validator(mode="after")
    def _check_path(self) -> DataSection:
        if self.source.startswith("synthetic/"):
            self._check_synthetic()
        elif self.source != "python_stdlib" and not self.path:
            raise ValueError(f"source '{self.source}' needs data.path")
        elif self.synthetic != SyntheticSection():
            raise ValueError(f"data.synthetic is not read by source '{self.source}'; leave it out, or set data.source synthetic/...")
        return self

    def _check_synthetic(self) -> None:
        """Refuse what generated data do not read."""
        for name in ("path", "valid_path", "streaming", "shuffle"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name} is not read by source '{self.source}', which makes its samples by number; leave it out")
        task = self.source.removeprefix("synthetic/")
        if refused := self.synthetic.refused(task):
            raise ValueError(refused)
        if task in OF_IDS and self.tokenizer != "bytes":
            raise ValueError(f"data.tokenizer is not read by source '{self.source}', which has ids of its own; leave it out")


class TrainSection(Section):
    """Steps, precision and determinism."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights and data order."""
    init_from: str | None = None
    """Weights to begin with instead of random ones: a directory that longstride import made, a run directory (its newest checkpoint) or one
    checkpoint. Optimizer, learning rate and data begin anew; the model section must be of the same shapes."""
    deterministic: bool = True
    """Only deterministic kernels: two runs of one configuration are bit-identical."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA when there is a device."""
    precision: Literal["bf16", "fp32", "fp64"] = "fp32"
    """bf16: autocast, with parameters as optim.weights says (fp32 unless it names others); fp32; fp64 (for exactness tests)."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """What the residual stream between blocks is kept in. fp32: as the parameters are (fp64 under precision fp64). bf16, with precision
    bf16: half the memory of every block's input, as most systems train; each of the stream's sums is rounded to 8 bits."""
    carry_state: Literal["none", "document"] = "none"
    """document: a memory goes on from the state in which the sequence before left it where a document runs through several sequences
    (gradients do not); every row of a step reads on where it stood in the step before. Needs data.shuffle documents or none."""
    bptt_segments: PositiveInt | None = None
    """Of a memory around the stack (model.memory.kind rmt): gradients end at every so many-th border of segments, counted from the
    sequence's start. null: they go through all segments of the sequence."""
    micro_batch_size: PositiveInt = 1
    """Sequences per data-parallel rank in one forward and backward pass."""
    grad_accum: PositiveInt = 1
    """Forward and backward passes per optimizer step."""
    threads_per_rank: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each rank; 0 shares the cores evenly among the ranks of this machine."""
    eval_every_steps: Annotated[int, Field(ge=0)] = 0
    """Held-out loss every so many steps; 0 only at the end."""
    eval_sequences: Annotated[int, Field(ge=0)] = 8
    """Held-out sequences per evaluation; 0 switches evaluation off."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak rate of one device for MFU; null takes the data-sheet rate of a known GPU, or measures a matmul on CPU."""

    @model_validator(mode="after")
    def _check_residual(self) -> TrainSection:
        if self.residual == "bf16" and self.precision != "bf16":
            raise ValueError(f"residual bf16 needs precision bf16, not {self.precision}: leave residual at fp32")
        return self


class CheckpointSection(Section):
    """When the run is saved and what is kept."""

    save_every_steps: Annotated[int, Field(ge=0)] = 0
    """Save every so many steps; 0 only at the end and when stopped by a signal."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept (at least 2, so that a damaged one has a predecessor)."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Checkpoints at multiples of this are kept for ever; 0 keeps none beyond keep_last."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    verify: bool = True
    """Read every checkpoint back from the disk once it is written; until it is good, no older one is deleted."""


class GuardsSection(Section):
    """What ends or mends a run that goes wrong."""

    hang_times_median: Annotated[float, Field(ge=0)] = 20.0
    """A rank without a step for this many times the median step writes the stacks of its threads to its log and ends with exit code 85;
    0 switches that off."""
    hang_min_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Never sooner than this; the first steps, an evaluation and a save have three times as long."""
    on_not_finite: Literal["stop", "skip_step", "rollback"] = "stop"
    """A loss or gradient that is not finite. stop: the run fails, its last checkpoint intact. skip_step: no update; the step is made of the
    data that follow. rollback: on from the last good checkpoint, past those data. What was passed over is kept in passed_over.jsonl."""
    on_spike: Literal["report", "stop", "skip_step", "rollback"] = "report"
    """The same for a loss or gradient norm far above those of the steps before; report: a line in the log."""
    spike_deviations: Annotated[float, Field(gt=0)] = 6.0
    """How many standard deviations above the mean make a spike (a deviation counts as 1% of the mean at least)."""
    spike_steps: Annotated[int, Field(ge=8, le=10_000)] = 128
    """Of so many steps before; nothing is judged until a quarter of them are known."""
    rollback_steps: PositiveInt = 1
    """How many steps' data a rollback passes over, those of the offending step last: what upset a run may have been read before."""
    max_mends: PositiveInt = 3
    """After so many skipped steps in a row, or rollbacks to one checkpoint, the run stops."""
    report_every_steps: Annotated[int, Field(ge=0)] = 50
    """Every so many steps each rank says how long its own work took and how much memory it holds; 0: never. What follows needs it."""
    straggler_times: Annotated[float, Field(ge=0)] = 1.5
    """A rank whose own work takes more than so many times the others' median, in two reports in a row, is named; 0: never."""
    memory_growth: Annotated[float, Field(ge=0)] = 0.1
    """A rank whose memory keeps growing, by more than this share, is named; 0: never."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """No room for a checkpoint (looked for before it is begun). stop: the run fails, its last checkpoint intact. continue: it trains on
    and tries again after every step; only at its end, or when it is stopped, it fails."""


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
        for refused in (self._refused_carrying(), self._refused_segments(), refused_engine(self)):
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
        if self.memory.offload_optimizer == "host" and self.optim.bfloat16_weights:
            raise ValueError(
                f"memory.offload_optimizer host moves the states of torch's AdamW, which does not round to optim.weights {weights}: "
                "set offload_optimizer none"
            )
        if self.memory.offload_optimizer == "host" and self.optim.preset not in ("adamw", "auto"):
            raise ValueError(
                f"memory.offload_optimizer host moves the states of adamw; optim.preset {self.optim.preset} keeps its own on the device: "
                "set offload_optimizer none"
            )
        if self.memory.offload_optimizer == "host" and self.optim.is_fused:
            raise ValueError(
                "memory.offload_optimizer host updates bucket after bucket once all gradients are there, optim.fuse_backward frees them in "
                "the backward pass: set offload_optimizer none or fuse_backward false"
            )
        if "product_keys" in self.model.feedforward_kinds:
            self._check_product_keys()
        movable = (self.optim.is_torch_adamw or self.optim.preset == "auto") and not self.optim.is_fused
        if self.memory.offload_parameters == "host" and not movable:
            if self.optim.is_fused:
                reason = "optim.fuse_backward updates them inside it, where they are"
            elif self.optim.bfloat16_weights:
                reason = f"optim.weights {weights} rounds them where their states are, on the device"
            else:
                reason = f"optim.preset {self.optim.preset} keeps its states on the device, and updates parameters there"
            raise ValueError(
                "memory.offload_parameters host moves parameters with adamw's states, bucket by bucket after the backward pass; "
                f"{reason}: set offload_parameters none"
            )
        self._check_kv_residence()
        self._check_per_document()
        parallel = self.parallel
        if parallel.tp > 1 and (refused := tensor_rules.refusal(self)):
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

    def _check_product_keys(self) -> None:
        """Refuse what memory layers with product keys cannot do."""
        memory, optim = self.memory, self.optim
        if memory.quantise == "feed_forward" and memory.recompute != "auto":
            raise ValueError(
                "memory.quantise feed_forward keeps dense feed-forwards in eight bits, not memory layers with product keys: "
                "set quantise none, or recompute auto, which leaves those out"
            )
        if memory.offload == "kept" and memory.recompute == "none" and not memory.ffn_tile_tokens:
            raise ValueError(
                "memory.offload kept would swap the inside of memory layers with product keys, which are kept or recomputed: "
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

    def _refused_carrying(self) -> str | None:
        """Why states cannot be carried from sequence to sequence with these settings; None if they can, or are not to be."""
        if self.train.carry_state == "none":
            return None
        wrong = [
            remedy
            for held, remedy in (
                (not self.data.source.startswith("synthetic/"), "documents that go on (generated samples do not)"),
                (
                    "memory" in self.model.layer_kinds or self.model.memory.around_stack,
                    "a layer of kind memory in model.layers or a memory around them",
                ),
                (self.data.shuffle != "sequences", "data.shuffle documents or none (shuffled sequences do not follow one another)"),
                (not self.data.streaming, "data.streaming false (the rows of a step are neighbours in a stream)"),
                (self.data.document_mask, "data.document_mask true (without it no document begins or ends)"),
                (self.memory.plan != "estimate", "memory.plan trace (formulas know no carried states)"),
                (self.guards.on_not_finite == "stop", "guards.on_not_finite stop (what passes over data leaves a gap in documents)"),
                (self.guards.on_spike in ("report", "stop"), "guards.on_spike report or stop (likewise)"),
            )
            if not held
        ]
        return f"train.carry_state {self.train.carry_state} needs " + " and ".join(wrong) if wrong else None

    def _refused_segments(self) -> str | None:
        """Why a sequence cannot be read segment by segment with these settings; None if it can, or is not to be."""
        kind = self.model.memory.kind
        if not self.model.memory.around_stack:
            asked = [
                name
                for name, is_set in (
                    ("train.bptt_segments", self.train.bptt_segments is not None),
                    ("memory.segment_states", self.memory.segment_states != "all"),
                )
                if is_set
            ]
            kinds = " or ".join(STACK_KINDS)
            return f"{asked[0]} is read by memories around the stack (model.memory.kind {kinds}) only: leave it out" if asked else None
        if self.parallel.tp > 1:
            return f"parallel.tp {self.parallel.tp}: {kind} reads by segments, which tensor parallelism does not know; set parallel.tp=1"
        if self.engine != "native":
            return f"engine {self.engine}: {kind} runs the layers segment by segment, which only engine native does; set engine=native"
        if self.parallel.cp > 1:
            return (
                f"parallel.cp {self.parallel.cp}: {kind} is not parallel inside one sequence (what one segment leaves is what the next one "
                f"begins with); set parallel.cp=1 parallel.dp_shard={self.parallel.cp * max(1, self.parallel.dp_shard)}"
            )
        return None

    def _check_scheme(self) -> None:
        """Refuse a scheme that the heads or the number of ranks do not allow, naming one that can."""
        cp, sequence, ulysses = self.parallel.cp, self.parallel.sequence, self.parallel.ulysses
        heads = self.model.n_heads // self.parallel.tp  # of one tensor-parallel rank
        if cp > 1 and "memory" in self.model.layer_kinds and self.model.memory.attach == "mac":
            raise ValueError(
                f"parallel.cp {cp}: model.memory.attach mac reads, for a segment's attention, the memory that the one before wrote: "
                f"ranks cannot share a sequence; set parallel.cp=1 parallel.dp_shard={cp}, or model.memory.attach=mag"
            )
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
        if self.parallel.tp > 1 or self.model.memory.around_stack or self.engine != "native":
            other = f"parallel.tp {self.parallel.tp}, model.memory.kind {self.model.memory.kind} and engine {self.engine}"
            raise ValueError(
                "parallel.kv_residence host has only been shown with parallel.tp 1, layers read once per sequence and engine native, "
                f"not with {other}: set it device"
            )
        if self.memory.recompute == "auto":
            raise ValueError(
                "parallel.kv_residence host: the planner of memory.recompute auto counts keys and values on the device; set "
                "memory.recompute none, mixer or block, or kv_residence device"
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
                (self.parallel.tp == 1, "parallel.tp=1"),
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
