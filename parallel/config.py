"""Settings of parallelism: how many ranks along which mesh axis. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.config import PositiveInt, Section

AUTO = 0
"""A degree that ``trainer/settling.py`` is to choose; written ``auto``."""


def _read_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError("neither a whole number nor auto")
    return AUTO if value == "auto" else value


Degree = Annotated[int, Field(ge=0), BeforeValidator(_read_auto)]

SequenceScheme = Literal["ring", "double_ring", "ulysses", "ring_x_ulysses", "allgather_kv"]
"""How attention reaches the tokens of other ranks; ``docs/sequence_parallelism.md``."""


MemoryExchange = Literal["states", "ring", "ulysses"]
"""How memory layers reach what other ranks' tokens left; ``docs/memory_models.md``."""

INNER_DEGREES = {"ring_x_ulysses": "ulysses", "double_ring": "ring_inner"}
"""The setting that says how many neighbouring ranks such a scheme puts together."""

KVDtype = Literal["compute", "fp32", "bf16"]
"""In which dtype keys and values travel."""
KVGradientDtype = Literal["fp32", "compute", "bf16"]
"""In which dtype gradients of keys and values travel."""


class ParallelConfig(Section):
    """Degrees of the mesh axes; their product is the number of ranks."""

    ranks: PositiveInt | None = None
    """Number of ranks where a degree is auto; null: what the launcher or --nproc says. With all degrees given: must be their product."""
    dp_replicate: Degree = 1
    """Data-parallel replicas that each hold a whole copy of the (sharded) parameters; auto: chosen by the memory plan."""
    dp_shard: Degree = 1
    """Data-parallel ranks over which parameters, gradients and optimizer states are sharded; auto: chosen by the memory plan. Where a
    data-parallel degree is auto, train.grad_accum counts a step's passes as if that degree were 1; chosen ranks share them."""
    cp: Degree = 1
    """Sequence-parallel (context-parallel) ranks that share one sequence; parameters are sharded over dp_shard x cp. auto: chosen by
    the memory plan."""
    tp: Degree = 1
    """Tensor-parallel ranks: each has some heads of every attention, some columns of every feed-forward, some rows of embedding and head,
    and of the tokens of its sequence-parallel rank, in the residual stream and norms, an equal part. Keep it within a node; auto, chosen by
    the memory plan, does."""
    layout: Literal["auto", "contiguous", "zigzag", "per_document"] = "auto"
    """Which tokens a sequence-parallel rank holds. per_document: every packed document dealt head to tail by itself, for the ring. auto:
    zigzag when the model has full attention and the scheme needs it for equal work (all but ulysses), else contiguous."""
    sequence: Literal["auto", "ring", "double_ring", "ulysses", "ring_x_ulysses", "allgather_kv"] = "ring"
    """How attention reaches the tokens of other ranks. ring: keys travel; double_ring: inside rings of neighbours, and beside
    that across them; ulysses: all-to-all, every rank has all tokens of some heads;
    ring_x_ulysses: ulysses inside groups of neighbours, a ring across them; allgather_kv: all keys of a few heads at a time. auto: by
    exposed communication and buffers, from the mesh, heads, tokens per rank and link bandwidths."""
    ulysses: PositiveInt | None = None
    """Ranks of a Ulysses group for ring_x_ulysses: a divisor of cp above 1 and below cp, at most the query heads; null: chosen likewise."""
    ring_inner: PositiveInt | None = None
    """Ranks of the inner ring for double_ring, those of a node: a divisor of cp above 1 and below cp; null: chosen likewise."""
    head_chunk: PositiveInt | None = None
    """Heads exchanged and attended at a time: ulysses and ring_x_ulysses: query heads of one rank (null: all of them); allgather_kv:
    key/value heads (null: 1). Fewer need smaller buffers and more messages."""
    memory_exchange: Literal["auto", "states", "ring", "ulysses"] = "states"
    """How memory layers share a sequence. states: each family as its state allows (affine ones gather summaries, sums over tokens are
    reduced, others go from rank to rank); ring: affine states go from rank to rank in columns; ulysses: all-to-all, every rank has all
    tokens of some memory heads. auto: by exposed communication and buffers."""
    kv_dtype: KVDtype = "compute"
    """In which keys and values travel between ranks. compute: as they are computed; fp32 or bf16, narrower than train.precision: rounded to
    it once, where they are made, on one rank too, and computed with as they arrive: the same results at any cp, in fewer bytes."""
    kv_gradient_dtype: KVGradientDtype = "fp32"
    """In which gradients of keys and values travel between ranks. fp32: added up in float32 and rounded once; compute: in the dtype of the
    products, half the bytes with bf16, and bf16 whatever that is: rounded at every rank they pass."""
    kv_residence: Literal["device", "host"] = "device"
    """Where keys and values of full attention live, on one rank as in the ring. host: in host memory, from where they come to the device
    chunk by chunk, forward and backward; a window that a shard holds keeps its keys on the device. The ring only."""
    kv_chunk: PositiveInt | None = None
    """With kv_residence host: tokens of one rank whose keys and values are on the device at a time, while as many more are on their way;
    null: 65536."""
    timeout_seconds: PositiveInt = 600
    """A collective that waits longer than this fails instead of hanging."""

    @property
    def chosen_by_plan(self) -> tuple[str, ...]:
        """Names of the degrees that are ``auto``."""
        return tuple(name for name in ("dp_replicate", "dp_shard", "cp", "tp") if getattr(self, name) == AUTO)

    @property
    def ranks_asked(self) -> int:
        """The product of all degrees, none of which is ``auto``."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def product(self) -> str:
        """``dp_replicate 1 x dp_shard 2 x cp 4``, and tp where it is not 1."""
        text = f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x cp {self.cp}"
        return text if self.tp == 1 else f"{text} x tp {self.tp}"

    @property
    def inner_degree(self) -> int | None:
        """How many neighbours the scheme puts together, where it has such a degree and it is given."""
        return getattr(self, INNER_DEGREES[self.sequence]) if self.sequence in INNER_DEGREES else None

    @property
    def scheme_is_auto(self) -> bool:
        """Whether the scheme, or its degree among neighbours, is still to be chosen."""
        return self.sequence == "auto" or (self.sequence in INNER_DEGREES and self.inner_degree is None)

    @model_validator(mode="after")
    def _check_scheme(self) -> ParallelConfig:
        if self.ulysses is not None and self.sequence != "ring_x_ulysses":
            raise ValueError(
                f"parallel.ulysses {self.ulysses} is the degree inside ring_x_ulysses, and parallel.sequence is {self.sequence}; "
                "set parallel.sequence=ring_x_ulysses or leave parallel.ulysses null"
            )
        if self.ring_inner is not None and self.sequence != "double_ring":
            raise ValueError(
                f"parallel.ring_inner {self.ring_inner} is the inner ring of double_ring, and parallel.sequence is {self.sequence}; "
                "set parallel.sequence=double_ring or leave parallel.ring_inner null"
            )
        if self.head_chunk is not None and self.sequence in ("auto", "ring", "double_ring"):
            raise ValueError(
                f"parallel.head_chunk {self.head_chunk}: parallel.sequence {self.sequence} passes all heads at once; set parallel.sequence "
                "to ulysses, ring_x_ulysses or allgather_kv, or leave parallel.head_chunk null"
            )
        if self.kv_chunk is not None and self.kv_residence != "host":
            raise ValueError(
                f"parallel.kv_chunk {self.kv_chunk} is a chunk of what parallel.kv_residence host keeps in host memory; set that, or leave "
                "parallel.kv_chunk null"
            )
        if self.kv_residence == "host" and self.sequence != "ring":
            raise ValueError(
                f"parallel.kv_residence host brings keys to the device chunk by chunk and passes these around a single ring, not as "
                f"parallel.sequence {self.sequence} does: set parallel.sequence=ring, or parallel.kv_residence=device"
            )
        return self
