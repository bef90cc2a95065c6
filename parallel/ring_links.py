"""Over which links keys and their gradients go around a ring of ranks: a single ring, or one inside nodes and one across them.

In the double ring (LoongTrain, arXiv 2406.18485) ``inner`` neighbouring ranks pass keys among themselves, ``inner - 1`` times, while the
shard that each of them began with goes to the same place in the next node's ring: between nodes travels one shard per rank and turn of
the inner ring, through every rank's own adapter, and it has a whole turn's computation to hide behind. A single ring sends the same
number of shards, each across nodes at the nodes' edges, and every hop waits for these.

Gradients of keys follow one hop behind. Hop h = o * inner + i: rank (O, I) has the keys of rank (O - o, I - i). All pure but ``Transfer``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

KEY_TAG, VALUE_TAG, GRADIENT_TAG = 21, 22, 23


def keys_of(rank: int, hop: int, size: int, inner: int) -> int:
    """Whose keys ``rank`` of ``size`` has at ``hop``."""
    (outer, place), (turn, step) = divmod(rank, inner), divmod(hop, inner)
    return (outer - turn) % (size // inner) * inner + (place - step) % inner


def holder_of(keys: int, hop: int, size: int, inner: int) -> int:
    """Which rank has the keys of rank ``keys`` at ``hop``."""
    (outer, place), (turn, step) = divmod(keys, inner), divmod(hop, inner)
    return (outer + turn) % (size // inner) * inner + (place + step) % inner


class Transfer:
    """One tensor to rank ``target`` of a group, while one arrives from ``source``; ``wait`` gives the latter."""

    def __init__(self, tensor: torch.Tensor, target: int, source: int, tag: int, group: dist.ProcessGroup | None) -> None:
        self._sent, self._arriving = tensor, torch.empty_like(tensor)  # held here: nobody may reuse them before wait
        send = dist.P2POp(dist.isend, tensor, group=group, tag=tag, group_peer=target)
        receive = dist.P2POp(dist.irecv, self._arriving, group=group, tag=tag, group_peer=source)
        self._works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> torch.Tensor:
        """What has arrived."""
        for work in self._works:
            work.wait()
        return self._arriving


@dataclass(frozen=True)
class Links:
    """The ring's groups: ``group`` all its ranks (None: one rank), and for a double ring ``inner`` neighbours and ``outer`` ranks with the
    same place among theirs, which are groups of their own so that their messages need not wait for one another."""

    group: dist.ProcessGroup | None
    inner: dist.ProcessGroup | None = None
    outer: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This rank in the ring."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the ring."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def width(self) -> int:
        """Ranks of the inner ring; all of a single one."""
        return self.size if self.inner is None else dist.get_world_size(self.inner)

    def next_inside(self, tensor: torch.Tensor, tag: int) -> Transfer:
        """To the next rank of the inner ring."""
        rank, width = self.rank % self.width, self.width
        group = self.group if self.inner is None else self.inner
        return Transfer(tensor, (rank + 1) % width, (rank - 1) % width, tag, group)

    def next_across(self, tensor: torch.Tensor) -> Transfer:
        """Keys, to the rank in the same place of the next inner ring."""
        rank, size = self.rank // self.width, self.size // self.width
        return Transfer(tensor, (rank + 1) % size, (rank - 1) % size, KEY_TAG, self.outer)

    def gradients(self, tensor: torch.Tensor, hop: int, last_hop: int) -> Transfer:
        """Of the keys in hand at ``hop``, to the rank that has them next, and from the last hop back home."""
        rank, size, width = self.rank, self.size, self.width
        if hop == last_hop:
            return Transfer(tensor, keys_of(rank, hop, size, width), holder_of(rank, hop, size, width), GRADIENT_TAG, self.group)
        if (hop + 1) % width:
            return self.next_inside(tensor, GRADIENT_TAG)
        target = holder_of(keys_of(rank, hop, size, width), hop + 1, size, width)
        source = holder_of(keys_of(rank, hop + 1, size, width), hop, size, width)
        return Transfer(tensor, target, source, GRADIENT_TAG, self.group)


class Travelling:
    """Keys on their way: ``start`` when those of a hop are here, ``wait`` for those of the next."""

    def __init__(self, links: Links, last_hop: int) -> None:
        self._links, self._last_hop, self._width = links, last_hop, links.width
        self._inside: Transfer | None = None
        self._across: Transfer | None = None

    def start(self, kv_2BGSD: torch.Tensor, hop: int) -> None:
        """Pass on the keys of ``hop``: inside for the next hop, and at the beginning of a turn across for the next turn."""
        if hop % self._width == 0 and hop + self._width <= self._last_hop:
            self._across = self._links.next_across(kv_2BGSD)
        if hop < self._last_hop and (hop + 1) % self._width:
            self._inside = self._links.next_inside(kv_2BGSD, KEY_TAG)

    def wait(self, hop: int) -> torch.Tensor:
        """The keys of ``hop``, the one after that of the last ``start``."""
        coming = self._inside if hop % self._width else self._across
        assert coming is not None
        kv_2BGSD = coming.wait()
        if hop % self._width:
            self._inside = None  # what it sent is free before more is taken
        else:
            self._across = None
        return kv_2BGSD
