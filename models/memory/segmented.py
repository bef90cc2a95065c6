"""What the memories that are written once per segment share: their inputs dealt to segments, and a slow twin that walks token by token.

Legend: B row, T token, C channel, c tokens of a segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.batch import Bounds, Range
from models.memory.protocol import State
from models.memory.recurrent import RecurrentMixer
from models.memory.segments import Segments, plan_segments


class _Tied(torch.autograd.Function):
    """x as it is. Tokens fetched from other ranks that no segment of this range needs take part in the loss all the same: ranks fetch,
    and send gradients back, together."""

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, before_BnC: Tensor) -> Tensor:
        ctx.before = before_BnC.shape, before_BnC.dtype
        return x_BTC.view_as(x_BTC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.before
        return grads[0], grads[0].new_zeros(shape, dtype=dtype)


class SegmentedMixer(RecurrentMixer):
    """Base of mixers whose tokens read the memory as it was at their segment's start.

    The state is that at the start of the segment which the next token belongs to, and the layer's last inputs, of which a segment that
    is cut by the end of a range is made again.
    """

    def __init__(self, d_model: int, state_shape: tuple[int, int, int], segment: int, lead: int = 0) -> None:
        """``lead``: segments before its own that a token sees beside."""
        super().__init__(d_model, state_shape, segment * (1 + lead), segment)
        self.segment, self.lead = segment, lead

    def segments(self, bounds: Bounds, span: Range, x_BTC: Tensor, before_BnC: Tensor) -> tuple[Segments, Tensor]:
        """The segments of ``span``, and the range's inputs with as many before it as they need."""
        plan = plan_segments(bounds, span, self.segment, x_BTC.device, self.lead)
        if not plan.before:
            return plan, x_BTC if self.carry.local or not self.halo else _Tied.apply(x_BTC, before_BnC)  # type: ignore[return-value]
        return plan, torch.cat([before_BnC[:, before_BnC.shape[1] - plan.before :].to(x_BTC.dtype), x_BTC], dim=1)

    # --- twin ---------------------------------------------------------------------------------------------------------------------

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """Row by row, document by document, segment by segment."""
        state = state or self.init_state(len(x_BTC), x_BTC.device, x_BTC.dtype)
        fresh = self.init_state(1, x_BTC.device, x_BTC.dtype)["state"][0]
        outputs, after = [], []
        for x_TC, memory, starts in zip(x_BTC, state["state"], bounds.documents, strict=True):
            y_TC, row_ends = [], [*starts[1:], bounds.seq_len]
            for start, end in zip(starts, row_ends, strict=True):
                memory = fresh if start > 0 else memory
                for a in range(start, end, self.segment):
                    y_cC, memory = self.oracle_segment(x_TC[start:end], a - start, min(a + self.segment, end) - start, memory)
                    y_TC.append(y_cC)
            outputs.append(torch.cat(y_TC))
            after.append(memory)
        inputs = torch.cat([state["conv"], x_BTC], dim=1)
        return torch.stack(outputs), {"state": torch.stack(after), "conv": inputs[:, inputs.shape[1] - self.halo :]}

    def oracle_segment(self, x_DC: Tensor, a: int, b: int, memory_HKW: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [b - a, C] of tokens a to b of a document, and the memory after them."""
        raise NotImplementedError
