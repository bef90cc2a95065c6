"""Offloaded optimizer states: the same bits as the plain optimizer, whatever the buckets, and no copy before its turn."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_mgmt.host_memory import HostMemory, in_slabs, rounded
from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_buckets import ALIGNMENT, bucket_width, cut, starts
from memory_mgmt.optimizer_offload import OffloadedOptimizer, section_of
from models.errors import UserError
from optim.build import allocate_states
from tests.memory_mgmt.test_offload_streams import LateCopies

SIZES = st.lists(st.integers(0, 700), min_size=1, max_size=9)


@given(SIZES, st.integers(ALIGNMENT, 900))
def test_every_element_is_in_one_bucket(sizes, most):
    buckets, begins = cut(sizes, most), starts(sizes)
    seen = [[] for _ in sizes]
    for bucket in buckets:
        assert bucket.stop - bucket.start <= most and bucket.start % ALIGNMENT == 0
        for piece in bucket.pieces:
            assert bucket.start + piece.at == begins[piece.parameter] + piece.start
            assert piece.at >= 0 and bucket.start + piece.at + piece.stop - piece.start <= bucket.stop
            seen[piece.parameter].append((piece.start, piece.stop, piece.last))
    for size, pieces in zip(sizes, seen, strict=True):
        assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces[:-1])] and pieces[-1][1] == size
        assert [last for _, _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(buckets) == max(1, -(-begins[-1] // max(ALIGNMENT, bucket_width(begins[-1], most))))


def test_a_bucket_below_the_alignment_is_refused():
    with pytest.raises(ValueError, match="64 are the least"):
        cut([100], 63)


@given(st.lists(st.integers(0, 500), max_size=12))
def test_slabs_hold_whole_blocks(sizes):
    groups = in_slabs(sizes, 640)
    assert [size for group in groups for size in group] == sizes
    assert all(len(group) == 1 or sum(map(rounded, group)) <= 640 for group in groups)


def test_what_is_kept_wastes_nothing_and_leaves_the_rest_to_others():
    memory = HostMemory(10 * 64)
    first, second = memory.take_whole([64, 129])
    assert memory.used_bytes == 193 and memory.reserved_bytes == memory.peak_bytes + 63 == 4 * 64
    assert memory.take_whole([7 * 64]) is None and memory.reserved_bytes == 4 * 64
    assert memory.take(6 * 64) is not None and memory.take(1) is None
    first.pieces[0].fill_(1)
    second.pieces[0].fill_(2)
    assert first.pieces[0].eq(1).all() and [piece.numel() for piece in (*first.pieces, *second.pieces)] == [64, 129]
    memory.give(second)
    assert memory.take(3 * 64) is not None


# --- the update -----------------------------------------------------------------------------------------------------------------

SHAPES = {
    "embed.weight": (50, 16),
    "blocks.0.a.weight": (33, 17),
    "blocks.0.norm.weight": (17,),
    "blocks.1.a.weight": (33, 17),
    "blocks.1.empty": (0, 17),
    "head.weight": (300, 3),
}
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "adamw with the maximum": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True, foreach=True),
    "one group has other states": lambda groups: torch.optim.Adam([groups[0], {**groups[1], "amsgrad": True}], lr=1e-3),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "without states": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, centered=True),
}


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def groups_of(named):
    vectors = [p for p in named.values() if p.dim() == 1]
    matrices = [p for p in named.values() if p.dim() > 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train(optimizer, named, steps=5):
    """Gradients of a fixed seed; in some steps a parameter has none."""
    torch.manual_seed(1)
    for step in range(steps):
        for i, parameter in enumerate(named.values()):
            gradient = torch.randn_like(parameter)
            parameter.grad = None if step == i else gradient
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def same(plain, offloaded, states, host_states):
    for name in plain:
        assert torch.equal(plain[name], offloaded[name]), name
        ours, theirs = host_states[offloaded[name]], states[plain[name]]
        assert set(ours) == set(theirs)
        for key in theirs:
            ok = torch.equal(ours[key], theirs[key]) if isinstance(theirs[key], torch.Tensor) else ours[key] == theirs[key]
            assert ok, (name, key)
            if isinstance(theirs[key], torch.Tensor):
                assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape


@pytest.mark.parametrize("bucket_bytes", [600, 5000, 1 << 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits_as_the_plain_optimizer(name, bucket_bytes):
    ours, theirs = parameters(), parameters()
    plain = OPTIMIZERS[name](groups_of(theirs))
    allocate_states(plain)
    with HostStore("cpu") as store:
        offloaded = OffloadedOptimizer(OPTIMIZERS[name](groups_of(ours)), ours, store, bucket_bytes)
        same(theirs, ours, plain.state, offloaded.state)
        train(plain, theirs)
        train(offloaded, ours)
        same(theirs, ours, plain.state, offloaded.state)
        assert not torch.equal(ours["head.weight"], parameters()["head.weight"])
        moved = sum(2 * v.numel() * v.element_size() for s in offloaded.state.values() for v in s.values() if v.dim())
        assert sum(store.copied_bytes) >= 5 * moved and store.used_bytes >= moved // 2 and not offloaded._inner.state
        assert bool(moved) == (name != "without states")


def test_double_precision_and_two_dtypes():
    def mixed():
        named = parameters(torch.float64)
        return named | {"blocks.0.narrow": torch.nn.Parameter(torch.randn(70, 3, generator=torch.Generator().manual_seed(3)))}

    ours, theirs = mixed(), mixed()
    plain = OPTIMIZERS["adamw"](groups_of(theirs))
    allocate_states(plain)
    offloaded = OffloadedOptimizer(OPTIMIZERS["adamw"](groups_of(ours)), ours, HostStore("cpu"), 2000)
    train(plain, theirs)
    train(offloaded, ours)
    same(theirs, ours, plain.state, offloaded.state)


def test_copies_as_late_as_allowed():
    """On streams that run only when somebody waits, and on memory that they do not keep alive, a missing wait gives other bits."""
    ours, theirs = parameters(), parameters()
    early, late = HostStore("cpu"), HostStore("cpu")
    late._plain = LateCopies()
    one = OffloadedOptimizer(OPTIMIZERS["adamw"](groups_of(theirs)), theirs, early, 700)
    other = OffloadedOptimizer(OPTIMIZERS["adamw"](groups_of(ours)), ours, late, 700)
    assert len(other._loads) > 6
    for _ in range(3):
        train(one, theirs, steps=1)
        train(other, ours, steps=1)
        gc.collect()
    same(theirs, ours, one.state, other.state)


def test_two_buckets_are_under_way_and_no_more():
    """The next bucket's copy is asked for before the present one's update; its buffer is left before it is overwritten."""
    named, store, log = parameters(), HostStore("cpu"), []

    class Watched(LateCopies):
        def to_device(self, pieces, target, after):
            log.append(("in", target.untyped_storage().data_ptr(), after))
            return super().to_device(pieces, target, after)

        def to_host(self, source, pieces):
            event = super().to_host(source, pieces)
            log.append(("out", source.untyped_storage().data_ptr(), event))
            return event

    store._plain = Watched()
    optimizer = OffloadedOptimizer(OPTIMIZERS["adamw"](groups_of(named)), named, store, 1500)
    train(optimizer, named, steps=1)
    buckets = len(optimizer._loads)
    assert [what for what, _, _ in log] == ["in", *["in", "out"] * (buckets - 1), "out"] and buckets > 4
    incoming, outgoing = [e for e in log if e[0] == "in"], [e for e in log if e[0] == "out"]
    assert len({place for _, place, _ in log}) == 2
    assert [e[1] for e in incoming] == [e[1] for e in outgoing]
    assert [e[2] for e in incoming] == [None, None, *(e[2] for e in outgoing[:-2])]


def test_the_budget_is_shared_with_activations():
    named = parameters()
    needed = 2 * 4 * sum(rounded(p.numel()) for p in named.values())
    with HostStore("cpu", needed) as store:
        OffloadedOptimizer(OPTIMIZERS["adamw"](groups_of(named)), named, store)
        with pytest.raises(UserError, match=r"memory\.host_gib"):
            store.park(torch.zeros(needed // 8), 0)
    with HostStore("cpu", needed // 2) as store, pytest.raises(UserError, match="memory.offload_optimizer=none"):
        OffloadedOptimizer(OPTIMIZERS["adamw"](groups_of(named)), named, store)


def test_what_cannot_be_flattened_is_refused():
    named = {"head.weight": torch.nn.Parameter(torch.randn(4, 5).t())}
    with pytest.raises(ValueError, match=r"'head\.weight'.*not contiguous"):
        OffloadedOptimizer(torch.optim.AdamW(named.values()), named, HostStore("cpu"))


def test_sections():
    assert [section_of(name) for name in ("blocks.3.ffn.w_up.weight", "head.weight", "norm", "")] == ["blocks.3", "head", "norm", ""]
