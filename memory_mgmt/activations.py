"""Bytes of activations, from shapes: what each part of a layer keeps for backward, and what its backward makes on top.

The formulas follow the code of models/ tensor by tensor and are tested against what autograd really saves and what the CPU
allocator really hands out (tests/memory_mgmt/test_estimate.py). A change of what a module saves belongs here too.
Imports no torch.

Legend: n tokens of one rank times rows, e bytes of a computed value (bf16 2), w bytes of a wide value (fp32 4, fp64 8; the
statistics, recurrent states), r bytes of the residual stream (w, or bf16 2), d width of the residual stream, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memory_mgmt.exchange_buffers import Exchange
from memory_mgmt.op_scratch import flash_cpu_backward_scratch
from models.attention_plan import TileLimits
from models.config import FeedForwardKind, LayerKind, ModelConfig
from models.flops import ffn_parameters, memory_matmul_parameters
from models.memory.attached_shapes import AttachedShapes
from models.memory.context_shapes import ContextShapes
from models.memory.titans_shapes import TitansShapes
from parallel.config import KVDtype, SequenceScheme

ELEMENT = {"bf16": 2, "fp32": 4, "fp64": 8}
KNOWN_MEMORIES = ("gated_deltanet", "titans")
"""Kinds of ``model.memory.kind`` whose bytes are written here."""
WIDE = {"bf16": 4, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Shapes:
    """What the bytes of one rank's layers depend on. Build it once; the methods are the formulas."""

    config: ModelConfig
    rows: int
    tokens: int
    """Tokens per row held by this rank."""
    precision: str
    ffn_tile: int = 0
    memory_tile: int = 0
    cp: int = 1
    """Ranks that share a sequence."""
    ranges: int = 1
    """Ranges of the sequence that each of them holds (zigzag: 2)."""
    cuda: bool = False
    residual: str = "fp32"
    """Of the stream between blocks, as ``train.residual``; fp32 means wide."""
    scheme: SequenceScheme = "ring"
    degree: int = 1
    """Of a Ulysses group, for ring_x_ulysses."""
    head_chunk: int | None = None
    staged: bool = False
    """Projections are recomputed, and made stage by stage where heads have stages."""
    kv_dtype: KVDtype = "compute"
    """As ``parallel.kv_dtype``."""

    @property
    def split(self) -> bool:
        """The sequence is shared with other ranks: states and halos are exchanged."""
        return self.cp > 1

    @property
    def n(self) -> int:
        """Tokens of this rank, all rows."""
        return self.rows * self.tokens

    @property
    def e(self) -> int:
        """Bytes of a value computed under the run's precision."""
        return ELEMENT[self.precision]

    @property
    def sent(self) -> int:
        """Bytes of a value of keys and values on their way to other ranks."""
        return self.e if self.kv_dtype == "compute" else ELEMENT[self.kv_dtype]

    @property
    def w(self) -> int:
        """Bytes of a wide value."""
        return WIDE[self.precision]

    @property
    def r(self) -> int:
        """Bytes of a value of the residual stream."""
        return self.w if self.residual == "fp32" else ELEMENT[self.residual]

    @property
    def stream(self) -> int:
        """One copy of the residual stream."""
        return self.n * self.config.d_model * self.r

    @property
    def narrow(self) -> int:
        """One tensor of the residual width in the computing dtype."""
        return self.n * self.config.d_model * self.e

    @property
    def statistic(self) -> int:
        """One wide number per token."""
        return self.n * self.w

    def in_tiles(self, tile: int) -> bool:
        """Whether a tile of so many tokens really cuts each of this rank's ranges."""
        return 0 < tile < self.tokens // self.ranges

    # --- kept from forward to backward ------------------------------------------------------------------------------------

    def cast_weights(self, parameters: int) -> int:
        """A low-precision copy of so many weights, made for one product; none is kept (models/linear.py)."""
        return parameters * self.e if self.precision == "bf16" else 0

    def norm_kept(self) -> int:
        """The norm's input (the residual stream here) and one statistic per token."""
        return self.stream + self.statistic

    def attention_kept(self, kind: LayerKind) -> int:
        """Input; q and k after rope, v, out; log-sum-exp; keys and values of the window before each range of a split sequence; where q
        and k are normalised, those before it and a statistic per head. The rope table is shared by all layers (``rope_table``)."""
        c = self.config
        heads = c.n_heads + c.kv_heads if self._stage(kind) is None else c.n_heads / 2  # of stages out alone is ever whole
        values = c.d_model + int(2 * heads * c.attention_head_dim)
        halo = self._halo_keys(self.sent) if kind == "swa" else 0
        return self.n * (values * self.e + c.n_heads * self.w) + halo + self._qk_norm_kept(kind)

    def _qk_norm_kept(self, kind: LayerKind) -> int:
        c = self.config
        heads = c.n_heads + c.kv_heads
        return self.n * heads * (c.attention_head_dim * self.e + self.w) if c.qk_norm and not self.by_parts(kind) else 0

    def _halo_keys(self, itemsize: int) -> int:
        """Keys and values of the window before each range, when it is not longer than what a rank holds."""
        c = self.config
        if not self.split or c.window - 1 > self.tokens:
            return 0
        return self.rows * self.ranges * (c.window - 1) * 2 * c.kv_heads * c.attention_head_dim * itemsize

    def memory_kept(self) -> int:
        """The input, and inside: everything (``memory_inside``), or with tiles one state per tile."""
        c = self.config
        if c.memory.attach == "mac":
            tiled = 0 < self.memory_tile < self.tokens
            return ContextShapes.of(c).saved_bytes(self.rows, self.tokens, self.e, self.w, tiled, self.cp)
        halo = self.rows * self._halo * c.d_model * self.e
        if self.in_tiles(self.memory_tile):
            halo += self._beside(tiled=True)
        if self._titans is not None:
            if not self.in_tiles(self.memory_tile):
                return self.narrow + halo + self.memory_inside()
            between = self._titans.between_tiles(self.rows, self.tokens, self.w, self.memory_tile)
            return self.narrow + halo + between + c.memory_heads * self._titans.fast_weights * self.w
        exchanged = (self.cp * self.ranges + 1) * self.rows * c.memory_heads * c.memory_key_dim**2 * self.w if self.split else 0
        if not self.in_tiles(self.memory_tile):
            return self.narrow + halo + exchanged + self.memory_inside()
        n_tiles = -(-self.tokens // self.memory_tile)
        states = exchanged + n_tiles * self.rows * c.memory_heads * c.memory_key_dim * self._state_width * self.w
        joined = self.n * c.memory_heads * self._state_width * self.w if self.split else 0
        return self.narrow + halo + states + joined

    def memory_inside(self) -> int:
        """What one Gated DeltaNet keeps besides its input: projections (e); per head in chunks (w) q, k, v, the inverse, W, U, the
        state before each chunk, the output; seven statistics per head and token (two norms of q and k, beta, g, sigmoid, softplus
        in and out) and the norm of the output; a split sequence adds the read-out of the incoming state."""
        c = self.config
        if c.memory.attach == "mac":
            return ContextShapes.of(c).saved_bytes(self.rows, self.tokens, self.e, self.w, False, self.cp) - self.narrow
        if self._titans is not None:
            return self._titans.inside(self.rows, self.tokens, self.e, self.w) + self._beside()
        heads, key, value, chunk = c.memory_heads, c.memory_key_dim, c.memory_value_dim, c.memory.chunk_size
        projected = heads * (2 * key + 3 * value)
        joined = value + key if self.split else 0
        wide = 2 * key + value + chunk + key + self._state_width + value + 8 + joined
        states = (-(-self.tokens // chunk) + 1) * self.rows * heads * key * self._state_width * self.w
        halo = self.rows * self._halo * heads * (2 * key + value) * self.e
        return self.n * (projected * self.e + heads * wide * self.w) + states + halo + self._beside()

    def by_parts(self, kind: LayerKind) -> bool:
        """Whether memory_mgmt/execution.py runs a layer because of its tiles: then neither normed stream is kept."""
        return self.ffn_tile > 0 or (kind == "memory" and self.memory_tile > 0)

    def norms_kept(self, kind: LayerKind) -> int:
        """Inputs of the norms. By parts: the block's input; the stream after the mixer belongs to the feed-forward then."""
        return self.stream if self.by_parts(kind) else 2 * self.norm_kept()

    def mixer_kept(self, kind: LayerKind) -> int:
        """What the mixer of a layer keeps, its input (the normed stream) included unless it runs by parts; a memory keeps its output
        for a feed-forward that is recomputed."""
        if kind == "memory":
            return self.memory_kept() - (self.narrow if self.by_parts(kind) and not self.ffn_tile else 0)
        return self.attention_kept(kind) - (self.narrow if self.by_parts(kind) else 0)

    def ffn_kept(self, kind: LayerKind) -> int:
        """The normed stream; gate, up and their product. By parts the stream itself, gate and up, or with tiles nothing."""
        if self.ffn_tile:
            return 0
        if self.by_parts(kind):
            return self.stream + 2 * self.n * self.config.ff_width * self.e
        return self.narrow + 3 * self.n * self.config.ff_width * self.e

    @property
    def entries(self) -> int:
        """Rows of a value table that one memory layer reads for all tokens of this rank."""
        return self.n * self.config.product_keys.heads * self.config.product_keys.top_k

    def reader_kept(self, feed_forward: FeedForwardKind) -> int:
        """Of a feed-forward that reads a value table."""
        return self.product_keys_kept() if feed_forward == "product_keys" else self.hierarchical_kept()

    def hierarchical_kept(self) -> int:
        """Hierarchical memories (models/hierarchical.py): the stream, its norm's statistic and the normed stream; of the dense part gate,
        up and their product. What was fetched is fetched again."""
        return self.stream + self.statistic + self.narrow + 3 * self.n * self.config.ff_width * self.e

    def product_keys_kept(self) -> int:
        """A memory layer with product keys (models/product_keys.py): the stream, its norm's statistic and the normed stream; queries, keys
        in the computing dtype; index and weight of every row that is read; what was read, its gate and their product; of a dense one beside
        it gate, up and their product."""
        c = self.config
        heads, size = c.product_keys.heads, c.query_dim
        kept = self.stream + self.statistic + self.narrow + self.n * heads * size * self.e + self.entries * (4 + self.w)
        maps = c.product_keys.expansion if c.product_keys.expansion > 1 else 0
        kept += maps * (self.entries * (1 + self.w) + self.n * c.value_width * self.e)
        sets = c.product_keys.tucker_rank
        kept += 2 * sets * self.entries * self.w if sets > 1 else 0
        kept += sets * heads * c.product_keys.n_keys * size * (self.e if self.precision == "bf16" or c.product_keys.qk_norm else 0)
        if c.product_keys.qk_norm:
            kept += self.n * heads * (size * self.e + 2 * self.w)
        kept += 3 * self.n * c.ff_width * self.e if c.product_keys.attach == "beside" else 0
        return kept + (3 * self.n * c.value_width * self.e if c.product_keys.gate == "swish" else 0)

    def product_keys_backward(self) -> int:
        """The gradients of what was read, its gate and their product; then of the table two pieces of entries times columns, the last one
        and the next, of the weights and, by tiles of tokens, of the scores of one half."""
        c, keys = self.config, self.config.product_keys
        tile = min(self.n * keys.tucker_rank * keys.heads * keys.n_keys, 1 << 22)
        entries = 3 * self.entries * self.w + min(self.entries * c.value_width, 2 << 20) * self.w
        own = 3 * self.n * c.value_width * self.e + max(entries, self.n * keys.heads * c.query_dim * self.e + 4 * tile * self.w)
        dense = 3 * self.n * c.ff_width * self.e if keys.attach == "beside" else 0  # one goes backward after the other
        return max(own, dense) + (self.narrow if dense else 0)

    def product_keys_exchange(self, shards: int) -> int:
        """Of ranks that share the table by columns: entries of every rank's tokens, what this rank's columns give for them, and that of
        all columns for its own, of one tile of tokens (parallel/columns.py)."""
        if shards == 1:
            return 0
        tokens = min(self.n, 16_384)
        entries = tokens * self.entries // self.n
        columns = -(-self.config.value_width // shards)
        return shards * entries * (4 + 2 * self.w) + (shards + 1) * tokens * columns * self.w + tokens * self.config.value_width * self.e

    def table_gradient(self, readers: int, shards: int) -> int:
        """The most rows that ``readers`` layers can read of one table for the tokens of ``shards`` ranks, in this rank's columns."""
        rows = min(self.config.table_rows, readers * shards * self.entries)
        return rows * -(-self.config.value_width // shards) * self.w

    def block_kept(self, kind: LayerKind) -> int:
        """Everything one block keeps without recomputation, its input included."""
        return self.norms_kept(kind) + self.mixer_kept(kind) + self.ffn_kept(kind)

    def rope_table(self) -> int:
        """cos and sin of every token, once for all attention layers."""
        return self.n * self.config.attention_head_dim * self.w

    # --- made and freed in backward, on top of what is kept -----------------------------------------------------------------

    def norm_backward(self) -> int:
        """Normed input and two products, all wide, and the incoming gradient; of one tile where the feed-forward has tiles."""
        whole = 3 * self.n * self.config.d_model * self.w + self.narrow
        return whole * min(self.ffn_tile, self.tokens) // self.tokens if self.ffn_tile else whole

    def ffn_backward(self, kind: LayerKind) -> int:
        """Gradients of product, up and gate and one temporary, less the product, which is freed first. By parts: the gradients of the
        stream and of the mixer's output, float32 totals and one tile's share of the weight gradients, one tile's inside."""
        c = self.config
        if not self.by_parts(kind):
            return 3 * self.n * c.ff_width * self.e
        weights = ffn_parameters(c) * (self.w + self.w + (2 * self.e if self.precision == "bf16" else 0))
        tile = min(self.ffn_tile or self.tokens, self.tokens)
        return self.stream + self.narrow + weights + self.tile_inside(tile, memory=False)

    def attention_backward(self, kind: LayerKind) -> int:
        """Gradients of out, q, k and v, then the rotation of q beside them; a window that runs as stacked blocks instead needs wide
        accumulators and the gradients of one stack. Keys and values rounded without a scheme that passes them (it counts its own): one
        more of each."""
        c = self.config
        queries, keys = c.n_heads * c.attention_head_dim, c.kv_heads * c.attention_head_dim
        near = not self.split or (kind == "swa" and self._halo_keys(1) > 0)
        rounded = self.n * 2 * keys * self.e if near and self.sent < self.e else 0
        if kind == "swa" and c.window < self.tokens and not self.cuda:
            return rounded + self.n * (2 * queries * self.e + (queries + 2 * keys) * self.w) + self._window_stack(queries, keys)
        out = queries
        if (stage := self._stage(kind)) is not None:
            queries, keys = (heads * c.attention_head_dim for heads in stage)
        total = rounded + self.n * ((out + queries + 2 * keys) * self.e + queries * self.w // 2)
        if not self.cuda:
            tokens = self.tokens * (self._exchanged.tokens_together if self.split else 1)
            return total + flash_cpu_backward_scratch(tokens, tokens, self.e)
        # FlashAttention-2 backward: dq accumulates in fp32, dk and dv are made per query head and then summed.
        return total + self.n * queries * (4 + 2 * self.e)

    def _window_stack(self, queries: int, keys: int) -> int:
        """Gradients dk, dv and dq of one call's stack of blocks; with several rows the stacked inputs are copies as well."""
        limits, lookback = TileLimits(), self.config.window - 1
        block = limits.block or min(256, max(64, 1 << (lookback // 4).bit_length()))
        overlap = (block + lookback) / block
        stacked_keys = min(self.tokens * overlap, limits.keys_per_call) * self.rows
        copies = 1 if self.rows == 1 else 2
        return int(stacked_keys * copies * (2 * keys + queries / overlap) * self.e)

    def memory_backward(self) -> int:
        """The written-out backward of the delta rule: seven chunk x chunk matrices, four of key, three of state and one of value width
        and two of states per head, less what the gated norm freed before, one range of the sequence at a time; with tiles one
        tile's inside and backward, and the gradient of the whole input twice while the tiles' parts are added."""
        if self.in_tiles(self.memory_tile):
            inside = self.tile_inside(self.memory_tile, memory=True)
            return 2 * self.narrow + inside + memory_matmul_parameters(self.config) * self.w
        c = self.config
        if self._titans is not None:
            return self._titans.backward_inside(self.rows, self.tokens, self.e, self.w) + self.narrow
        heads, key, value, chunk = c.memory_heads, c.memory_key_dim, c.memory_value_dim, c.memory.chunk_size
        width = self._state_width
        per_token = heads * self.w * (7 * chunk + 4 * key + 3 * width + value + key * width / chunk)
        freed = heads * value * (self.w + 2 * self.e)
        return int(self.n * (per_token - freed) / self.ranges) + self.narrow

    def tile_inside(self, tile_tokens: int, memory: bool) -> int:
        """One tile of a memory layer or a feed-forward while its backward runs: what it keeps and what it makes."""
        if memory:
            tile = replace(self, tokens=tile_tokens, memory_tile=0, ranges=1)
            return tile.memory_inside() + tile.memory_backward()
        return self.rows * tile_tokens * (6 * self.config.ff_width + 3 * self.config.d_model) * self.e

    def mixer_backward(self, kind: LayerKind) -> int:
        """The most that the backward of a layer's mixer makes."""
        return self.memory_backward() if kind == "memory" else self.attention_backward(kind)

    # --- exchanged with other ranks -------------------------------------------------------------------------------------------

    def exchange(self, kind: LayerKind) -> int:
        """Buffers of one layer's exchange in backward, where it is largest (memory_mgmt/exchange_buffers.py). Window: the halo's wide
        gradients and their messages. Memory: every rank's state gradients."""
        if not self.split:
            return 0
        c = self.config
        if kind == "memory" and self._titans is not None:
            return 2 * self.n * self._titans.features * self.w
        if kind == "memory":
            return 2 * self.cp * (self.ranges + 1) * self.rows * c.memory_heads * c.memory_key_dim * c.memory_value_dim * self.w
        halo = self._halo_keys(self.w) if kind == "swa" else 0
        if halo:
            return 3 * halo
        values = self._exchanged.bytes_per_token()
        if kind == "swa" and self.scheme in ("ring", "double_ring"):  # several calls per hop add their gradients up before those arrive
            values += 2 * c.kv_heads * self.w
        return self.n * c.attention_head_dim * values

    @property
    def _exchanged(self) -> Exchange:
        c = self.config
        sizes = (self.cp, self.degree, c.n_heads, c.kv_heads, self.e, self.w)
        return Exchange(self.scheme, *sizes, self.head_chunk, self.staged, self.sent)

    def _stage(self, kind: LayerKind) -> tuple[int, int] | None:
        """(query, key/value) heads of all ranks in a stage that makes its own projections; None where they are made whole."""
        by_heads = self.split and self.staged and self.head_chunk is not None and self.scheme in ("ulysses", "ring_x_ulysses")
        if not by_heads or kind == "memory" or (kind == "swa" and self._halo_keys(1)):
            return None
        return self._exchanged.stage_heads

    def _beside(self, tiled: bool = False) -> int:
        """Attention beside a memory, with the keys of the window before each range of a split sequence."""
        if self.config.memory.attach not in ("mag", "mal", "after"):
            return 0
        halo = 0 if tiled else self._halo_keys(self.sent)
        return AttachedShapes.of(self.config).saved_bytes(self.rows, self.tokens, self.e, self.w, tiled) + halo

    @property
    def _titans(self) -> TitansShapes | None:
        """The formulas of a memory that is not a Gated DeltaNet."""
        return TitansShapes.of(self.config, self.cp) if self.config.memory.kind == "titans" else None

    @property
    def _halo(self) -> int:
        return self.config.memory.conv_kernel - 1

    @property
    def _state_width(self) -> int:
        """Columns of the carried state: with a split sequence the transition matrix rides along."""
        c = self.config
        return c.memory_value_dim + (c.memory_key_dim if self.split else 0)
