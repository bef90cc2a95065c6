"""Volumes by formula equal what the engine sends; the choice of a scheme follows from mesh, heads, tokens and links."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from memory_mgmt.cost_rates import Rates, Topology
from memory_mgmt.cost_schemes import SequenceProblem, choose_scheme, dealt_keys, scheme_cost
from memory_mgmt.devices import DEVICES
from models.batch import Bounds
from parallel.comm_dtypes import comm_dtypes
from parallel.config import KVDtype, SequenceScheme
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh
from parallel.schemes import attention_over
from parallel.sequence import ranges_for
from tests.distributed import run_distributed

SEQ_LEN, DIM = 32, 4


class Sent(TorchDispatchMode):
    """Bytes that this rank sends to others, and of a ring's those that go to another group of ``inner`` neighbours."""

    def __init__(self, inner: int = 1) -> None:
        super().__init__()
        self.bytes = self.across = 0
        self.inner = inner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, rank = func._schema.name, dist.get_rank()
        if name == "c10d::send":
            sent = sum(x.numel() * x.element_size() for x in args[0])
            self.bytes += sent
            target = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[1]))[args[2]]
            self.across += sent if target // self.inner != rank // self.inner else 0
        elif name == "c10d::alltoall_base_":  # of a group whose ranks are consecutive
            sizes = args[4] or [args[1].numel() // args[2].size()] * args[2].size()
            self.bytes += (args[1].numel() - sizes[rank % len(sizes)]) * args[1].element_size()
        elif name == "c10d::allgather_":
            self.bytes += (len(args[0][0]) - 1) * args[1][0].numel() * args[1][0].element_size()
        elif name == "c10d::reduce_scatter_":
            self.bytes += (len(args[1][0]) - 1) * args[0][0].numel() * args[0][0].element_size()
        return func(*args, **(kwargs or {}))


def _all_sent() -> list[tuple[int, int, int, int]]:
    return [_sent(*volume) for volume in VOLUMES]


def _sent(
    scheme: SequenceScheme, ulysses: int, heads: tuple[int, int], head_chunk: int | None, narrow: Any, kv_dtype: KVDtype = "compute"
) -> tuple[int, int, int, int]:
    """(forward, backward) bytes of this rank in bfloat16, or where ``kv_dtype`` is that in float32, and those that leave its ``ulysses``
    neighbours."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = build_mesh(ParallelDims(cp=size, ulysses=ulysses), "cpu")
    bounds = Bounds.whole(1, SEQ_LEN).with_ranges(ranges_for("zigzag", SEQ_LEN, rank, size))
    dtype = torch.bfloat16 if kv_dtype == "compute" else torch.float32
    q, k, v = (torch.randn(1, n, SEQ_LEN // size, DIM, dtype=dtype, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    attend = attention_over(mesh, "zigzag", None, scheme, head_chunk, comm_dtypes(kv_dtype, GRADIENTS.get(narrow, narrow)))
    with Sent(ulysses) as forward:
        out = attend(q, k, v, bounds)
    with Sent(ulysses) as backward:
        out.sum().backward()
    return forward.bytes, backward.bytes, forward.across, backward.across


def problem(cp: int, tokens: int, heads: tuple[int, int] = (32, 8), ranks_per_node: int = 8, dim: int = 128) -> SequenceProblem:
    topology = Topology(min(ranks_per_node, cp), cp)
    return SequenceProblem(*heads, dim, tokens, 1, 2, "bf16", topology, Rates.from_device(DEVICES["h100"]))


GRADIENTS: dict[Any, Any] = {False: "fp32", True: "compute"}
VOLUMES: list[Any] = [
    ("ring", 1, (4, 2), None, False),
    ("ring", 1, (4, 2), None, True),
    ("double_ring", 2, (4, 2), None, False),
    ("double_ring", 2, (4, 2), None, True),
    ("allgather_kv", 1, (4, 2), 1, False),
    ("allgather_kv", 1, (4, 2), 1, True),
    ("ulysses", 4, (8, 4), None, False),
    ("ulysses", 4, (8, 4), 1, False),
    ("ulysses", 4, (8, 2), 1, False),
    ("ulysses", 4, (7, 1), None, False),
    ("ulysses", 4, (7, 1), None, True),
    ("ring_x_ulysses", 2, (4, 2), None, False),
    ("ring_x_ulysses", 2, (4, 2), None, True),
    ("ring", 1, (4, 2), None, True, "bf16"),
    ("double_ring", 2, (4, 2), None, False, "bf16"),
    ("allgather_kv", 1, (4, 2), 1, "bf16", "bf16"),
    ("ulysses", 4, (8, 4), 1, "bf16", "bf16"),
    ("ulysses", 4, (7, 1), None, "bf16", "bf16"),
    ("ring_x_ulysses", 2, (4, 2), None, "bf16", "bf16"),
]


def test_volumes_are_those_of_the_engine() -> None:
    by_rank = run_distributed(_all_sent, 4)
    for i, (scheme, ulysses, heads, head_chunk, narrow, *kv_dtype) in enumerate(VOLUMES):
        given = replace(problem(4, SEQ_LEN // 4, heads, dim=DIM), gradient_dtype=GRADIENTS.get(narrow, narrow))
        given = replace(given, value_bytes=4, kv_bytes=2) if kv_dtype else given
        cost = scheme_cost(given, scheme, ulysses, head_chunk)
        if kv_dtype and scheme in ("ring", "double_ring", "allgather_kv"):
            assert 2 * cost.forward_bytes == scheme_cost(replace(given, kv_bytes=None), scheme, ulysses, head_chunk).forward_bytes
        # Ragged heads: ranks differ, the formula is their mean (rounded).
        assert sum(sent[i][0] for sent in by_rank) / 4 == pytest.approx(cost.forward_bytes, abs=1), VOLUMES[i]
        assert sum(sent[i][1] for sent in by_rank) / 4 == pytest.approx(cost.backward_bytes, abs=1), VOLUMES[i]
        if scheme == "double_ring":
            assert all(sent[i][2:] == cost.across for sent in by_rank), "the same through every rank's adapter"


def test_keys_are_sent_to_each_rank_that_reads_them_and_not_repeated() -> None:
    assert dealt_keys(32, 8, 4) == 8
    assert dealt_keys(28, 4, 8) == 8, "two ranks share each"
    assert dealt_keys(12, 6, 4) == 8, "two heads are cut in half"


def allowed(cp: int) -> list[tuple[SequenceScheme, int]]:
    hybrids: list[tuple[SequenceScheme, int]] = [("ring_x_ulysses", n) for n in (2, 4, 8, 16) if n < cp]
    doubles: list[tuple[SequenceScheme, int]] = [("double_ring", n) for n in (2, 4, 8, 16) if n < cp]
    return [("ring", 1), ("allgather_kv", 1), ("ulysses", cp), *hybrids, *doubles]


def test_where_everything_hides_memory_decides() -> None:
    choice = choose_scheme(problem(8, 131072), allowed(8))
    attention = sum(problem(8, 131072).attention_seconds())
    assert all(cost.exposed < 0.02 * attention for cost in choice.costs)
    assert choice.chosen.buffers == min(cost.buffers for cost in choice.costs)
    assert "with the smallest buffers" in choice.reasons[-1]


def test_short_shards_on_several_nodes_use_the_links_inside_a_node() -> None:
    single = choose_scheme(problem(32, 2048), [one for one in allowed(32) if one[0] != "double_ring"])
    assert single.chosen.scheme == "ring_x_ulysses" and single.chosen.ulysses in (2, 4, 8)
    choice = choose_scheme(problem(32, 2048), allowed(32))
    assert "spans nodes" in choice.reasons[0] and len(choice.reasons) == 2 + len(choice.costs)
    by_name = {cost.name: cost for cost in choice.costs}
    assert by_name["ring"].exposed > 5 * single.chosen.exposed
    assert choice.chosen.name == "double_ring (ring_inner 8)", "nearly as fast, in smaller buffers"
    near = single.chosen.exposed + 0.02 * sum(problem(32, 2048).attention_seconds())
    assert choice.chosen.exposed < near and choice.chosen.buffers < single.chosen.buffers / 2
    assert by_name["double_ring (ring_inner 8)"].exposed < by_name["ring"].exposed / 2, "each adapter carries a shard per turn"


def test_two_rings_pay_where_one_waits_for_the_network_and_not_inside_a_node() -> None:
    rings: list[tuple[SequenceScheme, int]] = [("ring", 1), ("double_ring", 8)]
    assert choose_scheme(problem(32, 4096, (32, 32)), rings).chosen.name == "double_ring (ring_inner 8)"
    assert choose_scheme(problem(8, 131072), [("ring", 1), ("double_ring", 4)]).chosen.name == "ring"


def test_without_overlap_all_communication_is_exposed() -> None:
    slow = problem(8, 4096)
    slow = replace(slow, rates=replace(slow.rates, overlap=False))
    for cost in choose_scheme(slow, allowed(8)).costs:
        assert cost.exposed == pytest.approx(cost.communication, rel=1e-9), cost.name


def test_stages_shrink_the_buffers_and_hide_what_travels() -> None:
    whole = scheme_cost(problem(8, 32768), "ulysses")
    staged = scheme_cost(problem(8, 32768), "ulysses", head_chunk=1)
    assert staged.buffers == pytest.approx(whole.buffers / 2, rel=0.01), "four stages, two of them at a time"
    assert staged.exposed < whole.exposed / 3
    assert (staged.forward_bytes, staged.backward_bytes) == (whole.forward_bytes, whole.backward_bytes)


def test_no_scheme_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sequence scheme"):
        choose_scheme(problem(8, 4096), [])
