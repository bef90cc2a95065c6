"""A model reads a sequence chunk by chunk, without gradients: memories hand their state on, windows keep the keys they still need.

So a model of recurrent layers and sliding windows reads any length in the memory of one chunk; the result is that of the whole sequence at
once. Attention without a window keeps all keys and values, [rows, G, length, D] twice per layer, if a limit allows it.

Legend: B rows, T tokens of a chunk, S keys kept, H query heads, G key/value heads, D head size, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from models.attention import attend_all, check_shapes, tile_limits
from models.attention_plan import Pair, plan_rows
from models.batch import IGNORE_INDEX, Batch, Bounds
from models.errors import UserError
from models.int8_weight import in_dtype
from models.layer_segments import LayerStates
from models.memory.protocol import Carried, State
from models.transformer import Block, Transformer
from trainer.engine import Precision

CHUNK_TOKENS = 8192
"""Tokens of all rows that are read at a time, about."""


class StreamedAttention:
    """The seam of an attention layer without a window while a sequence is read in chunks: ``(q_BHTD, k_BGTD, v_BGTD, bounds) -> out_BHTD``.

    All keys are kept, in room for ``length`` tokens that is taken at once."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __call__(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, bounds: Bounds) -> Tensor:
        """Of one chunk; chunks come in order, from the first token on."""
        check_shapes(q_BHTD, k_BGTD, bounds)
        ((start, end),) = bounds.ranges
        limits = tile_limits(q_BHTD, None)
        k, v = self._appended(k_BGTD, v_BGTD, start, end)
        key = ("streamed attention", limits)
        plan = bounds._cache.get(key)
        if plan is None:
            pairs = [Pair((start, end), 0, (start, end), start), Pair((start, end), 0, (0, start), 0)]
            plan = bounds._cache[key] = plan_rows(bounds.documents, pairs[: 1 if start == 0 else 2], None, limits)
        return attend_all(q_BHTD, k, v, plan)[0]

    def _appended(self, k_BGTD: Tensor, v_BGTD: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            rows, heads, _, size = k_BGTD.shape
            self._keys, self._values = (x.new_empty(rows, heads, self.length, size) for x in (k_BGTD, v_BGTD))
        self._keys[:, :, start:end], self._values[:, :, start:end] = k_BGTD, v_BGTD
        return self._keys[:, :, :end], self._values[:, :, :end]


class StreamedModel:
    """``model`` on ``device``, read in chunks of about ``chunk_tokens`` of all rows. ``kept_bytes``: most that attention without a window
    may keep. Raises UserError for a model with a layer that hands nothing on."""

    def __init__(
        self, model: Transformer, device: torch.device, precision: Precision, kept_bytes: int, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self.model, self.device, self.precision, self.kept_bytes = model, device, precision, kept_bytes
        # A memory around the stack gives its layers one segment at a time, whose tokens wait in its state where a chunk cuts it.
        blocks = () if model.stack is not None else model.blocks
        self.states = LayerStates({f"layer {i}": cast(Block, block).mixer for i, block in enumerate(blocks)})
        for name, mixer in self.states.others.items():
            raise UserError(
                f"{name} ({type(mixer).__name__}) hands no state on from chunk to chunk: this model cannot be evaluated in a stream"
            )
        self.multiple = self.states.granularity
        self.chunk_tokens = chunk_tokens

    @property
    def vocab_size(self) -> int:
        """Rows of the output projection."""
        return self.model.vocab_size

    def refused(self, length: int) -> str | None:
        """Why a sequence of ``length`` tokens cannot be read; None if it can."""
        full = self.states.without_window
        item = 8 if self.precision == "fp64" else 2 if self.precision == "bf16" else 4
        needed = sum(2 * length * layer.wk.weight.shape[0] * item for layer in full.values())
        if needed <= self.kept_bytes:
            return None
        return (
            f"{length:,} tokens: full attention ({', '.join(full)}) would keep {needed / 2**30:.1f} GiB of keys and values per row, and "
            f"{self.kept_bytes / 2**30:.1f} GiB are allowed; ask for shorter --lengths, or allow more with --kv-gib"
        )

    @torch.no_grad()
    def hidden(self, tokens_BT: np.ndarray) -> Generator[tuple[int, int, Tensor]]:
        """(start, end, h_BTC after the final norm) of every chunk in order; the caller must use up the iterator or close it."""
        for batch in self._chunks(tokens_BT, None):
            with self._autocast():
                h_BTC = self.model.hidden(batch)
            ((start, end),) = batch.bounds.ranges
            yield start, end, h_BTC

    @torch.no_grad()
    def losses(self, tokens_BT: np.ndarray, labels_BT: np.ndarray) -> Generator[tuple[int, int, Tensor]]:
        """(start, end, nll_BT in nats) of every chunk in order; as `hidden`."""
        for batch in self._chunks(tokens_BT, labels_BT):
            with self._autocast():
                nll_BT = self.model(batch)
            ((start, end),) = batch.bounds.ranges
            yield start, end, nll_BT

    def predict(self, tokens_BT: np.ndarray, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The most likely next token after each of the positions ``at[b]`` (ascending) of row b."""
        found: list[list[np.ndarray]] = [[] for _ in at]
        for start, end, h_BTC in self.hidden(tokens_BT):
            for row, positions in enumerate(at):
                inside = positions[(positions >= start) & (positions < end)]
                if len(inside):
                    found[row].append(self._most_likely(h_BTC[row, torch.from_numpy(inside - start).to(h_BTC.device)]))
        return [np.concatenate(parts) for parts in found]

    @torch.no_grad()
    def _most_likely(self, h_nC: Tensor) -> np.ndarray:
        weight = self.model.embed.weight if self.model.head is None else self.model.head.weight
        wide = torch.promote_types(h_nC.dtype, torch.float32)
        return (h_nC.to(wide) @ in_dtype(weight, wide).t()).argmax(-1).cpu().numpy()

    def _chunks(self, tokens_BT: np.ndarray, labels_BT: np.ndarray | None) -> Iterator[Batch]:
        """Every chunk as a batch, with the seams set for it; the states move on between two of them."""
        rows, length = tokens_BT.shape
        if refused := self.refused(length * rows):
            raise UserError(refused)
        step = max(1, self.chunk_tokens // rows // self.multiple) * self.multiple
        whole = Bounds.whole(rows, length)
        with self._streaming(rows, length):
            for start in range(0, length, step):
                end = min(start + step, length)
                tokens = torch.from_numpy(tokens_BT[:, start:end].astype(np.int64))
                labels = torch.full_like(tokens, IGNORE_INDEX)
                if labels_BT is not None:
                    labels = torch.from_numpy(labels_BT[:, start:end].astype(np.int64))
                positions = torch.arange(start, end).expand(rows, -1).contiguous()
                yield Batch(tokens, labels, positions, whole.with_ranges(((start, end),))).to(self.device)
                self._hand_on()

    @contextlib.contextmanager
    def _streaming(self, rows: int, length: int) -> Iterator[None]:
        wide = torch.float64 if self.precision == "fp64" else torch.float32
        stack, full = self.model.stack, self.states.without_window
        seams = {name: layer.inner_attention for name, layer in full.items()}
        training = self.model.training
        self.model.eval()
        try:
            for layer in full.values():
                layer.inner_attention = StreamedAttention(length)
            if stack is not None:
                with torch.no_grad():
                    state: State = stack.init_state(rows, self.device, wide)
                stack.carried = Carried(state, torch.ones(rows, dtype=torch.bool, device=self.device))
            with self.states.in_place():
                self.states.begin(None)
                yield
        finally:
            for name, layer in full.items():
                layer.inner_attention = seams[name]
            if stack is not None:
                stack.carried = None
            self.model.train(training)

    def _hand_on(self) -> None:
        if (stack := self.model.stack) is None:
            self.states.begin(self.states.take())
            return
        assert stack.carried is not None and stack.carried.left is not None, "the memory around the stack left no state"
        stack.carried = Carried(stack.carried.left, torch.zeros_like(stack.carried.fresh_B))

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
