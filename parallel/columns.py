"""Value tables shared by columns: every rank of a group holds all rows and some columns, and reads them for the tokens of the whole group.

    index, weight of this rank's tokens  --all-gather-->  of the group's tokens
    sums of rows in this rank's columns  --all-to-all-->  all columns of this rank's tokens

Backward: the gradient of y goes the way back, each rank's part of the weights' gradient is added up where the token is, and the gradient
of the rows stays where their columns are. A reading does not depend on the order of tokens, so the group may share sequences, batches or
both; it is the group over which FSDP2 shards everything else, tensor-parallel ranks included. By columns the work is even whatever is
read; by rows, rows that are read often would make their rank wait. Ranks that hold copies (``dp_replicate``) add up the rows that any of
them read.

Legend: n tokens of this rank, N of the group, E entries that a token reads, V rows, D columns of the table, d of this rank, P ranks.
Try alone: ``pytest tests/parallel/test_columns.py``.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.tables import Columns
from models.transformer import Transformer
from models.value_table import Add, LocalLookUp, TouchedRows, Usage, ValueTable, read_rows, weight_gradient, weighted_rows
from parallel.mesh import Mesh

TILE_TOKENS = 16_384
"""Of a rank whose entries are gathered at a time: bounds what a rank holds of the others' entries."""


def columns_for(width: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first, count) of the columns of ``rank``, as torch deals out a sharded dim: equal chunks, the last ranks have less or none."""
    chunk = -(-width // ranks)
    first = min(rank * chunk, width)
    return first, min(chunk, width - first)


def share_tables(model: Transformer, mesh: Mesh) -> None:
    """Leave this rank its columns of every value table of ``model``; their values are undefined then. Before FSDP2 is applied."""
    # Tensor-parallel ranks share it too: each reads for its own tokens of the stream.
    group, copies = (mesh.model_group, mesh.copies_and_shards if mesh.tensor is None else mesh.tensor.model)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    replicas = mesh.fsdp.get_group("dp_replicate") if mesh.dims.dp_replicate > 1 else None
    for module in model.value_tables:
        table = cast(ValueTable, module)
        columns = Columns(table.width, *columns_for(table.width, rank, ranks), copies)
        table.keep_columns(columns, ColumnLookUp(group, table.width, replicas) if ranks > 1 else CopiedLookUp(replicas))


def sent_bytes(counts: list[int], rank: int, entries: int, width: int, wide: int, itemsize: int) -> tuple[int, int]:
    """Bytes that ``rank`` sends to others in one reading, (forward, backward). ``counts``: tokens of every rank; ``wide``: bytes of a
    weight and of a value; ``itemsize``: of an element of y."""
    ranks = len(counts)
    mine = columns_for(width, rank, ranks)[1]
    others = sum(counts) - counts[rank]
    gathered = (ranks - 1) * counts[rank] * entries * (4 + wide)
    return gathered + others * mine * itemsize, gathered + counts[rank] * (width - mine) * itemsize + others * entries * wide


def as_whole(tensor: Tensor, columns: Columns) -> Tensor:
    """A rank's columns of a table, or of a state of its shape, as the DTensor that a checkpoint knows; it shares their memory."""
    if columns.mesh is None:
        return tensor
    shape = torch.Size((len(tensor), columns.total))
    stride = (columns.total, 1)
    return DTensor.from_local(tensor, columns.mesh, (Replicate(), Shard(1)), run_check=False, shape=shape, stride=stride)


def usage_of(model: Transformer) -> list[Usage]:
    """Of every value table since this was asked before, over all ranks, which must ask together; tables that nothing read are left out."""
    found = []
    for module in model.value_tables:
        table = cast(ValueTable, module)
        usage_V = table.take_usage()
        mesh = table.columns.mesh
        replicated = mesh is not None and mesh.size(0) > 1
        if usage_V is None and replicated:  # nothing was read here, but perhaps by a replica
            usage_V = torch.zeros(table.rows, device=table.weight.device)
        if usage_V is not None:
            if mesh is not None and replicated:
                dist.all_reduce(usage_V, group=mesh.get_group(0))
            if usage_V.any():
                found.append(Usage.of(usage_V))
    return found


class CopiedLookUp(LocalLookUp):
    """Every rank holds the whole table; what they read is added up over ``replicas`` (None: one rank)."""

    def __init__(self, replicas: dist.ProcessGroup | None) -> None:
        self.replicas = replicas

    def over_replicas(self, touched: TouchedRows, n_rows: int) -> TouchedRows:
        """See `LookUp.over_replicas`: rows that any rank read, the same on all."""
        if self.replicas is None:
            return touched
        mask_V = torch.zeros(n_rows, dtype=torch.uint8, device=touched.rows_U.device)
        mask_V.index_fill_(0, touched.rows_U, 1)
        dist.all_reduce(mask_V, op=dist.ReduceOp.MAX, group=self.replicas)
        rows_U = read_rows(mask_V.bool(), len(touched.rows_U) * dist.get_world_size(self.replicas))
        place_V = torch.zeros(n_rows, dtype=torch.long, device=rows_U.device)
        place_V.index_copy_(0, rows_U, torch.arange(len(rows_U), device=rows_U.device))
        values_UD = touched.values_UD.new_zeros(len(rows_U), touched.values_UD.shape[1])
        values_UD.index_copy_(0, place_V[touched.rows_U], touched.values_UD)
        dist.all_reduce(values_UD, group=self.replicas)
        return TouchedRows(rows_U, values_UD)


class ColumnLookUp(CopiedLookUp):
    """See the module.

    Args:
        group: the ranks that share the table; all must read at the same time.
        width: columns of the whole table.
        replicas: ranks that hold the same columns.
    """

    def __init__(self, group: dist.ProcessGroup, width: int, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__(replicas)
        self.group, self.width = group, width
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.columns = [columns_for(width, rank, self.ranks) for rank in range(self.ranks)]
        self.counts: list[int] | None = None
        """Tokens of every rank; None: as many as this one's."""

    def agreed(self, readings: list[int], device: torch.device) -> list[list[int]]:
        """See `LookUp.agreed`: first how many readings there are at most, then how long they are."""
        most = max(number for (number,) in self._of_all([len(readings)], device))
        return self._of_all([*readings, *[0] * (most - len(readings))], device)

    def _of_all(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        mine = torch.tensor([numbers], device=device)
        found = mine.new_empty(self.ranks, len(numbers))
        dist.all_gather_into_tensor(found, mine, group=self.group)
        return [numbers] * self.ranks if isinstance(found, FakeTensor) else found.tolist()

    def reading(self, counts: list[int]) -> ColumnLookUp:
        """See `LookUp.reading`."""
        found = copy.copy(self)
        found.counts = counts
        return found

    def forward(self, values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor, dtype: torch.dtype) -> Tensor:
        """See `LookUp.forward`. The sums are rounded to ``dtype`` before they travel, as they would be after."""
        y_nD = torch.empty(len(index_nE), self.width, dtype=dtype, device=values_VD.device)
        for mine, counts in self._tiles(index_nE):
            index_NE, weight_NE = (self._gathered(x[mine], counts) for x in (index_nE, weight_nE))
            y_Nd = weighted_rows(values_VD, index_NE, weight_NE).to(dtype)
            self._to_tokens(y_Nd, counts, y_nD[mine])
        return y_nD

    def backward(self, values_VD: Tensor, index_nE: Tensor, weight_nE: Tensor, dy_nD: Tensor, add: Add | None) -> Tensor:
        """See `LookUp.backward`. Entries are gathered again: kept, they would be the group's, not this rank's."""
        dweight_nE = torch.empty(index_nE.shape, dtype=values_VD.dtype, device=values_VD.device)
        for mine, counts in self._tiles(index_nE):
            index_NE = self._gathered(index_nE[mine], counts)
            dy_Nd = self._to_columns(dy_nD[mine], counts).to(values_VD.dtype)
            if add is not None:
                add(index_NE, self._gathered(weight_nE[mine], counts), dy_Nd)
            dweight_nE[mine] = self._summed(weight_gradient(values_VD, index_NE, dy_Nd), counts)
        return dweight_nE

    def _tiles(self, x_nE: Tensor) -> list[tuple[slice, list[int]]]:
        """(this rank's tokens, every rank's number of them), tile by tile; equally many tiles on every rank."""
        totals = [len(x_nE)] * self.ranks if self.counts is None else self.counts
        tiles = []
        for first in range(0, max(totals), TILE_TOKENS):
            counts = [max(0, min(total - first, TILE_TOKENS)) for total in totals]
            first = min(first, len(x_nE))
            tiles.append((slice(first, first + counts[self.rank]), counts))
        return tiles

    def _gathered(self, x_nE: Tensor, counts: list[int]) -> Tensor:
        """Rows of every rank, rank after rank."""
        most, even = max(counts), min(counts) == max(counts)
        if len(x_nE) < most:
            x_nE = torch.cat([x_nE, x_nE.new_zeros(most - len(x_nE), x_nE.shape[1])])
        all_PnE = x_nE.new_empty(self.ranks * most, x_nE.shape[1])
        dist.all_gather_into_tensor(all_PnE, x_nE.contiguous(), group=self.group)
        if even:
            return all_PnE
        return torch.cat([part[:count] for part, count in zip(all_PnE.split(most), counts, strict=True)])

    def _exchanged(self, message: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arriving = message.new_empty(sum(received))
        dist.all_to_all_single(arriving, message, received, sent, group=self.group)
        return arriving

    def _to_tokens(self, y_Nd: Tensor, counts: list[int], out_nD: Tensor) -> None:
        """Give every rank this rank's columns of its tokens; ``out`` gets all columns of this rank's."""
        mine, widths = counts[self.rank], [count for _, count in self.columns]
        sent = [count * widths[self.rank] for count in counts]
        blocks = self._exchanged(y_Nd.reshape(-1), sent, [mine * width for width in widths]).split([mine * width for width in widths])
        for (first, width), block in zip(self.columns, blocks, strict=True):
            out_nD[:, first : first + width].copy_(block.view(mine, width))

    def _to_columns(self, x_nD: Tensor, counts: list[int]) -> Tensor:
        """The way back: this rank's columns of every rank's tokens."""
        message = torch.cat([x_nD[:, first : first + width].reshape(-1) for first, width in self.columns])
        own = self.columns[self.rank][1]
        arriving = self._exchanged(message, [len(x_nD) * width for _, width in self.columns], [count * own for count in counts])
        return arriving.view(sum(counts), own)

    def _summed(self, parts_NE: Tensor, counts: list[int]) -> Tensor:
        """The sum over ranks of what each has for this rank's tokens, in the order of ranks."""
        mine, entries = counts[self.rank], parts_NE.shape[1]
        sent = [count * entries for count in counts]
        return self._exchanged(parts_NE.reshape(-1), sent, [mine * entries] * self.ranks).view(self.ranks, mine, entries).sum(0)
