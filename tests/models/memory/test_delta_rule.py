"""The chunked op against autograd through the plain recurrence, float64."""

import pytest
import torch

from models.memory.delta_rule import gated_delta_rule, invert_unit_lower


def recurrence(q, k, v, beta, log_decay, state, segment):
    """Token by token on the same chunked tensors, rows x heads flattened."""
    N, G, C, _ = q.shape
    outputs = []
    S = state
    width = state.shape[-1] - v.shape[-1]
    v = torch.nn.functional.pad(v, (0, width))
    for n in range(N):
        for t in range(C):
            if segment is not None:
                fresh = segment[n, :, t] != (segment[n, :, t - 1] if t else torch.zeros_like(segment[n, :, 0]))
                heads = G // segment.shape[1]
                S = torch.where(fresh.repeat_interleave(heads)[:, None, None], torch.zeros_like(S), S)
            S = log_decay[n, :, t, None, None].exp() * S
            error = v[n, :, t] - (S.mT @ k[n, :, t, :, None]).squeeze(-1)
            S = S + beta[n, :, t, None, None] * k[n, :, t, :, None] * error[:, None, :]
            outputs.append((S.mT @ q[n, :, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1).view(G, N, C, -1).transpose(0, 1), S


def make(N=3, G=4, C=8, K=5, V=6, W=6, segments=False, dtype=torch.float64):
    torch.manual_seed(0)
    norm = torch.nn.functional.normalize
    q, k = (norm(torch.randn(N, G, C, K, dtype=torch.float64), dim=-1) for _ in range(2))
    inputs = [q, k, torch.randn(N, G, C, V), torch.rand(N, G, C), -torch.rand(N, G, C) * 0.2, torch.randn(G, K, W)]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    segment = None
    if segments:
        starts = torch.zeros(N, 2, C, dtype=torch.int64)
        starts[0, 0, 3] = starts[1, 0, 0] = starts[1, 1, 7] = starts[2, 1, 1] = starts[2, 1, 2] = 1
        segment = starts.cumsum(-1)
    return inputs, segment


@pytest.mark.parametrize("C", [1, 8, 12, 32, 64])
@pytest.mark.parametrize("W", [6, 11])
@pytest.mark.parametrize("segments", [False, True])
def test_equals_the_recurrence_forward_and_backward(C, W, segments):
    if segments and C < 8:
        pytest.skip("the document starts of this test need chunks of 8")
    inputs, segment = make(C=C, W=W, segments=segments)
    got, want = gated_delta_rule(*inputs, segment), recurrence(*inputs, segment)
    weights = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), inputs) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_extra_columns_return_transition_and_readout():
    inputs, _ = make(W=6)
    zeros, eye = torch.zeros(4, 5, 6, dtype=torch.float64), torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    o, S = gated_delta_rule(*inputs)
    o2, S2 = gated_delta_rule(*inputs[:5], torch.cat([zeros, eye], -1))
    torch.testing.assert_close(S2[..., :6] + S2[..., 6:] @ inputs[5], S, rtol=0, atol=1e-12)
    torch.testing.assert_close(o2[..., :6] + o2[..., 6:] @ inputs[5], o, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 16, 48, 64, 128])
def test_inverse_of_repeated_keys_keeps_its_digits_in_float32(size):
    lower = torch.ones(2, 1, size, size).tril(-1)  # all keys equal, beta 1: the worst case for a Neumann series
    got = invert_unit_lower(lower)
    want = torch.linalg.inv((lower + torch.eye(size)).double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_very_strong_decay_gives_no_nan():
    inputs, segment = make(dtype=torch.float32, segments=True)
    with torch.no_grad():
        inputs[4].mul_(1e4)
    o, S = gated_delta_rule(*inputs, segment)
    (o.sum() + S.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (o, S, *(x.grad for x in inputs)))
