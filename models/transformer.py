"""The decoder: embedding, blocks of (norm, mixer, norm, feed-forward) with a residual stream, norm, tiled loss.

What parallel/ and memory_mgmt/ replace from outside: a mixer's own seams, `Block.run`, `Transformer.run_blocks` and
`Transformer.loss_tile_tokens`. Nothing here knows of other ranks.

The residual stream is float32 under bf16 autocast, whatever the weights are kept in, unless ``residual_dtype`` says otherwise: the sum
over layers is the one place where bf16 loses small updates for good (8 bits of mantissa against a stream that grows with depth), it is
what Hugging Face models do under autocast (losses can be compared digit for digit), and everything inside a block is bf16 anyway.

Legend: B row, T token held here, C channel, V vocabulary.
Try alone: ``pytest tests/models/test_transformer.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.attention import Attention
from models.batch import IGNORE_INDEX, Batch, Bounds
from models.config import LayerKind, ModelConfig
from models.embedding import Embedding
from models.feedforward import RMSNorm, SwiGLU
from models.hierarchical import BlockTable, HierarchicalMemory
from models.layer_segments import LayerSegments
from models.loss import Sweep, chunked_cross_entropy
from models.memory.attached import MemoryAfterAttention, MemoryAsGate, MemoryAsLayer
from models.memory.attached_shapes import AttachedShapes
from models.memory.context import MemoryAsContext
from models.memory.protocol import MemoryModule, State, build_memory
from models.memory.stack import Backbone, StackMemory
from models.parts import Part
from models.product_keys import ProductKeyMemory
from models.segments import Segment, Step, put_together
from models.value_table import TableReader, ValueTable
from models.window_keys import WindowKeys

__all__ = ["Block", "LossHead", "RMSNorm", "SwiGLU", "Transformer", "init_weights"]

_INTO_RESIDUAL = ("wo", "w_out", "w_down")
"""Projections back into the residual stream; their initial scale is divided by sqrt(2 n_layers)."""


def call(body: Callable[..., Any], *args: Any) -> Any:
    """The default of the seam ``Block.run``: just call it."""
    return body(*args)


def run_in_order(blocks: Iterable[Block], x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
    """The default of the seam ``Transformer.run_blocks``: one block after the other."""
    for block in blocks:
        x_BTC = block(x_BTC, positions_BT, bounds)
    return x_BTC


class Block(nn.Module):
    """One layer. ``run(body, *args)`` decides how the inside is executed (kept, swapped, recomputed, in tiles); it stays inside
    ``forward`` so that FSDP's hooks are outside of any recomputation."""

    def __init__(self, config: ModelConfig, kind: LayerKind, reader: TableReader | None = None) -> None:
        """``reader``: what reads a table, in place of a dense feed-forward or with one inside."""
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = _build_mixer(config, kind)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.ff_width) if reader is None else reader
        self.run: Callable[..., Tensor] = call
        self.for_state = False
        """Nothing is wanted of this layer but what its mixer hands on (`models.layer_segments`): the stream stays as it is."""

    def forward(self, x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        """The residual stream after this layer."""
        mixer = self.mixer
        if self.for_state and isinstance(mixer, Attention) and isinstance(mixer.inner_attention, WindowKeys):
            last = max(0, x_BTC.shape[1] - mixer.inner_attention.window + 1)
            mixer.inner_attention.hand_on(*mixer.keys(self.norm1(x_BTC[:, last:]), positions_BT[:, last:]))
            return x_BTC
        return self.run(self._body, x_BTC, positions_BT, bounds)

    def _body(self, x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        mixed_BTC = self._mix(self.norm1(x_BTC), positions_BT, bounds)
        return x_BTC if self.for_state else self.feed_forward(x_BTC + mixed_BTC, bounds)

    def feed_forward(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """The stream after the feed-forward, from the one after the mixer."""
        h_BTC = self.norm2(x_BTC)
        return x_BTC + (self.ffn(h_BTC) if isinstance(self.ffn, SwiGLU) else self.ffn(h_BTC, bounds))

    def _mix(self, x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        if isinstance(self.mixer, MemoryModule):
            return self.mixer.remember(x_BTC, bounds)
        return self.mixer(x_BTC, positions_BT, bounds)


def _build_mixer(config: ModelConfig, kind: LayerKind) -> nn.Module:
    if kind != "memory":
        return _build_attention(config, config.window if kind == "swa" else None)
    if config.memory.attach == "mac":
        return MemoryAsContext(config)
    memory = build_memory(config)
    if config.memory.attach == "mixer":
        return memory
    pair = {"mag": MemoryAsGate, "mal": MemoryAsLayer, "after": MemoryAfterAttention}[config.memory.attach]
    return pair(memory, _build_attention(config, config.window), AttachedShapes.of(config), config.d_model, config.norm_eps)


def _build_attention(config: ModelConfig, window: int | None) -> Attention:
    heads = (config.n_heads, config.kv_heads, config.attention_head_dim)
    qk_norm_eps = config.norm_eps if config.qk_norm else None
    return Attention(config.d_model, *heads, window, config.rope, config.qkv_bias, qk_norm_eps)


def _build_tables(config: ModelConfig) -> nn.ModuleList:
    """The value tables of a model: of product keys, in the order of the layers that read them, then of hierarchical memories."""
    shapes, std = config.table_shapes, config.init_std
    hierarchical = "hierarchical" in config.feedforward_kinds
    tables = [ValueTable(*shape) for shape in (shapes[:-1] if hierarchical else shapes)]
    if hierarchical:
        tables.append(BlockTable(shapes[-1][0], config.d_model, std, std / (2 * len(config.layer_kinds)) ** 0.5))
    return nn.ModuleList(tables)


def _build_readers(config: ModelConfig, tables: list[ValueTable]) -> list[TableReader | None]:
    """Of every layer what reads a table; None where the feed-forward is dense."""
    found: list[TableReader | None] = []
    keys, layers = 0, 0
    for kind in config.feedforward_kinds:
        if kind == "product_keys":
            found.append(ProductKeyMemory(config, tables[0 if config.product_keys.shared_table else keys]))
            keys += 1
        elif kind == "hierarchical":
            found.append(HierarchicalMemory(config, tables[-1], layers * config.hierarchical.rows))
            layers += 1
        else:
            found.append(None)
    return found


class LossHead(nn.Module):
    """Output projection and loss in one, so that logits never leave it."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.sweep: Callable[..., Sweep] = Sweep
        """What goes over the tiles of the loss; another one where ranks share the vocabulary."""

    def forward(self, x_BTC: Tensor, labels_BT: Tensor, tile_tokens: int, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """Negative log likelihood per token; ``norm`` as for `chunked_cross_entropy`."""
        return chunked_cross_entropy(x_BTC, self.weight, labels_BT, tile_tokens, norm, self.sweep)


class Transformer(nn.Module):
    """A Llama-style decoder whose mixers follow ``config.layers``. Parameters are empty until `init_weights`."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.loss_tile_tokens = 4096
        self.residual_dtype: torch.dtype | None = None
        """Of the stream between blocks; None: the embedding's. With another one blocks must run under autocast in it."""
        self.parts: dict[str, Part] = {}
        """By name, the parameters of which this rank's group holds a part."""
        self.sweep: Callable[..., Sweep] = Sweep
        """As that of `LossHead`, where embedding and head are one matrix."""
        self.embed = Embedding(vocab_size, config.d_model)
        self.value_tables = _build_tables(config)
        readers = _build_readers(config, [cast(ValueTable, table) for table in self.value_tables])
        self.blocks = nn.ModuleList(Block(config, kind, reader) for kind, reader in zip(config.layer_kinds, readers, strict=True))
        self.run_blocks: Callable[..., Tensor] = run_in_order
        self.stack = cast(StackMemory, build_memory(config)) if config.memory.around_stack else None
        """A memory around all layers, which then run on one segment at a time."""
        self.layer_segments: LayerSegments | None = None
        """A seam: runs all layers on one segment at a time, those that remember inside handing on what they do. A whole sequence is read
        so without gradients; with them, segments are run one by one (``trainer/replay.py``)."""
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else LossHead(vocab_size, config.d_model)

    def stream(self, batch: Batch) -> Tensor:
        """x_BTC after the last block: what the final norm reads."""
        if (segmented := self._whole_by) is not None:
            return self._by_segments(segmented, batch, lambda x_BTC, _labels_BT: x_BTC)
        return self._layers(batch)

    def _layers(self, batch: Batch) -> Tensor:
        for table in self.value_tables:
            cast(ValueTable, table).begin(batch.bounds)
        return self.run_blocks(self.blocks, self._embedded(batch.tokens_BT), batch.positions_BT, batch.bounds)

    @property
    def segmented(self) -> StackMemory | LayerSegments | None:
        """What runs the segments of a sequence, where it is read so."""
        return self.layer_segments if self.stack is None else self.stack

    @property
    def _whole_by(self) -> StackMemory | LayerSegments | None:
        """What runs a whole sequence's segments in one call."""
        return None if self.stack is None and torch.is_grad_enabled() else self.segmented

    def _embedded(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT)
        return x_BTC if self.residual_dtype is None else x_BTC.to(self.residual_dtype)

    def hidden(self, batch: Batch) -> Tensor:
        """h_BTC after the final norm: what the output projection reads."""
        return self.norm(self.stream(batch))

    def forward(self, batch: Batch, segment: Segment | None = None) -> Any:
        """nll_BT: negative log likelihood per token, float32 (float64), 0 where there is no label. A memory around the stack goes on from
        the state it carries, if it does.

        With ``segment``, of a model that is read in segments: nll_Bw of this step's tokens alone (where no loss is wanted, [0]), and the
        state after it.
        """
        if segment is not None:
            with self._state_alone(not segment.loss):
                x_BwC, state = self._segment(batch, segment.state, segment.step)
            if not segment.loss:
                return x_BwC.new_empty(0), state
            return self._loss(x_BwC, segment.step.take(batch.labels_BT, IGNORE_INDEX)), state
        if (segmented := self._whole_by) is not None:
            return self._by_segments(segmented, batch, self._loss)
        return self._loss(self.stream(batch), batch.labels_BT)

    def _loss(self, x_BTC: Tensor, labels_BT: Tensor) -> Tensor:
        norm = (self.norm.weight, self.norm.eps)
        if self.head is not None:
            return self.head(x_BTC, labels_BT, self.loss_tile_tokens, norm)
        return chunked_cross_entropy(x_BTC, self.embed.weight, labels_BT, self.loss_tile_tokens, norm, self.sweep)

    def _segment(self, batch: Batch, state: State | None, step: Step) -> tuple[Tensor, State]:
        if self.stack is None:
            assert self.layer_segments is not None
            return self.layer_segments.step(self._layers, batch, state, step)
        x_BwC = self._embedded(step.take(batch.tokens_BT))
        state = self.stack.opened(None, x_BwC) if state is None else state
        return self.stack.step(Backbone(self.blocks, self.run_blocks), x_BwC, state, step)

    @contextlib.contextmanager
    def _state_alone(self, alone: bool) -> Iterator[None]:
        """Around a step of which only the state after it is wanted: of the last layer that is what its mixer hands on. A memory around the
        stack reads the last layer's output."""
        last = cast(Block, self.blocks[-1])
        last.for_state = alone and self.stack is None and not torch.is_grad_enabled()
        try:
            yield
        finally:
            last.for_state = False

    def _by_segments(self, segmented: StackMemory | LayerSegments, batch: Batch, use: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``use(x_BwC, labels_Bw)`` of every step's tokens, in the order of the tokens; all steps are kept for a backward pass."""
        steps = segmented.plan_carried(batch.bounds)
        state, found = None, []
        with segmented.in_place():
            for step in steps:
                x_BwC, state = self._segment(batch, state, step)
                found.append(use(x_BwC, step.take(batch.labels_BT, IGNORE_INDEX)))
        assert state is not None
        segmented.hand_on(state, steps, batch.tokens_BT)
        return put_together(found, steps)


@torch.no_grad()
def init_weights(model: Transformer, seed: int, mup_base_width: int | None = None, only: Collection[nn.Parameter] | None = None) -> None:
    """Fill every parameter in place: a pure function of (seed, its name), whatever device, dtype or sharding it has.

    The whole tensor is drawn on the CPU in float32 from a generator of its own; a DTensor takes its shard of it without
    communication, a part of a parameter likewise. Modules may define ``init_parameter(name, shape, generator)`` for their own
    parameters; matrices are otherwise normal with ``config.init_std``. Raises ValueError for a parameter that no rule covers.

    ``mup_base_width``: the width at which ``init_std`` was found. With m times that width, the standard deviation of hidden linear layers
    is divided by the root of m and that of the output matrix by m (arXiv 2203.03466, table 3, as table 8 but for its multiplier); raises
    ValueError with tied embeddings, which cannot be both. ``only``: the parameters to fill, where the others have no memory yet.
    """
    if mup_base_width is not None and model.head is None:
        raise ValueError("optim.mup_base_width scales embedding and output matrix differently; set model.tie_embeddings false")
    wider = 1.0 if mup_base_width is None else model.config.d_model / mup_base_width
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if only is not None and not any(parameter is one for one in only):
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            digest = hashlib.sha256(f"{seed}/{full_name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            if isinstance(module, ValueTable):
                module.draw(generator)
                continue
            part = model.parts.get(full_name)
            shape = parameter.shape if part is None else torch.Size(part.whole_shape(parameter.shape))
            value = _initial_value(model.config, module, full_name, shape, generator)
            value = value if part is None else part.of(value).contiguous()
            if module is model.head:
                value /= wider
            elif isinstance(module, nn.Linear) and name == "weight":
                value /= wider**0.5
            _assign(parameter, value.to(parameter.dtype))


def _initial_value(config: ModelConfig, module: nn.Module, full_name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    module_name, _, name = full_name.rpartition(".")
    rule = getattr(module, "init_parameter", None)
    value = None if rule is None else rule(name, shape, generator)
    if value is not None:
        return value
    if len(shape) < 2:
        raise ValueError(f"no initial value is defined for {full_name}; give {type(module).__name__} an init_parameter method")
    std = config.init_std
    if module_name.rpartition(".")[2] in _INTO_RESIDUAL:
        std /= (2 * len(config.layer_kinds)) ** 0.5
    return torch.empty(shape).normal_(0, std, generator=generator)


def _assign(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        value = value.to(parameter.to_local().device)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(value)
