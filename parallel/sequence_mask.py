"""From what a caller knows of its own tokens to the mask of the whole sequence: what the public attention functions share.

``parallel.ring_attention.ring_attention`` and its siblings take tensors of this rank's tokens, documents and prefixes included.
Masks are made of the global coordinates of ``models.batch.Bounds``; ``sequence_bounds`` gathers them, once per batch if the caller
keeps the result.

Legend: B batch row, n tokens of this rank, T tokens of the sequence, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from models.attention import InnerAttention
from models.batch import Bounds
from models.errors import UserError
from models.kernels import check_kernel
from parallel.sequence import Layout, ranges_for, unshard_sequence

Groups = Sequence[dist.ProcessGroup | None]
"""The process groups that together share a sequence, the one of neighbours first; None: all ranks, or this process alone."""


def sequence_bounds(
    rows: int,
    tokens: int,
    *,
    group: dist.ProcessGroup | Groups | None,
    causal: bool = True,
    document_ids: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    layout: Layout = "zigzag",
) -> Bounds:
    """The global coordinates of a sequence of which every rank of ``group`` holds ``tokens`` tokens of ``rows`` rows.

    With ``document_ids`` or ``prefix`` all ranks must call it together, and the device is waited for; keep the result for all layers
    of a batch (``bounds=``).

    Args:
        group: one process group, or for ``hybrid_attention`` (ulysses_group, ring_group).
        causal: False: every token sees all of its document.
        document_ids: [B, n] integers that never decrease along the sequence; tokens see their own document only.
        prefix: [B, n] booleans, True for the tokens that a document begins with and that all of its tokens see.
        layout: which tokens are whose.
    Raises:
        ValueError: (on all ranks) for ids that decrease, for a prefix that does not begin its document, for wrong shapes or dtypes.
        UserError: for a number of tokens that the layout cannot split.
    """
    if layout == "per_document":
        raise ValueError("layout 'per_document' follows from the documents of the whole sequence; pass bounds that hold them")
    groups = list(group) if isinstance(group, Sequence) else [group]
    cp_rank, cp_size = place_in(groups)
    seq_len = tokens * cp_size
    if prefix is not None and not causal:
        raise ValueError("prefix goes with causal=True; with causal=False every token sees all of its document")
    held = ranges_for(layout, seq_len, cp_rank, cp_size)
    if document_ids is None and prefix is None:
        documents = ((0,),) * rows
    else:
        ids_BT, in_prefix_BT = _gathered(rows, tokens, document_ids, prefix, groups, layout)
        documents = _document_starts(ids_BT)
    if not causal:
        return Bounds(seq_len, held, documents, tuple((*starts[1:], seq_len) for starts in documents))
    prefixes = () if prefix is None else _prefix_ends(in_prefix_BT, documents)  # pyright: ignore[reportPossiblyUnboundVariable]
    return Bounds(seq_len, held, documents, prefixes)


def place_in(groups: Groups) -> tuple[int, int]:
    """(rank, size) of this process in the ranks that share a sequence: neighbours first."""
    rank, size = 0, 1
    for group in groups:
        if not dist.is_initialized():
            continue
        own = dist.get_rank(group)
        if own < 0:
            raise ValueError("this process is not in the group that it calls attention with")
        rank += own * size
        size *= dist.get_world_size(group)
    return rank, size


def given_or_all(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the group of all ranks."""
    found = group if group is not None else dist.group.WORLD
    assert found is not None, "more than one rank shares the sequence, so there are groups"
    return found


def attend_public(scheme: InnerAttention, q_BnHD: torch.Tensor, k_BnGD: torch.Tensor, v_BnGD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """``scheme`` on tensors that hold tokens before heads."""
    return scheme(q_BnHD.transpose(1, 2), k_BnGD.transpose(1, 2), v_BnGD.transpose(1, 2), bounds).transpose(1, 2)


def checked_bounds(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    group: dist.ProcessGroup | Groups | None,
    bounds: Bounds | None,
    *,
    causal: bool,
    window: int | None,
    document_ids: torch.Tensor | None,
    prefix: torch.Tensor | None,
    layout: Layout,
    kernel: str,
) -> Bounds:
    """``bounds``, or those of the other arguments; after a check of all that one rank can check alone."""
    check_kernel(kernel)
    q_BnHD, k_BnGD, v_BnGD = qkv
    shapes = f"q {tuple(q_BnHD.shape)}, k {tuple(k_BnGD.shape)}, v {tuple(v_BnGD.shape)}"
    if not q_BnHD.ndim == k_BnGD.ndim == v_BnGD.ndim == 4 or k_BnGD.shape != v_BnGD.shape:
        raise ValueError(f"{shapes}: q must be [B, T/cp, Hq, D], k and v [B, T/cp, Hkv, D]")
    if q_BnHD.shape[:2] != k_BnGD.shape[:2] or q_BnHD.shape[3] != k_BnGD.shape[3]:
        raise ValueError(f"{shapes}: rows, tokens and head sizes of q and k must be equal")
    if q_BnHD.shape[2] % k_BnGD.shape[2]:
        raise UserError(f"{q_BnHD.shape[2]} query heads are not a multiple of {k_BnGD.shape[2]} key/value heads; repeat or drop heads")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a token sees at least itself, so it must be 1 or more")
    if bounds is None:
        rows, tokens = q_BnHD.shape[:2]
        return sequence_bounds(rows, tokens, group=group, causal=causal, document_ids=document_ids, prefix=prefix, layout=layout)
    if document_ids is not None or prefix is not None or not causal:
        raise ValueError("bounds already say what causal, document_ids and prefix would; give one or the other")
    return bounds


def _gathered(
    rows: int,
    tokens: int,
    document_ids: torch.Tensor | None,
    prefix: torch.Tensor | None,
    groups: Groups,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(document ids, whether in a prefix) [B, T] of the whole sequence, on the CPU."""
    given = document_ids if document_ids is not None else prefix
    assert given is not None
    for name, x in (("document_ids", document_ids), ("prefix", prefix)):
        if x is not None and x.shape != (rows, tokens):
            raise ValueError(f"{name} {tuple(x.shape)} must be [B, T/cp], here {(rows, tokens)}")
    if document_ids is not None and (document_ids.is_floating_point() or document_ids.dtype == torch.bool):
        raise ValueError(f"document_ids must be integers, not {document_ids.dtype}")
    if prefix is not None and prefix.dtype != torch.bool:
        raise ValueError(f"prefix must be booleans, not {prefix.dtype}")
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=given.device) if document_ids is None else document_ids.long()
    shown = torch.zeros_like(ids) if prefix is None else prefix.long()
    shards = torch.stack((ids, shown))[None]  # [1, 2, B, n], with the ranks of more and more groups in front
    for group in groups:
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            parts = [torch.empty_like(shards) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, shards, group=group)
            shards = torch.cat(parts)
    whole_2BT = unshard_sequence(list(shards.cpu()), 2, layout)
    return whole_2BT[0], whole_2BT[1].bool()


def _document_starts(ids_BT: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    steps_BT = ids_BT.diff(dim=1)
    if (steps_BT < 0).any():
        row, token = ((steps_BT < 0).nonzero()[0] + torch.tensor([0, 1])).tolist()
        raise ValueError(f"document_ids decrease at token {token} of row {row}; they must never decrease along the sequence")
    return tuple((0, *((row != 0).nonzero().flatten() + 1).tolist()) for row in steps_BT)


def _prefix_ends(in_prefix_BT: torch.Tensor, documents: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Where the prefix of every document ends. Raises ValueError where its tokens do not begin their document."""
    seq_len = in_prefix_BT.shape[1]
    ends = []
    for row, (shown_T, starts) in enumerate(zip(in_prefix_BT, documents, strict=True)):
        counts = torch.cat((torch.zeros(1, dtype=torch.int64), shown_T.long().cumsum(0)))
        found = []
        for start, end in zip(starts, (*starts[1:], seq_len), strict=True):
            length = int(counts[end] - counts[start])
            if int(counts[start + length] - counts[start]) != length:
                raise ValueError(f"prefix: the tokens of the document at {start} of row {row} that are in it must be its first ones")
            found.append(start + length)
        ends.append(tuple(found))
    return tuple(ends)
