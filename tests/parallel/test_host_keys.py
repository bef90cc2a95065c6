"""Keys and values in host memory: as many bytes there as they have, a chunk or two on the device, and every chunk read once per pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP, KEEP_ALL, KEEP_MIXER, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy, Split
from models.attention_plan import DEFAULT_LIMITS
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from parallel.comm_dtypes import AS_COMPUTED
from parallel.dims import ParallelDims
from parallel.host_keys import HostKeysAttention, is_stand_in, plan_chunk
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import keep_keys_in_host, split_sequence
from parallel.sequence import Layout, ranges_for, shard_batch
from tests.distributed import run_distributed
from tests.memory_mgmt.test_cost_schemes import Sent
from trainer.config import RunConfig
from trainer.step_trace import trace_request
from trainer.tracing import TraceRequest

TOKENS, CHUNK = 96, 20
CONFIG = ModelConfig(d_model=16, n_heads=4, n_kv_heads=2, layers=("full", "swa", "full"), window=16)
PARTS = LayerPolicy(Split(0.5, 0.5, 0), Split(0.3, 0.3, 0.4), Split(0.6, 0.4, 0), Split(0.25, 0.25, 0.5))
POLICIES = {
    "keep": (KEEP_ALL, 1),
    "mixer": (KEEP_MIXER, 1),
    "block": (RECOMPUTE_BLOCK, 1),
    "groups": (RECOMPUTE_BLOCK, 2),
    "swap": (LayerPolicy(SWAP, SWAP, SWAP, SWAP), 1),
    "parts": (PARTS, 1),
    "projections again": (LayerPolicy(KEEP, RECOMPUTE, KEEP, KEEP), 1),
}


def _batch() -> Batch:
    ids = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    bounds = Bounds(TOKENS, ((0, TOKENS),), ((0, 50), (0,)))
    return Batch(ids, ids.roll(-1, 1), torch.arange(TOKENS).expand(2, TOKENS), bounds)


def _trained(
    policy: LayerPolicy | None, group_blocks: int, store: HostStore | None, mesh: Mesh | None = None, layout: Layout = "contiguous"
) -> list[torch.Tensor]:
    """[loss per token, gradients of all parameters] of this rank's part of the batch; a second pass equals the first."""
    model = Transformer(CONFIG, 64).to(torch.float64)
    init_weights(model, 0)
    if policy is not None:
        apply_policy(model, Policy((policy,) * 3, group_blocks=group_blocks, ffn_tile_tokens=24), store)
    if mesh is not None:
        split_sequence(model, mesh, layout)
    if store is not None:
        keep_keys_in_host(model, mesh, layout, store, CHUNK, AS_COMPUTED)
    batch = shard_batch(_batch(), layout, *((mesh.cp_rank, mesh.dims.cp) if mesh else (0, 1)))
    found = []
    for _ in range(2):
        model.zero_grad()
        nll = model(batch)
        nll.sum().backward()
        found.append([nll.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return found[0]


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_model_learns_the_same_under_every_policy(name: str) -> None:
    policy, group_blocks = POLICIES[name]
    store = HostStore("cpu")
    found = _trained(policy, group_blocks, store)
    for got, wanted in zip(found, _trained(None, 1, None), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert store.peak_bytes > 0 and store.used_bytes == 0, "everything is given back"


def test_device_holds_no_keys_between_the_passes_and_reads_each_once_per_pass() -> None:
    store = HostStore("cpu")
    q, k, v = (torch.randn(2, n, TOKENS, 8, requires_grad=True) for n in (4, 2, 2))
    attention, bounds = HostKeysAttention(None, "contiguous", None, store, CHUNK), Bounds.whole(2, TOKENS)
    kept: list[torch.Tensor] = []
    k_in_host, v_in_host = attention.leave(k, v, bounds)
    assert is_stand_in(k_in_host) and k_in_host.untyped_storage().nbytes() <= 8, "a stand-in holds nothing"
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attention(q, k_in_host, v_in_host, bounds)
    assert sorted(x.shape[-1] for x in kept) == [8, 8, TOKENS], "queries, output and log-sum-exp"
    keys = 2 * k.numel() * 4
    assert store.used_bytes == keys and store.copied_bytes == (keys, keys)
    out.sum().backward()
    assert store.copied_bytes == (keys, 2 * keys)
    del out, k_in_host, v_in_host
    kept.clear()
    assert store.used_bytes == 0


def test_chunks_that_nobody_sees_are_not_passed_on() -> None:
    held = [ranges_for("contiguous", 48, rank, 4) for rank in range(4)]
    bounds = Bounds(48, held[0], ((0, 6, 12, 24),))
    hops = [len(plan_chunk(held, 0, span, bounds, None, DEFAULT_LIMITS).hops) for span in ((0, 6), (6, 12))]
    assert hops == [2, 2], "tokens 24 to 36 are seen by the rank after theirs; no document is longer"
    ended = Bounds(48, held[0], ((0, 6, 12, 24, 30, 36),))
    assert [len(plan_chunk(held, 0, span, ended, None, DEFAULT_LIMITS).hops) for span in ((0, 6), (6, 12))] == [1, 1]


def _on_ranks() -> tuple[list, list, tuple[int, int]]:
    """Gradients of two ranks with keys in host memory and without; bytes that one attention sends, forward and backward."""
    mesh = build_mesh(ParallelDims(cp=2), "cpu")
    store = HostStore("cpu")
    inside = [_trained(RECOMPUTE_BLOCK, 1, store, mesh, "zigzag"), _trained(None, 1, None, mesh, "zigzag")]
    bounds = Bounds.whole(1, TOKENS).with_ranges(ranges_for("zigzag", TOKENS, dist.get_rank(), 2))
    q, k, v = (torch.randn(1, n, TOKENS // 2, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
    attention = HostKeysAttention(mesh.cp_group, "zigzag", None, store, CHUNK)
    with Sent() as forward:
        out = attention(q, k, v, bounds)
    with Sent() as backward:
        out.sum().backward()
    return *inside, (forward.bytes, backward.bytes)  # type: ignore[return-value]


def test_two_ranks_learn_the_same_and_send_as_much_as_the_ring() -> None:
    for in_host, on_device, sent in run_distributed(_on_ranks, 2):
        for got, wanted in zip(in_host, on_device, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        keys = 2 * (TOKENS // 2) * 2 * 8
        assert sent == (keys * 2, keys * (2 + 4))


def _config(**parallel: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "layers": ["full"] * 4},
            "data": {"seq_len": 1024},
            "memory": {"loss_tile_tokens": 64},
            "parallel": parallel,
        }
    )


def test_the_traced_plan_counts_them_in_host_memory() -> None:
    traces = [
        trace_request(TraceRequest(cfg, 320, "cpu", None, threads=1, whole=True).to_dict())
        for cfg in (_config(), _config(kv_residence="host", kv_chunk=128))
    ]
    of_layer = 2 * 1024 * 64 * 4
    assert traces[0].peak("host")[0] == 0 and traces[1].peak("host")[0] == 4 * of_layer
    saved = traces[0].peak("device")[0] - traces[1].peak("device")[0]
    assert saved > 2.5 * of_layer, "keys of the layers that wait, and the wide gradients of one"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"parallel": {"kv_chunk": 64}}, "parallel.kv_chunk 64 is a chunk of what parallel.kv_residence host"),
        ({"parallel": {"kv_residence": "host", "sequence": "ulysses"}}, "set parallel.sequence=ring, or parallel.kv_residence=device"),
        ({"parallel": {"kv_residence": "host", "sequence": "auto"}}, "set parallel.sequence=ring, or parallel.kv_residence=device"),
        ({"parallel": {"kv_residence": "host"}, "model": {"layers": ["swa"]}}, "full attention, and model.layers has none"),
        ({"parallel": {"kv_residence": "host"}, "engine": "deepspeed"}, "set parallel.kv_residence device, or engine native"),
        (
            {"parallel": {"kv_residence": "host"}, "model": {"layers": ["full"], "memory": {"kind": "rmt"}}},
            "only been shown with layers read once per sequence",
        ),
        ({"parallel": {"kv_residence": "host"}, "memory": {"recompute": "auto"}}, "memory.recompute none, mixer or block"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RunConfig.model_validate({"model": {"layers": ["full"]}, **settings})
