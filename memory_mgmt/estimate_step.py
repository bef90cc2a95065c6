"""One training step by arithmetic: what is live at each of its moments (``estimate.py`` makes a plan of it). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from memory_mgmt.activations import WIDE, Shapes
from memory_mgmt.config import MemoryConfig
from memory_mgmt.devices import MIB, Device
from memory_mgmt.estimate_terms import Live, add, summed
from memory_mgmt.optimizer_buckets import BUCKET_BYTES, bucket_width
from memory_mgmt.overheads import CPU_LIBRARIES, CPU_PROCESS, CPU_RANK, CUBLAS_WORKSPACE, NCCL_BUFFERS
from models.config import ModelConfig
from models.flops import block_parameters, parameter_count
from optim.config import OptimConfig
from parallel.config import ParallelConfig, SequenceScheme

# Measured on Linux x86-64, torch 2.13, glibc 2.36, with memory_mgmt/host_allocator.py in effect.
HEAP_BLOCK = 2 * MIB
HEAP_COPIES = 4
"""Tensors of tiles below this size live in the heap; its holes keep about four times one tile's inside."""
HOLES_SHARE = 0.45
HOLES_SHARE_TILES = 1.0
"""Freed blocks that the C library keeps where it is not told to give them back, as a share of all that comes and goes in a step."""
MOMENTS = 2
"""Of AdamW."""
TOGETHER_ELEMENTS = 1 << 24
"""Of a rank's matrices that are updated at a time (``optim/driver.py``)."""
UPDATE_COPIES = 3
"""Of those, while they are: the update, a product on its way to it, decoded states."""


@dataclass(frozen=True)
class Step:
    """One step's settings, and what is live at each of its moments."""

    model: ModelConfig
    parallel: ParallelConfig
    memory: MemoryConfig
    optim: OptimConfig
    seq_len: int
    rows: int
    grad_accum: int
    precision: str
    vocab_size: int
    zigzag: bool
    device: Device
    optimizer_bytes: int | None = None
    """Of all shards' optimizer states, where they are not AdamW's."""
    residual: str = "fp32"

    @property
    def shapes(self) -> Shapes:
        return Shapes(
            config=self.model,
            rows=self.rows,
            tokens=self.seq_len // self.parallel.cp,
            precision=self.precision,
            ffn_tile=self.memory.ffn_tile_tokens,
            memory_tile=self.memory.memory_tile_tokens,
            cp=self.parallel.cp,
            ranges=2 if self.zigzag and self.parallel.cp > 1 else 1,
            cuda=self.device.is_cuda,
            residual=self.residual,
            scheme=cast(SequenceScheme, self.parallel.sequence),
            degree=self.parallel.ulysses or 1,
            head_chunk=self.parallel.head_chunk,
            staged=self.recompute,
            kv_dtype=self.parallel.kv_dtype,
        )

    @property
    def wide(self) -> int:
        return WIDE[self.precision]

    @property
    def ranks(self) -> int:
        return self.parallel.dp_replicate * self.parallel.dp_shard * self.parallel.cp

    @property
    def shards(self) -> int:
        return self.parallel.dp_shard * self.parallel.cp

    @property
    def recompute(self) -> bool:
        return self.memory.recompute == "block"

    @property
    def offloaded(self) -> bool:
        """Whether the moments wait in host memory."""
        return self.memory.offload_optimizer == "host"

    # --- parameters, gradients, optimizer ------------------------------------------------------------------------------------

    def shard(self, parameters: int) -> int:
        """Bytes of this rank's part."""
        return -(-parameters // self.shards) * self.wide

    @property
    def root_parameters(self) -> int:
        """Final norm, and an embedding that is the head as well: whole through the step. Others come and go."""
        embedding = parameter_count(self.model, self.vocab_size).embedding if self.model.tie_embeddings else 0
        return embedding + self.model.d_model

    def resident(self) -> Live:
        """Held from the first moment of the run to the last."""
        total = parameter_count(self.model, self.vocab_size).total
        positions = self.rows * self.seq_len * 4 * 3
        live = {
            "parameters": self.shard(total),
            **self._states(total),
            # Whole sequences of every micro-batch and of the step being prefetched, and this rank's part on the device.
            "batch": positions * self.grad_accum * (1 if self.device.is_cuda else 3) + positions // self.parallel.cp,
        }
        if self.device.is_cuda:
            live |= {"cuBLAS workspace": CUBLAS_WORKSPACE, "CUDA context": self.device.context_bytes}
            live |= {"NCCL buffers": NCCL_BUFFERS} if self.ranks > 1 else {}
        else:
            live |= {"libraries": CPU_LIBRARIES + (CPU_RANK if self.ranks > 1 else 0), "process": CPU_PROCESS}
            live |= {"heap": self.heap()} if self.heap() else {}
        return live

    def _states(self, total: int) -> Live:
        if self.optimizer_bytes is not None:
            return {"optimizer states": self.optimizer_bytes // self.shards}
        return {"AdamW moments": 0 if self.offloaded else MOMENTS * self.shard(total)}

    def heap(self) -> int:
        """Holes that small tiles leave in a CPU process."""
        s, c = self.shapes, self.model
        tiles = [tile for tile in (s.ffn_tile, s.memory_tile if "memory" in c.layer_kinds else 0) if s.in_tiles(tile)]
        small = [tile for tile in tiles if self.rows * tile * c.d_model * s.e < HEAP_BLOCK]
        return HEAP_COPIES * max((s.tile_inside(tile, tile == s.memory_tile and "memory" in c.layer_kinds) for tile in small), default=0)

    def heap_holes(self, coming_and_going: int) -> int:
        """Holes of an ordinary heap under a step whose tensors take ``coming_and_going`` at most. Blocks above 32 MiB leave none."""
        s = self.shapes
        tiles = s.in_tiles(s.ffn_tile) or s.in_tiles(s.memory_tile)
        share = HOLES_SHARE_TILES if tiles else HOLES_SHARE
        return 0 if s.stream >= 32 * MIB and not tiles else int(share * coming_and_going) - self.heap()

    def gathered(self, block: int | None, backward: bool) -> Live:
        """What FSDP2 holds whole; nothing without it (a single process)."""
        if self.ranks == 1:
            return {}
        live = {"parameters gathered (embedding, head)": self.root_parameters * self.wide}
        if block is not None:
            whole = self.block_parameters(block) * self.shapes.e
            live["parameters gathered (one block)"] = whole * (3 if backward and block > 0 else 2)
        return live

    def gradients(self, done_from: int, block: int | None = None) -> Live:
        """Gradients that exist when blocks from ``done_from`` up are done and ``block`` is being worked on."""
        kinds = self.model.layer_kinds
        done = sum(self.block_parameters(i) for i in range(done_from, len(kinds)))
        head = self.vocab_size * self.model.d_model  # tied or not: the loss made it
        own = self.block_parameters(block) if block is not None else 0
        if self.grad_accum > 1:
            count = parameter_count(self.model, self.vocab_size)
            done = count.total - count.tables - (0 if self.shards > 1 else own)
        tables = self.table_gradients(0 if self.grad_accum > 1 else done_from if block is None else block)
        if self.ranks == 1:
            return summed({"gradients": (done + (head if self.grad_accum == 1 else 0) + own) * self.wide}, tables)
        if not self.model.tie_embeddings and done_from < len(kinds):  # reduced before the blocks began; of the last one it is in use
            head = 0
        return summed({"gradients": self.shard(done), "gradients before reduction": (head + 2 * own) * self.wide}, tables)

    def all_gradients(self) -> Live:
        count = parameter_count(self.model, self.vocab_size)
        return summed({"gradients": self.shard(count.total - count.tables)}, self.table_gradients(0))

    def block_parameters(self, block: int) -> int:
        """Of one block, without a table that it reads."""
        return block_parameters(self.model, self.model.layer_kinds[block], self.model.feedforward_kinds[block])

    def reads(self, block: int) -> bool:
        """Whether a block's feed-forward reads a value table."""
        return self.model.feedforward_kinds[block] == "product_keys"

    def table_gradients(self, first: int) -> Live:
        """Of value tables, when blocks from ``first`` up have gone backward: rows that were read, at most."""
        readers = self.model.feedforward_kinds[first:].count("product_keys")
        if not readers:
            return {}
        each, tables = (readers, 1) if self.model.product_keys.shared_table else (1, readers)
        passes = min(self.grad_accum, 2) if self.grad_accum > 1 else 1
        return {"gradients of value tables": tables * self.shapes.table_gradient(each * passes, self.shards)}

    # --- activations -----------------------------------------------------------------------------------------------------------

    def kept(self, n_blocks: int) -> Live:
        """Kept by the first ``n_blocks`` blocks once they ran forward."""
        s = self.shapes
        live = {"rotary table": self.shapes.rope_table()} if any(kind != "memory" for kind in self.model.layer_kinds) else {}
        for i in range(n_blocks):
            held = s.stream * (2 if self.reads(i) else 1)  # the stream before a memory layer is kept too
            live = add(live, {"block inputs": held} if self.recompute else self.inside(i))
        return live

    def inside(self, block: int) -> Live:
        """Kept by one block without recomputation."""
        s, kind = self.shapes, self.model.layer_kinds[block]
        owner = "memory layers" if kind == "memory" else "attention"
        if self.reads(block):
            return {"block inputs": s.stream, owner: s.statistic + s.mixer_kept(kind), "feed-forward": s.product_keys_kept()}
        return {"block inputs": s.norms_kept(kind), owner: s.mixer_kept(kind), "feed-forward": s.ffn_kept(kind)}

    def loss_inputs(self) -> Live:
        s = self.shapes
        return {"loss inputs": s.stream + 3 * s.statistic}

    def logits(self) -> int:
        """Copies of one tile: the logits, which become their gradient, and their exponentials or a narrow copy for the products."""
        tile = min(self.memory.loss_tile_tokens, self.shapes.n) * self.vocab_size
        return tile * 2 * self.wide

    def head_cast(self) -> int:
        return self.shapes.cast_weights(self.vocab_size * self.model.d_model)

    # --- moments ---------------------------------------------------------------------------------------------------------------

    def moments(self) -> list[tuple[str, Live]]:
        """Every moment of a step that can be the largest, with what is live beside ``resident``."""
        n_blocks = len(self.model.layer_kinds)
        accumulated = self.all_gradients() if self.grad_accum > 1 else {}
        found = [("build", self.build())]
        found += [(f"forward of block {i}", summed(self.forward(i), accumulated)) for i in range(n_blocks)]
        found.append(("loss forward", summed(self.loss_forward(), accumulated)))
        found.append(("loss backward", summed(self.loss_backward(), accumulated)))
        for block in reversed(range(n_blocks)):
            found += [(f"backward of block {block}, {part}", live) for part, live in self.backward(block)]
        found.append(("backward of the embedding", self.embedding_backward()))
        return [*found, ("update", self.update())]

    def build(self) -> Live:
        """AdamW's states are made in a step with zero gradients; in host memory, and of other presets, they begin as zeros."""
        return {} if self.offloaded or self.optimizer_bytes is not None else self.update()

    def forward(self, block: int) -> Live:
        s = self.shapes
        inside = sum(self.inside(block).values()) if self.recompute else s.stream
        return summed(self.kept(block + (not self.recompute)), self.gathered(block, False), {"inside a forward pass": inside + s.stream})

    def loss_forward(self) -> Live:
        """The gradients are made here, from the same logits."""
        return summed(self.loss_backward(), {"logits of one tile": self.logits() + self.head_cast()})

    def loss_backward(self) -> Live:
        s = self.shapes
        live = summed(self.kept(len(self.model.layer_kinds)), self.gathered(None, True), self.loss_inputs())
        if self.ranks > 1 and not self.model.tie_embeddings:
            live = summed(live, {"parameters gathered (embedding, head)": 2 * self.vocab_size * self.model.d_model * self.shapes.e})
        return summed(live, {"loss gradients": s.stream + self.vocab_size * self.model.d_model * self.wide})

    def backward(self, block: int) -> list[tuple[str, Live]]:
        """The four parts of one block's backward: while one runs, what later parts need is still held."""
        s, kind = self.shapes, self.model.layer_kinds[block]
        around = summed(self.kept(block), self.gathered(block, True), self.gradients(block + 1, block))
        around = summed(around, {"gradient of the residual stream": s.stream})
        if self.recompute:
            around = summed(around, {"block inputs": s.stream})
        ffn, mixer, norms = s.ffn_kept(kind), s.mixer_kept(kind), s.norms_kept(kind)
        ffn_made, ffn_sent = s.ffn_backward(kind), 0
        if self.reads(block):
            ffn, norms = s.product_keys_kept(), s.stream + s.statistic
            ffn_made, ffn_sent = s.product_keys_backward(), s.product_keys_exchange(self.shards)
        first = s.stream if s.by_parts(kind) else s.norm_kept()
        parts = {
            "feed-forward": (norms + mixer + ffn, ffn_made, ffn_sent),
            "second norm": (norms + mixer, s.norm_backward(), 0),
            "memory" if kind == "memory" else "attention": (first + mixer, s.mixer_backward(kind), s.exchange(kind)),
            "first norm": (first, s.norm_backward(), 0),
        }
        return [(name, summed(around, self._inside_now(block, held), _working(made, sent))) for name, (held, made, sent) in parts.items()]

    def _inside_now(self, block: int, held: int) -> Live:
        """What is left of a block's inside: under recomputation one term, else the same names as when it was kept."""
        if self.recompute:
            return {"one block recomputed": held - self.shapes.stream}
        left: Live = {}
        for name, size in self.inside(block).items():
            left[name] = min(size, held)
            held -= left[name]
        return left

    def embedding_backward(self) -> Live:
        gradient = self.vocab_size * self.model.d_model * self.wide
        live = summed(self.gradients(0), {"gradient of the residual stream": self.shapes.stream}, self.gathered(None, True))
        if self.ranks == 1:
            return summed(live, {"gradients": gradient})
        return summed(live, {"gradients before reduction": 2 * gradient})

    @property
    def largest_parameter(self) -> int:
        c = self.model
        widest = max(c.ff_width, c.n_heads * c.attention_head_dim, c.memory_heads * c.memory_value_dim)
        return c.d_model * max(self.vocab_size, widest)

    def update(self) -> Live:
        """AdamW: parameter by parameter on CPU (two temporaries), in place on CUDA. Of offloaded moments two buckets are there, and what is
        made is made of one."""
        if self.optimizer_bytes is not None:
            together = min(self.shard(parameter_count(self.model, self.vocab_size).total), TOGETHER_ELEMENTS * self.wide)
            return summed(self.all_gradients(), {"updates of matrices": UPDATE_COPIES * together})
        at_once = self.bucket_parameters() if self.offloaded else parameter_count(self.model, self.vocab_size).total
        largest = min(at_once, self.largest_parameter)
        temporaries = 0 if self.device.is_cuda else 2 * self.shard(largest)
        buckets = {"buckets of moments": 2 * MOMENTS * self.shard(at_once)} if self.offloaded else {}
        return summed(self.all_gradients(), {"optimizer step": temporaries}, buckets)

    def bucket_parameters(self) -> int:
        """Parameters, over all shards, whose moments are in the largest bucket."""
        kinds = {self.block_parameters(i) for i in range(len(self.model.layer_kinds))}
        count = parameter_count(self.model, self.vocab_size)
        most = BUCKET_BYTES // (MOMENTS * self.wide)
        return self.shards * max(bucket_width(-(-section // self.shards), most) for section in {*kinds, count.embedding, count.head})

    def host_bytes(self) -> int:
        """Host memory of this rank: offloaded moments. What activations take there is not estimated."""
        return MOMENTS * self.shard(parameter_count(self.model, self.vocab_size).total) if self.offloaded else 0


def _working(made: int, exchanged: int) -> Live:
    return {"inside a backward pass": made} | ({"exchange between ranks": exchanged} if exchanged else {})
