"""Embedding and head by rows of the vocabulary, over the ranks of a tensor-parallel group that hold different tokens.

Every rank looks up those of the group's tokens that are among its rows; a reduce-scatter gives each rank its own tokens (one of the
summands is not zero). The loss goes over tiles of tokens: a tile's normed tokens are gathered, every rank makes the logits of its rows,
two numbers per token and rank are exchanged (the log-sum-exp of its rows, and the label's logit where it has that row), and the gradient
of the tile is summed to the ranks that hold its tokens. No rank has more than a tile of V / P logits, and the loss of every token of the
group is on all of its ranks, the same bits.

Legend: B row, T token of the group, t of a tile, C channel, V rows of the vocabulary on this rank, P ranks.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from models.batch import IGNORE_INDEX
from models.embedding import Embedding
from models.loss import How, Sweep
from models.parts import Part
from models.tokens import ALL_TOKENS, Tokens
from models.transformer import Transformer


class SharedEmbedding(Embedding):
    """This rank's ``num_embeddings`` rows of the vocabulary, from row ``first`` on."""

    def __init__(self, like: Embedding, part: Part) -> None:
        rows = like.num_embeddings // part.ranks
        super().__init__(rows, like.embedding_dim, device=like.weight.device, dtype=like.weight.dtype)
        self.first = part.rank * rows
        self.tokens: Tokens = ALL_TOKENS

    def forward(self, input: Tensor) -> Tensor:
        """tokens_BT -> x_BtC, this rank's tokens."""
        row_BT = input - self.first
        elsewhere_BT = (row_BT < 0) | (row_BT >= self.num_embeddings)
        x_BTC = super().forward(row_BT.masked_fill_(elsewhere_BT, 0))
        return self.tokens.summed(x_BTC.masked_fill(elsewhere_BT.unsqueeze(-1), 0))


class SharedSweep(Sweep):
    """`Sweep` over the tokens of all ranks of ``group``, with this rank's rows of the vocabulary."""

    def __init__(
        self, x_nC: Tensor, weight_VC: Tensor, norm_C: Tensor | None, labels_Pn: Tensor, how: How, *, group: dist.ProcessGroup
    ) -> None:
        super().__init__(x_nC, weight_VC, norm_C, labels_Pn, how)
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def statistics(self, tile: slice, logits_tV: Tensor) -> tuple[Tensor, Tensor]:
        """See `Sweep.statistics`: of all rows of the vocabulary."""
        row_t1, elsewhere_t1 = self._rows(self.labels(tile).unsqueeze(1))
        target_t = logits_tV.gather(1, row_t1).masked_fill_(elsewhere_t1, 0).squeeze(1)
        own_2t = torch.stack([logits_tV.logsumexp(-1), target_t])
        all_P2t = own_2t.new_empty(self.ranks * 2, own_2t.shape[1])
        dist.all_gather_into_tensor(all_P2t, own_2t, group=self.group)
        lse_Pt, target_Pt = all_P2t.view(self.ranks, 2, -1).unbind(1)
        return lse_Pt.logsumexp(0), target_Pt.sum(0)

    def subtract_targets(self, labels_t1: Tensor, dlogits_tV: Tensor) -> None:
        """See `Sweep.subtract_targets`."""
        row_t1, elsewhere_t1 = self._rows(labels_t1)
        dlogits_tV.scatter_add_(1, row_t1, torch.full_like(row_t1, -1, dtype=dlogits_tV.dtype).masked_fill_(elsewhere_t1, 0))

    def gathered(self, h_tC: Tensor) -> Tensor:
        """See `Sweep.gathered`."""
        all_tC = h_tC.new_empty(self.ranks * len(h_tC), h_tC.shape[1])
        dist.all_gather_into_tensor(all_tC, h_tC.contiguous(), group=self.group)
        return all_tC

    def summed(self, dh_tC: Tensor) -> Tensor:
        """See `Sweep.summed`."""
        own_tC = dh_tC.new_empty(len(dh_tC) // self.ranks, dh_tC.shape[1])
        dist.reduce_scatter_tensor(own_tC, dh_tC, group=self.group)
        return own_tC

    def own(self, of_t1: Tensor) -> Tensor:
        """See `Sweep.own`."""
        return of_t1.view(self.ranks, -1, 1)[self.rank]

    def _rows(self, labels_t1: Tensor) -> tuple[Tensor, Tensor]:
        """(row of this rank, 0 where the label is none of them, and where that is)."""
        rows = len(self.master_VC)
        row_t1 = labels_t1 - self.rank * rows
        elsewhere_t1 = (labels_t1 == IGNORE_INDEX) | (row_t1 < 0) | (row_t1 >= rows)
        return row_t1.masked_fill_(elsewhere_t1, 0), elsewhere_t1


def share_vocabulary(model: Transformer, tokens: Tokens, group: dist.ProcessGroup) -> None:
    """Fill the seams of embedding and loss, where this rank has its rows of both (``tensor_parallel.leave_parts``)."""
    assert isinstance(model.embed, SharedEmbedding)
    model.embed.tokens = tokens
    model.sweep = partial(SharedSweep, group=group)
    if model.head is not None:
        model.head.sweep = model.sweep
