"""Policies on ranks: the gradients of one process, under every layout and scheme."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP_MIXER, RECOMPUTE_BLOCK, Policy
from models.batch import Batch, Bounds
from models.transformer import Transformer
from parallel.config import ParallelConfig
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh
from parallel.parallelize import parallelize
from parallel.sequence import shard_batch
from tests.distributed import run_on_kept_ranks as run_distributed
from tests.memory_mgmt.test_execution import PARTS, SWAP_ALL, TOKENS, VOCAB, assert_same, config_of, fill, gradients, make, make_batch


def ranks_gradients(config, policy, layout, cp, dp_shard, micro_batches, bf16, scheme="ring", head_chunk=None, memory="states"):
    """Losses and whole gradients of a model that is split over sequence and FSDP2 ranks."""
    degrees = ParallelConfig(cp=cp, dp_shard=dp_shard, sequence=scheme, head_chunk=head_chunk)
    mesh = build_mesh(ParallelDims.from_config(degrees, dist.get_world_size()), "cpu")
    store = HostStore("cpu")
    model = Transformer(config, VOCAB).to(torch.float32 if bf16 else torch.float64)
    if policy is not None:
        apply_policy(model, policy, store)
    parallelize(model, mesh, layout, scheme, head_chunk, memory=memory)
    fill(model)
    for i in range(micro_batches):
        batch = make_batch(i)
        if dp_shard > 1:
            mine = slice(mesh.dp_rank, mesh.dp_rank + 1)
            bounds = Bounds(TOKENS, batch.bounds.ranges, batch.bounds.documents[mine])
            batch = Batch(batch.tokens_BT[mine], batch.labels_BT[mine], batch.positions_BT[mine], bounds)
        if cp > 1:
            batch = shard_batch(batch, layout, mesh.cp_rank, cp)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            nll = model(batch)
        nll.sum().backward()
    assert store.used_bytes == 0
    return [p.grad.full_tensor().detach() for p in model.parameters()]


RANK_POLICIES = [
    Policy((RECOMPUTE_BLOCK,) * 3),
    Policy((KEEP_MIXER, PARTS, SWAP_ALL), ffn_tile_tokens=20, memory_tile_tokens=24),
    Policy((PARTS, KEEP_MIXER, RECOMPUTE_BLOCK), group_blocks=2),
]


@pytest.mark.parametrize(("layout", "cp", "dp_shard"), [("zigzag", 2, 1), ("contiguous", 2, 1), ("contiguous", 1, 2)])
@pytest.mark.parametrize("policy", RANK_POLICIES)
def test_same_gradients_on_ranks(policy, layout, cp, dp_shard):
    config = config_of("full", "swa", "memory", n_layers=3)
    want = gradients(make(config), batches=2)[2:]
    for got in run_distributed(ranks_gradients, 2, config, policy, layout, cp, dp_shard, 2, False):
        assert_same(got, want, 1e-12)


@pytest.mark.parametrize(("scheme", "head_chunk"), [("ulysses", 1), ("allgather_kv", 1)])
@pytest.mark.parametrize("layer", [KEEP_MIXER, PARTS, SWAP_ALL, RECOMPUTE_BLOCK])
def test_same_gradients_under_every_scheme(layer, scheme, head_chunk):
    config = config_of("full", n_layers=2)
    want = gradients(make(config))[1:]
    got = run_distributed(ranks_gradients, 2, config, Policy((layer,) * 2), "zigzag", 2, 1, 1, False, scheme, head_chunk)
    for one in got:
        assert_same(one, want, 1e-12)


def by_every_exchange(config):
    """Gradients under two policies by every exchange, the last ones in bf16."""
    runs = [(exchange, number, False) for exchange in ("ring", "ulysses") for number in (0, 1)]
    runs += [(exchange, 1, True) for exchange in ("states", "ring", "ulysses")]
    return {
        (exchange, number, bf16): ranks_gradients(config, RANK_POLICIES[number], "zigzag", 2, 1, 1, bf16, memory=exchange)
        for exchange, number, bf16 in runs
    }


def test_same_gradients_by_every_memory_exchange():
    config = config_of("full", "swa", "memory", n_layers=3)
    want = gradients(make(config))[1:]
    for of_rank in run_distributed(by_every_exchange, 2, config):
        errors = {}
        for (exchange, _, bf16), got in of_rank.items():
            if bf16:
                errors[exchange] = sum(float((g.double() - w).square().sum()) for g, w in zip(got, want, strict=True))
            else:
                assert_same(got, want, 1e-12)
        assert max(errors.values()) < 1.5 * errors["states"] < 0.01 * sum(float(w.square().sum()) for w in want), errors


def test_bf16_on_ranks_gives_the_same_bits_as_the_plain_model_on_ranks():
    config = config_of("full", "swa", "memory", n_layers=3)
    args = (config, RANK_POLICIES[0], "zigzag", 2, 1, 1, True)
    plain = (config, None, *args[2:])
    for got, want in zip(run_distributed(ranks_gradients, 2, *args), run_distributed(ranks_gradients, 2, *plain), strict=True):
        assert_same(got, want, 0)


def replicas_gradients(config, policies):
    """Gradients under torch's DistributedDataParallel, which ends with an error where a weight's gradient arrives twice; by policy."""
    found, rank = [], dist.get_rank()
    for policy in policies:
        store, model = HostStore("cpu"), make(config)
        apply_policy(model, policy, store)
        whole = make_batch(0)
        mine = slice(rank, rank + 1)
        bounds = Bounds(TOKENS, whole.bounds.ranges, whole.bounds.documents[mine])
        replica = DistributedDataParallel(model)
        replica(Batch(whole.tokens_BT[mine], whole.labels_BT[mine], whole.positions_BT[mine], bounds)).sum().backward()
        assert store.used_bytes == 0
        found.append([p.grad.detach() * dist.get_world_size() for p in model.parameters()])  # it averages
    return found


def test_weight_gradients_are_reduced_once_between_replicas_too():
    config = config_of("full", "swa", "memory", n_layers=3)
    want = gradients(make(config), batches=1)[1:]
    for got in run_distributed(replicas_gradients, 2, config, RANK_POLICIES):
        for one in got:
            assert_same(one, want, 1e-12)
