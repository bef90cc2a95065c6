"""Sections of a run's settings that belong to no other room (``trainer/config.py``). Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from models.config import PositiveInt, Section
from trainer.evals.settings import OF_IDS, SyntheticSection

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunSection(Section):
    """Where a run lives."""

    root: str = "runs"
    """Directory that holds run directories."""
    name: str | None = None
    """Name of the run directory; null makes one from the config file's name and the time."""
    private: bool = True
    """Only you can look into the run directory (0700). false: others too, as your umask says."""

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
    allow_download: bool = False
    """data.source hub may ask the network for a data set by its name, and download it; false: local folders only."""
    text_field: str = "text"
    """Column or JSON key that holds the document."""
    prefix_key: str | None = None
    """Column or JSON key (jsonl, parquet, arrow, hub) that says how much of its document is a prefix, such as a prompt, which all of the
    document sees; 0 for none. null: no document has one."""
    prefix_unit: Literal["characters", "tokens"] = "characters"
    """What prefix_key counts. characters: the first tokens that end inside so many characters of the document; tokens: so many tokens."""
    prefix_mask: Literal["bidirectional", "causal"] = "bidirectional"
    """bidirectional: in attention every token of a document sees its prefix, the prefix's own earlier tokens included (within a window);
    memory layers stay causal. causal: a prefix is read like any text, and only left out of the loss."""
    prefix_loss: bool = False
    """Whether tokens of a prefix are predicted. Under prefix_mask bidirectional each of them is seen by the token that predicts it."""
    cluster_key: str | None = None
    """Column or JSON key (jsonl, parquet, arrow, hub) that holds the number of its document's cluster of the lowest level, for layers that
    fetch parameters by document (model.feedforward hierarchical), which need it. null: no document has one."""
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
        self._check_prefixes()
        self._check_clusters()
        return self

    def _check_clusters(self) -> None:
        """Refuse a key that would not be read."""
        if self.cluster_key is None:
            return
        if self.source not in ("jsonl", "parquet", "arrow", "hub"):
            raise ValueError(
                f"data.cluster_key is not read by source '{self.source}', whose documents have no keys: leave it out, or set data.source "
                "jsonl, parquet, arrow or hub"
            )
        if self.cluster_key in (self.text_field, self.prefix_key):
            other = "data.text_field" if self.cluster_key == self.text_field else "data.prefix_key"
            raise ValueError(f"data.cluster_key and {other} both name {self.cluster_key!r}: each needs a key of its own")

    def _check_prefixes(self) -> None:
        """Refuse what would not be read, or would mean nothing."""
        if self.prefix_key is None:
            for name in ("prefix_unit", "prefix_mask", "prefix_loss"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"data.{name} is not read without data.prefix_key; leave it out, or name the key")
            return
        if self.source not in ("jsonl", "parquet", "arrow", "hub"):
            raise ValueError(
                f"data.prefix_key is not read by source '{self.source}', whose documents have no keys: leave it out, or set data.source "
                "jsonl, parquet, arrow or hub"
            )
        if self.prefix_key == self.text_field:
            raise ValueError(f"data.prefix_key and data.text_field both name {self.text_field!r}: one is a number and the other the text")
        if self.prefix_mask == "causal" and self.prefix_loss:
            raise ValueError("data.prefix_mask causal with data.prefix_loss true makes nothing of prefixes: leave data.prefix_key out")
        if self.bidirectional_prefixes and not self.document_mask:
            raise ValueError(
                "data.prefix_mask bidirectional shows a prefix to its own document, and data.document_mask false has no bounds between "
                "documents: set data.document_mask=true, or data.prefix_mask=causal"
            )

    @property
    def bidirectional_prefixes(self) -> bool:
        """Whether documents have prefixes that all of their tokens see."""
        return self.prefix_key is not None and self.prefix_mask == "bidirectional"

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
    compile: Literal["none", "block", "auto"] = "none"
    """block: torch.compile makes kernels of what a block of attention and a dense feed-forward computes before and after attention; the
    same results to rounding, not bit for bit. Refused where no block can be; memory layers stay as they are. auto: where it can be."""
    carry_state: Literal["none", "document"] = "none"
    """document: a memory goes on from the state in which the sequence before left it where a document runs through several sequences
    (gradients do not); every row of a step reads on where it stood in the step before. Needs data.shuffle documents or none."""
    bptt_segments: PositiveInt | None = None
    """Where a sequence is read in segments (segment_tokens, or a memory around the stack: model.memory.kind rmt, armt, hmt): gradients end
    at every so many-th border of segments, counted from the sequence's start. null: they go through all segments of the sequence."""
    segment_tokens: PositiveInt | None = None
    """Layers of kind swa and memory read a sequence in segments of so many tokens, each through all layers before the next one: a step's
    activations are those of one segment, whatever data.seq_len, for one more forward pass. null: the whole sequence at once."""
    diagonal_segments: PositiveInt = 1
    """With model.memory.kind armt, on one rank: layers work on so many segments at once, layer l on segment i - l, in one batched call per
    diagonal. The same results from fewer and larger calls; a copy of the layers' weights, and the activations of so many segments."""
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
