"""Keys and values that travel in fewer bits: the same under every memory policy, and half the bytes where they wait."""

from __future__ import annotations

import pytest
import torch

from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP_MIXER, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy, Split
from models.attention import attention_reference
from models.batch import Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from parallel.comm_dtypes import comm_dtypes, round_where_alone
from parallel.host_keys import HostKeysAttention
from tests.parallel.test_host_keys import TOKENS, _batch

BF16 = comm_dtypes("bf16", "fp32")
POLICIES = {
    "mixer": KEEP_MIXER,
    "block": RECOMPUTE_BLOCK,
    "swap": LayerPolicy(SWAP, SWAP, SWAP, SWAP),
    "parts": LayerPolicy(Split(0.5, 0.5, 0), Split(0.3, 0.3, 0.4), Split(0.6, 0.4, 0), Split(0.25, 0.25, 0.5)),
    "projections": LayerPolicy(SWAP, RECOMPUTE, SWAP, RECOMPUTE),
}


def _gradients(policy: LayerPolicy | None, rounded: bool = True) -> list[torch.Tensor]:
    model = Transformer(ModelConfig(d_model=16, n_heads=4, n_kv_heads=2, layers=("full", "swa"), window=16), 64).to(torch.float64)
    init_weights(model, 0)
    store = HostStore("cpu")
    if policy is not None:
        apply_policy(model, Policy((policy,) * 2), store)
    if rounded:
        round_where_alone(model, BF16)
    model(_batch()).sum().backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_keep_what_was_made_and_round_it_again(name: str) -> None:
    for got, wanted in zip(_gradients(POLICIES[name]), _gradients(None), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_at_the_rounded_keys_and_not_rounded() -> None:
    plain, rounded = _gradients(None, rounded=False), _gradients(None)
    assert all(0 < float((a - b).norm() / a.norm()) < 1e-2 for a, b in zip(plain, rounded, strict=True))


def test_keys_in_host_memory_take_half_the_room() -> None:
    used = []
    for comm in (comm_dtypes("compute", "fp32"), BF16):
        store = HostStore("cpu")
        q, k, v = (torch.randn(2, n, TOKENS, 8, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (4, 2, 2))
        out = HostKeysAttention(None, "contiguous", None, store, 20, comm=comm)(q, k, v, Bounds.whole(2, TOKENS))
        used.append(store.used_bytes)
    assert used[0] == 2 * used[1] == 4 * (k.numel() + v.numel())
    wanted = attention_reference(q.double(), k.bfloat16().double(), v.bfloat16().double(), [(0,), (0,)], None)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)
