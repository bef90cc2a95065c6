"""The chunked op against autograd through the plain recurrence, float64."""

import pytest
import torch

from models.memory.gated_slots import MIN_LOG_DECAY, gated_slots


def recurrence(q, k, v, log_decay, state, segment):
    """Token by token on the same chunked tensors, rows x heads flattened."""
    N, G, C, K = q.shape
    outputs, S = [], state
    for n in range(N):
        for t in range(C):
            if segment is not None:
                fresh = segment[n, :, t] != (segment[n, :, t - 1] if t else torch.zeros_like(segment[n, :, 0]))
                S = torch.where(fresh.repeat_interleave(G // len(fresh))[:, None, None], torch.zeros_like(S), S)
            a = log_decay[n, :, t].exp().unsqueeze(-1)
            S = a * S + (1 - a) * torch.cat([k[n, :, t], v[n, :, t]], -1).unsqueeze(-2)
            p = (S[..., :K] @ q[n, :, t, :, None]).squeeze(-1).softmax(-1)
            outputs.append((p.unsqueeze(-2) @ S[..., K:]).squeeze(-2))
    return torch.stack(outputs, 1).view(G, N, C, -1).transpose(0, 1), S


def make(N=3, B=2, H=2, C=8, K=5, V=6, M=7, segments=False, dtype=torch.float64, strength=0.2):
    torch.manual_seed(0)
    G = B * H
    log_decay = (-torch.rand(N, G, C, M) * strength).clamp(min=MIN_LOG_DECAY)
    inputs = [torch.randn(N, G, C, K), torch.randn(N, G, C, K), torch.randn(N, G, C, V), log_decay, torch.randn(G, M, K + V)]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    segment = None
    if segments:
        starts = torch.zeros(N, B, C, dtype=torch.int64)
        starts[0, 0, 3] = starts[1, 0, 0] = starts[1, 1, 7] = starts[2, 1, 1] = starts[2, 1, 2] = 1
        segment = starts.cumsum(-1)
    return inputs, segment


@pytest.mark.parametrize("C", [1, 8, 16])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("queries", [True, False])
def test_equals_the_recurrence_forward_and_backward(C, segments, queries):
    if segments and C < 8:
        pytest.skip("the document starts of this test need chunks of 8")
    inputs, segment = make(C=C, segments=segments)
    got, want = gated_slots(inputs[0] if queries else None, *inputs[1:], segment), recurrence(*inputs, segment)
    if not queries:
        assert got[0] is None
        got, want, inputs = got[1:], want[1:], inputs[1:]
    weights = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), inputs) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("segments", [False, True])
def test_the_strongest_decay_keeps_its_digits_in_float32(segments):
    inputs, segment = make(C=16, segments=segments, dtype=torch.float32, strength=1e4)
    assert (inputs[3] == MIN_LOG_DECAY).float().mean() > 0.99
    got = gated_slots(*inputs, segment)
    want = recurrence(*(x.double() for x in inputs), segment)
    grads = [torch.autograd.grad(o.square().sum() + s.square().sum(), inputs) for o, s in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=2e-4)


def test_long_chunks_are_refused():
    with pytest.raises(ValueError, match="chunks of 17 tokens"):
        gated_slots(*make(C=17)[0])
