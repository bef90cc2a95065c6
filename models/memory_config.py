"""Settings of the memory layers (``model.memory``): one section per architecture. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.section import PositiveInt, Section
from models.stack_config import STACK_KINDS, ArmtConfig, HmtConfig, RmtConfig

MemoryKind = Literal[
    "gated_deltanet",
    "gsa",
    "mamba2",
    "titans",
    "rmt",
    "infini",
    "mom",
    "slots",
    "fam",
    "neurocache",
    "armt",
    "hmt",
]
"""Architectures of memory: one file each in models/memory/."""


class GatedSlotConfig(Section):
    """What only Gated Slot Attention reads (arXiv 2409.07146)."""

    n_slots: PositiveInt = 64
    """Slots per head."""
    gate_temperature: float = Field(default=8.0, gt=0)
    """Divides the logarithm of the forget gates: larger remembers longer."""
    chunk_size: Annotated[int, Field(ge=1, le=16)] = 16
    """Tokens per chunk of the parallel form; changes speed, not results. At most 16: decays within a chunk must fit float32."""


class Mamba2Config(Section):
    """What only Mamba-2 reads (arXiv 2405.21060)."""

    state_dim: PositiveInt = 64
    """Rows of each head's state: size of the vectors B and C."""
    expand: float = Field(default=2.0, gt=0)
    """Inner width as a multiple of d_model; heads share it equally."""
    n_groups: PositiveInt = 1
    """Groups of heads that share B and C."""


MOST_PAIRED = 1024
"""Largest chunk of Titans whose tokens are compared with each other."""


class TitansConfig(Section):
    """What only Titans reads (arXiv 2501.00663): a small network per head whose weights learn while it reads."""

    variant: Literal["titans", "yaad", "moneta", "lact"] = "titans"
    """How it learns. titans: squared error, momentum, forgetting; yaad: Huber's loss, no momentum; moneta: cubic loss, weights kept at unit
    4-norm, no momentum; lact: dot-product loss, momentum once per chunk, no forgetting but weights kept at their initial norms."""
    network: Literal["linear", "mlp", "swiglu"] | None = None
    """The memory: one matrix, two layers with GELU, or SwiGLU; null means swiglu for lact, else mlp."""
    expansion: float = Field(default=4.0, gt=0)
    """Hidden width of mlp and swiglu as a multiple of the key size."""
    residual_norm: bool = False
    """Wrap the network as x + LayerNorm(f(x)), as Miras does; key and value sizes must be equal."""
    chunk_size: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    """Tokens that read, and take gradients at, the same weights. Part of the model: another size is another model."""
    read: Literal["chunk_start", "token", "shifted"] = "chunk_start"
    """Which weights a token reads. chunk_start: those its chunk began with (apply, then update); token: those after its own write, for a
    linear memory of variant titans or yaad; shifted: as chunk_start, but a chunk's last token reads what the whole chunk has written.
    Part of the model: another read is another model."""
    max_lr: float | None = Field(default=None, gt=0)
    """Largest inner learning rate; null means 4 / chunk_size, at most 1. A chunk takes all its gradients at its first weights, so that
    equal keys are learnt stably only while its rates add up to less than 2. At 1 a linear memory corrects its error at a key in one
    write; a network's rate is divided by half its hidden width, which has about the same effect."""
    reset_every: int = Field(default=0, ge=0)
    """Tokens after which the memory starts again from its initial weights, counted from the document's start; a multiple of chunk_size
    (attach mac: of mac.segment). 0: never. Periods are independent and are worked on side by side."""

    @model_validator(mode="after")
    def _check(self) -> TitansConfig:
        if self.residual_norm and self.architecture == "linear":
            raise ValueError("residual_norm needs network mlp or swiglu")
        if self.read == "token":
            self._check_token()
        return self

    def _check_token(self) -> None:
        """Reading inside a chunk is a weighted sum over its tokens only where the read is linear in the weights that are written."""
        if self.architecture != "linear":
            raise ValueError(
                f"read token is exact for a linear memory only, and the network is {self.architecture}; set network linear, or read to "
                "chunk_start or shifted"
            )
        if self.variant not in ("titans", "yaad"):
            raise ValueError(
                f"read token needs variant titans or yaad: {self.variant} reads weights that are normed at chunk starts; set read to "
                "chunk_start or shifted"
            )
        if self.chunk_size > MOST_PAIRED:
            raise ValueError(
                f"read token compares all tokens of a chunk, at most {MOST_PAIRED}, and chunk_size is {self.chunk_size}; lower it"
            )

    @property
    def architecture(self) -> Literal["linear", "mlp", "swiglu"]:
        """The network after defaults."""
        return self.network or ("swiglu" if self.variant == "lact" else "mlp")

    @property
    def largest_rate(self) -> float:
        """``max_lr`` after defaults."""
        return self.max_lr or min(1.0, 4.0 / self.chunk_size)

    @property
    def has_momentum(self) -> bool:
        """Whether a momentum of the weights is carried."""
        return self.variant in ("titans", "lact")

    def hidden(self, key_dim: int) -> int:
        """Hidden width; 0 for a linear memory."""
        return 0 if self.architecture == "linear" else max(1, round(self.expansion * key_dim))


class InfiniConfig(Section):
    """What only Infini-attention reads (arXiv 2404.07143)."""

    segment: PositiveInt = 512
    """Tokens that attend to each other; the memory has the segments before. Part of the model: another size is another model."""
    delta: bool = False
    """Write what the memory did not yet have of a value (delta rule), not the whole value."""


class MixtureConfig(Section):
    """What only Mixture of Memories reads (arXiv 2502.13685)."""

    n_memories: PositiveInt = 4
    """Memories per head among which the router chooses."""
    top_k: PositiveInt = 2
    """Memories that a token writes and reads."""
    shared: bool = True
    """One more memory that every token writes and reads."""
    compute: Literal["routed", "dense"] = "routed"
    """routed: each memory works on the tokens that go to it; dense: every memory on every token, those that do not go to it with gates that
    leave it alone. The same result, to rounding."""

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        if self.top_k > self.n_memories:
            raise ValueError(f"memory.mom.top_k {self.top_k} is larger than memory.mom.n_memories {self.n_memories}; lower it")
        return self


class SlotsConfig(Section):
    """What only gated slots read (Memformer, arXiv 2010.06891; LM2, arXiv 2502.06049)."""

    variant: Literal["memformer", "lm2"] = "memformer"
    """How slots are rewritten and read; see ``models/memory/slots.py``."""
    n_slots: PositiveInt = 32
    """Slots of the layer, of d_model numbers each."""
    segment: PositiveInt = 128
    """Tokens after which the slots are rewritten. Part of the model: another size is another model."""


class FeedbackConfig(Section):
    """What only TransformerFAM reads (arXiv 2404.09173)."""

    n_feedback: PositiveInt = 16
    """Feedback vectors of the layer, of d_model numbers each."""
    block: PositiveInt = 128
    """Tokens after which feedback is written. Part of the model: another size is another model."""
    memory_blocks: Annotated[int, Field(ge=0)] = 1
    """Blocks before its own that a token attends to."""


class NeurocacheConfig(Section):
    """What only Neurocache reads (arXiv 2407.02486)."""

    compression: PositiveInt = 4
    """How many times smaller than d_model an entry of the cache is."""
    cache_size: PositiveInt = 16_384
    """Entries before a segment that its tokens choose from."""
    top_k: PositiveInt = 16
    """Nearest entries that a token reads."""
    neighborhood: PositiveInt = 2
    """Entries that are read for each of them: it and those after it."""
    segment: PositiveInt = 128
    """Tokens that choose from the same entries. Part of the model: another size is another model."""
    writer: Literal["trained", "frozen"] = "trained"
    """trained: the compression learns by what is read; frozen: it stays as it was drawn (LongMem, arXiv 2306.07174)."""


class ContextConfig(Section):
    """What only ``model.memory.attach: mac`` reads."""

    segment: PositiveInt = 128
    """Tokens that attend to each other and to what the memory had for them; the memory is written once per segment."""
    persistent: Annotated[int, Field(ge=0)] = 4
    """Learned tokens that every segment's attention sees first."""
    residual: bool = False
    """Write the memory with what came in plus what attention found; false: with what attention found alone, which at first is an average
    over the segment, a few percent of the input in size."""


_UNREAD: dict[str, tuple[str, ...]] = {
    "gsa": ("chunk_size",),
    "mamba2": ("head_dim", "expand_v"),
    "titans": ("chunk_size", "kernel"),
    "hmt": ("n_heads", "head_dim", "expand_v", "conv_kernel", "chunk_size", "attach", "kernel"),
    "armt": ("n_heads", "head_dim", "expand_v", "conv_kernel", "chunk_size", "attach", "kernel"),
    "rmt": ("n_heads", "head_dim", "expand_v", "conv_kernel", "chunk_size", "attach", "kernel"),
    "infini": ("chunk_size", "conv_kernel", "expand_v", "kernel"),
    "slots": ("chunk_size", "conv_kernel", "expand_v", "kernel"),
    "fam": ("chunk_size", "conv_kernel", "expand_v", "kernel"),
    "neurocache": ("chunk_size", "conv_kernel", "expand_v", "kernel"),
}
"""Shared settings that a kind does not read."""

SEQUENTIAL: tuple[MemoryKind, ...] = ("slots", "fam")
"""Kinds whose state goes from rank to rank: only neighbours may share a sequence."""

AFFINE: tuple[MemoryKind, ...] = ("gated_deltanet", "gsa", "infini", "mamba2", "mom")
"""Kinds whose state is an affine function of the state before."""

HEADWISE: tuple[MemoryKind, ...] = (*AFFINE, "titans")
"""Kinds whose heads do not meet between their projections and what is made of their outputs; Titans as context (mac) is none of them."""

ROTATED: tuple[MemoryKind, ...] = ("infini", "fam")
"""Kinds whose own attention rotates queries and keys."""


class MemoryModuleConfig(Section):
    """The memory architecture used by layers of kind ``memory``, or around the stack of layers (``models/stack_config.py``)."""

    kind: MemoryKind = "gated_deltanet"
    """Which architecture: one file each in models/memory/."""
    n_heads: PositiveInt | None = None
    """Heads of the memory; null means model.n_heads."""
    head_dim: PositiveInt | None = None
    """Key size per head; null means d_model / n_heads."""
    expand_v: float = Field(default=1.0, gt=0)
    """Value size per head as a multiple of the key size."""
    conv_kernel: Annotated[int, Field(ge=1, le=16)] = 4
    """Taps of the causal depthwise convolution on q, k and v; 1 switches it off."""
    chunk_size: Annotated[int, Field(ge=1, le=1024)] = 64
    """Tokens per chunk of the parallel form; changes speed, not results. Not read by titans, whose chunks are part of the model."""
    kernel: Literal["auto", "eager", "fla"] = "auto"
    """What computes the recurrence of gated_deltanet, mom, mamba2 and gsa. eager: torch operations, everywhere, in float32; fla: kernels of
    flash-linear-attention, on CUDA, products in the run's precision; auto: fla where it is installed and lawful, else eager
    (``--explain`` says which and why)."""
    gsa: GatedSlotConfig = GatedSlotConfig()
    """What only kind gsa reads."""
    mamba2: Mamba2Config = Mamba2Config()
    """What only kind mamba2 reads."""
    titans: TitansConfig = TitansConfig()
    """What only kind titans reads."""
    rmt: RmtConfig = RmtConfig()
    """What only kind rmt reads."""
    infini: InfiniConfig = InfiniConfig()
    """What only kind infini reads."""
    mom: MixtureConfig = MixtureConfig()
    """What only kind mom reads."""
    slots: SlotsConfig = SlotsConfig()
    """What only kind slots reads."""
    fam: FeedbackConfig = FeedbackConfig()
    """What only kind fam reads."""
    neurocache: NeurocacheConfig = NeurocacheConfig()
    """What only kind neurocache reads."""
    hmt: HmtConfig = HmtConfig()
    """What only kind hmt reads."""
    armt: ArmtConfig = ArmtConfig()
    """What only kind armt reads."""
    attach: Literal["mixer", "mag", "mal", "after", "mac"] = "mixer"
    """Where the memory sits in its layers. mixer: in place of attention; mag: beside sliding-window attention, whose output it gates; mal:
    before sliding-window attention; after: behind it; mac: read as context of the attention inside a segment, written with what that
    attention found."""
    mac: ContextConfig = ContextConfig()
    """What only attach mac reads."""

    @property
    def around_stack(self) -> bool:
        """Whether the layers run segment by segment with the memory around them."""
        return self.kind in STACK_KINDS

    @model_validator(mode="after")
    def _check_read(self) -> MemoryModuleConfig:
        """Refuse what is set and would change nothing: another kind's section, a shared setting that this kind does not read."""
        fields = type(self).model_fields
        set_here = [name for name, field in fields.items() if getattr(self, name) != field.default]
        for name in set_here:
            if isinstance(fields[name].default, Section):
                key, chosen = ("attach", self.attach) if name == "mac" else ("kind", self.kind)
                if name != chosen:
                    other = f"memory.{name} is read by memory.{key} {name}, not by {chosen}"
                    raise ValueError(f"{other}; leave it out or set memory.{key}={name}")
            elif name in _UNREAD.get(self.kind, ()):
                own = f" or set memory.{self.kind}.{name}" if hasattr(getattr(self, self.kind, None), name) else ""
                raise ValueError(f"memory.{name} is not read by memory.kind {self.kind}; leave it at {fields[name].default}{own}")
        self._check_mac()
        if self.kind == "titans" and self.titans.residual_norm and self.expand_v != 1.0:
            raise ValueError(f"memory.titans.residual_norm needs equal key and value sizes, and memory.expand_v is {self.expand_v:g}")
        return self

    def _check_mac(self) -> None:
        titans = self.titans
        if self.attach != "mac":
            if titans.reset_every % titans.chunk_size:
                raise ValueError(f"memory.titans.reset_every {titans.reset_every} is not a multiple of chunk_size {titans.chunk_size}")
            return
        if self.kind != "titans":
            raise ValueError(f"memory.attach mac reads and writes a memory by itself, and knows kind titans only, not {self.kind}")
        if titans.read != "chunk_start":
            raise ValueError(
                f"memory.titans.read {titans.read} is not known to memory.attach mac, whose segments read what was written before them; "
                "leave it at chunk_start"
            )
        if self.titans.chunk_size != TitansConfig().chunk_size:
            raise ValueError(
                "memory.titans.chunk_size is not read by memory.attach mac, whose chunks are its segments; set memory.mac.segment"
            )
        period = self.titans.reset_every
        if period % self.mac.segment:
            raise ValueError(f"memory.titans.reset_every {period} is not a multiple of memory.mac.segment {self.mac.segment}")
