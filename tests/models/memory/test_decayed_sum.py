"""The chunked op against autograd through the plain recurrence, float64."""

import pytest
import torch

from models.memory.decayed_sum import decayed_sum


def recurrence(q, k, v, beta, log_decay, state, segment):
    """Token by token on the same chunked tensors, rows x heads flattened."""
    N, G, C, _ = v.shape
    q, k = (z.repeat_interleave(G // z.shape[1], 1) for z in (q, k))
    outputs, S = [], state
    for n in range(N):
        for t in range(C):
            if segment is not None:
                fresh = segment[n, :, t] != (segment[n, :, t - 1] if t else torch.zeros_like(segment[n, :, 0]))
                S = torch.where(fresh.repeat_interleave(G // len(fresh))[:, None, None], torch.zeros_like(S), S)
            S = log_decay[n, :, t, None, None].exp() * S
            S = S + beta[n, :, t, None, None] * k[n, :, t, :, None] * v[n, :, t, None, :]
            outputs.append((S.mT @ q[n, :, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1).view(G, N, C, -1).transpose(0, 1), S


def make(groups, N=3, B=2, H=2, C=8, K=5, V=6, segments=False, dtype=torch.float64):
    torch.manual_seed(0)
    G, Q = B * H, B * groups
    inputs = [torch.randn(N, Q, C, K), torch.randn(N, Q, C, K), torch.randn(N, G, C, V), torch.rand(N, G, C), -torch.rand(N, G, C) * 0.2]
    inputs = [x.to(dtype).requires_grad_() for x in (*inputs, torch.randn(G, K, V))]
    segment = None
    if segments:
        starts = torch.zeros(N, B, C, dtype=torch.int64)
        starts[0, 0, 3] = starts[1, 0, 0] = starts[1, 1, 7] = starts[2, 1, 1] = starts[2, 1, 2] = 1
        segment = starts.cumsum(-1)
    return inputs, segment


@pytest.mark.parametrize("C", [1, 8, 24])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("queries", [True, False])
def test_equals_the_recurrence_forward_and_backward(C, groups, segments, queries):
    if segments and C < 8:
        pytest.skip("the document starts of this test need chunks of 8")
    inputs, segment = make(groups, C=C, segments=segments)
    got, want = decayed_sum(inputs[0] if queries else None, *inputs[1:], segment), recurrence(*inputs, segment)
    if not queries:
        assert got[0] is None
        got, want, inputs = got[1:], want[1:], inputs[1:]
    weights = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), inputs) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_very_strong_decay_gives_no_nan():
    inputs, segment = make(1, dtype=torch.float32, segments=True)
    with torch.no_grad():
        inputs[4].mul_(1e4)
    o, S = decayed_sum(*inputs, segment)
    (o.sum() + S.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (o, S, *(x.grad for x in inputs)))
