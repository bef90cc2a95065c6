"""Titans beyond the conformance suite: variants against the token recurrence, what TNT's periods and the settings mean, stability."""

import pytest
import torch
from pydantic import ValidationError

from models.batch import Bounds
from models.config import MemoryModuleConfig, TitansConfig
from models.memory.chunk_plan import plan_chunks, share_of
from models.memory.fast_weights import FastNetwork, error_of, outer_sums
from tests.models.memory.conformance_cases import B, D, T, make, make_x, whole

VARIANTS = {
    "yaad": {"variant": "yaad", "residual_norm": True},
    "moneta": {"variant": "moneta"},
    "moneta, linear": {"variant": "moneta", "network": "linear"},
    "linear": {"network": "linear"},
    "swiglu": {"network": "swiglu"},
    "yaad, token": {"variant": "yaad", "network": "linear", "read": "token"},
    "moneta, shifted": {"variant": "moneta", "read": "shifted"},
    "lact, shifted, reset": {"variant": "lact", "read": "shifted", "reset_every": 16},
    "lact, mlp, norm, reset": {"variant": "lact", "network": "mlp", "residual_norm": True, "reset_every": 16},
}


def titans(**settings):
    return make("titans", expand_v=1.0, titans=TitansConfig(**{"chunk_size": 8, "expansion": 1.5, **settings}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_their_token_recurrence(name, packed):
    module, bounds = titans(**VARIANTS[name]), whole(packed=packed)
    with torch.no_grad():
        for start in (module.start_in, getattr(module, "start_out", None)):
            if start is not None and start.abs().max() == 0:
                start.normal_(generator=torch.Generator().manual_seed(5))
        state = module(make_x(9), None, whole(9))[1]
    weight = torch.randn(B, T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for forward in (module, module.oracle):
        x = make_x().requires_grad_()
        y, after = forward(x, state, bounds)
        loss = (y * weight).sum() + after["state"].square().sum()
        wanted = [x, *module.parameters()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        grads = [torch.zeros_like(z) if g is None else g for z, g in zip(wanted, found, strict=True)]
        results.append([y, *(after[key] for key in sorted(after)), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_reads_see_of_their_chunk_what_they_are_named_for():
    """Where a change of token 3 is read without convolution, in chunks of 8 (itself changes by its query); at chunk size 1 both are one."""
    seen = {}
    for read in ("chunk_start", "token", "shifted"):
        module = make("titans", conv_kernel=1, titans=TitansConfig(network="linear", chunk_size=8, read=read))
        changed = make_x()
        changed[:, 3] += 1.0
        moved = (module(make_x(), None, whole())[0] - module(changed, None, whole())[0]).abs().amax((0, 2)) > 0
        seen[read] = moved[:9].nonzero().flatten().tolist()
    assert seen == {"chunk_start": [3, 8], "token": [3, 4, 5, 6, 7, 8], "shifted": [3, 7, 8]}
    alone = [
        make("titans", titans=TitansConfig(network="linear", chunk_size=1, read=read))(make_x(), None, whole(packed=True))[0]
        for read in ("token", "shifted")
    ]
    torch.testing.assert_close(*alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp", "swiglu"])
def test_written_out_inner_gradients_equal_autograd(kind, residual):
    network = FastNetwork(kind, 5, 5, 0 if kind == "linear" else 7, residual)
    W, k, v, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, network.size), (3, 4, 5), (3, 4, 5), (3, 4)))
    W.requires_grad_()
    (want,) = torch.autograd.grad((0.5 * (network(W, k) - v).square().sum(-1) * weight).sum(), W)
    torch.testing.assert_close(outer_sums(network.gradient(W, k, error_of("squares", v, None)), weight), want, rtol=1e-11, atol=1e-11)


def test_periods_are_independent_streams_worked_on_side_by_side():
    bounds = Bounds(40, ((0, 40),), ((0,), (0, 20)))
    chunks = plan_chunks(bounds, (0, 40), 4, 8)
    assert chunks.n_steps == 2  # instead of 10 in order
    assert chunks.row_S.tolist() == [0] * 5 + [1] * 6 and chunks.last_stream_B.tolist() == [4, 10]
    module, x = make("titans", titans=TitansConfig(chunk_size=4, expansion=1.5, reset_every=8)), make_x(40)
    y, _ = module(x, None, bounds)
    changed = x.clone()
    changed[:, 24 - 3] += 1.0  # reaches the next period through the convolution only
    other, _ = module(changed, None, bounds)
    assert not torch.equal(y[0, 23], other[0, 23])
    assert torch.equal(y[:, 27 + 5 :], other[:, 27 + 5 :])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_token_of_a_chunk_is_worked_on_by_one_rank(size):
    bounds = Bounds(24, ((0, 24),), ((0, 3, 11), (0,)))
    chunks = plan_chunks(bounds, (0, 24), 5)
    held = [((r * 24 // size, (r + 1) * 24 // size),) for r in range(size)]
    shares = [share_of(chunks, held, rank, torch.device("cpu")) for rank in range(size)]
    assert sum(int(share.mask_NSp.sum()) for share in shares) == 2 * 24
    assert sum(int(share.first_NSp.sum()) for share in shares) == len(chunks.start_c)
    for rank, share in enumerate(shares):
        assert sorted(share.give_T.tolist()) == list(range(2 * 24 // size))
        assert [shares[other].taken[rank] for other in range(size)] == list(share.given)


def test_equal_keys_are_learnt_stably_at_the_default_rate():
    """A text of one token, 1024 times: the sum of a chunk's rates stays below what diverges."""
    for settings in ({"network": "linear"}, {}, {"variant": "yaad"}, {"variant": "moneta"}, {"variant": "lact"}):
        module = make("titans", torch.float32, slow=False, titans=TitansConfig(chunk_size=64, **settings))
        module.w_rates.weight.data.zero_()  # initial gates, which training starts from
        x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(7)).expand(1, 1024, D)
        y, state = module(x, None, Bounds.whole(1, 1024))
        assert y.isfinite().all() and state["state"].abs().max() < 100, settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"kind": "titans", "chunk_size": 32},
            "leave it at 64 or set memory.titans.chunk_size",
        ),
        ({"kind": "gated_deltanet", "titans": {"chunk_size": 32}}, "memory.titans is read by memory.kind titans, not by gated_deltanet"),
        ({"kind": "titans", "titans": {"reset_every": 96}}, "reset_every 96 is not a multiple of chunk_size 64"),
        ({"kind": "titans", "titans": {"network": "linear", "residual_norm": True}}, "residual_norm needs network mlp or swiglu"),
        ({"kind": "titans", "expand_v": 2.0, "titans": {"residual_norm": True}}, "needs equal key and value sizes"),
        ({"kind": "titans", "titans": {"read": "token"}}, "exact for a linear memory only, and the network is mlp; set network linear"),
        (
            {"kind": "titans", "titans": {"read": "token", "network": "linear", "variant": "moneta"}},
            "read token needs variant titans or yaad",
        ),
        ({"kind": "titans", "titans": {"read": "token", "network": "linear", "chunk_size": 2048}}, "at most 1024, and chunk_size is 2048"),
        ({"kind": "titans", "attach": "mac", "titans": {"read": "shifted"}}, "read shifted is not known to memory.attach mac"),
    ],
)
def test_settings_that_are_not_read_or_do_not_go_together_are_refused(settings, named):
    with pytest.raises(ValidationError, match=named):
        MemoryModuleConfig(**settings)
