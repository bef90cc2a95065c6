"""Memories beside and before attention: what a token may see, documents, recomputation, ranks; for more than one kind of memory."""

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.flops import parameter_count
from models.memory.protocol import MemoryModule
from models.transformer import Block, Transformer, init_weights
from parallel.sequence import ranges_for
from parallel.state_passing import RingCarry
from tests.distributed import run_distributed

D, B, T = 16, 2, 48
DOCUMENTS = ((0, 1, 7, 8, 16, 33), (0, 20, 21, 22))
PACKED = Bounds(T, ((0, T),), DOCUMENTS)
TITANS = {"kind": "titans", "titans": {"chunk_size": 8, "expansion": 1.5}}
CASES = {
    "mag": {**TITANS, "attach": "mag"},
    "mal": {**TITANS, "attach": "mal"},
    "after": {**TITANS, "attach": "after"},
    "mac": {"kind": "titans", "attach": "mac", "mac": {"segment": 8, "persistent": 2}, "titans": {"expansion": 1.5}},
    "mag of gated_deltanet": {"kind": "gated_deltanet", "chunk_size": 8, "attach": "mag"},
}
every = pytest.mark.parametrize("name", CASES)


def config_of(name: str) -> ModelConfig:
    return ModelConfig(d_model=D, n_heads=4, n_kv_heads=2, layers=("memory",), window=5, qkv_bias=True, qk_norm=True, memory=CASES[name])


def make(name: str) -> MemoryModule:
    """The mixer of a block, float64, with weights large enough that every part of it matters."""
    model = Transformer(config_of(name), 32).double()
    init_weights(model, 0)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in mixer.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return mixer


def make_x() -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@every
def test_no_token_sees_a_later_one_or_another_document(name):
    mixer, x = make(name), make_x()
    y = mixer(x, None, PACKED)[0]
    for t in (0, 7, 15, 30, T - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        other = mixer(changed, None, PACKED)[0]
        assert torch.equal(y[:, :t], other[:, :t]) and not torch.equal(y[:, t], other[:, t])
    for row, start, end in ((0, 16, 33), (1, 22, T)):
        alone = mixer(x[row : row + 1, start:end], None, Bounds.whole(1, end - start))[0]
        torch.testing.assert_close(y[row : row + 1, start:end], alone, rtol=0, atol=1e-11)


@every
def test_both_parts_matter_and_the_memory_reaches_past_the_window(name):
    mixer, x, bounds = make(name), make_x(), Bounds.whole(B, T)
    y = mixer(x, None, bounds)[0]
    changed = x.clone()
    changed[:, 2] += 1.0
    assert (mixer(changed, None, bounds)[0] - y)[:, 2 + 8 + 5 :].abs().max() > 1e-6
    grads = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    assert all(g.abs().max() > 0 for g in grads)


@every
def test_tiles_and_a_run_tile_of_the_policy_change_nothing(name):
    mixer, x = make(name), make_x().requires_grad_()
    wanted, seen = [x, *mixer.parameters()], []

    def run_tile(first, n_tokens, body, *args):
        seen.append((first, n_tokens))
        return body(*args)

    want = torch.autograd.grad(mixer(x, None, PACKED)[0].square().sum(), wanted)
    mixer.tile_tokens = 10
    for mixer.run_tile in (None, run_tile):
        got = torch.autograd.grad(mixer(x, None, PACKED)[0].square().sum(), wanted)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    # Attention as one and the memory in tiles; a memory that is read as context in segments.
    assert {(16, 8), (40, 8)} <= set(seen) if name == "mac" else {(0, T), (10, 10)} <= set(seen)


def on_ranks(layout: str) -> dict[str, list[torch.Tensor]]:
    from models.attention import Attention
    from parallel.ring_attention import RingAttention

    answers = {}
    for name in CASES:
        mixer, x = make(name), make_x()
        for part in mixer.modules():
            if isinstance(part, Attention):
                part.inner_attention = RingAttention(dist.group.WORLD, layout, part.window)
            elif isinstance(part, MemoryModule):
                part.carry = RingCarry(dist.group.WORLD, layout)
        ranges = ranges_for(layout, T, dist.get_rank(), dist.get_world_size())
        local = torch.cat([x[:, a:b] for a, b in ranges], 1).requires_grad_()
        y = mixer(local, None, PACKED.with_ranges(ranges))[0]
        grads = torch.autograd.grad((y * (1 + local.detach())).sum(), [local, *mixer.parameters()])
        answers[name] = [y.detach(), *grads]
    return answers


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_split_over_ranks_equals_one_process(layout):
    answers = run_distributed(on_ranks, 3, layout)
    for name in CASES:
        mixer, x = make(name), make_x().requires_grad_()
        y = mixer(x, None, PACKED)[0]
        dx, *dparameters = torch.autograd.grad((y * (1 + x.detach())).sum(), [x, *mixer.parameters()])
        for rank, of_rank in enumerate(answers):
            for got, whole in zip(of_rank[name][:2], (y, dx), strict=True):
                want = torch.cat([whole[:, a:b] for a, b in ranges_for(layout, T, rank, 3)], 1)
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        for i, want in enumerate(dparameters):
            torch.testing.assert_close(sum(of_rank[name][2 + i] for of_rank in answers), want, rtol=1e-10, atol=1e-10)


def test_with_a_residual_the_memory_is_written_with_the_input_and_what_attention_found():
    """Attention that finds the same for every token, so that the layer is a Titans layer on x plus a constant, gated."""
    shared = {"kind": "titans", "conv_kernel": 1}
    settings = {"mac": {"segment": 8, "persistent": 0, "residual": True}, "titans": {"expansion": 1.5}}
    x, bounds, silu = make_x(), Bounds.whole(B, T), torch.nn.functional.silu
    x[..., -1] = 1.0
    mixers = []
    for memory in ({**shared, **settings, "attach": "mac"}, {**shared, "titans": {"expansion": 1.5, "chunk_size": 8}}):
        model = Transformer(ModelConfig(d_model=D, n_heads=4, layers=("memory",), memory=memory), 32).double()
        init_weights(model, 0)
        mixers.append(model.blocks[0].mixer)
    mac, titans = mixers
    own, found = dict(titans.named_parameters()), torch.linspace(-1, 2, D, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in mac.memory.named_parameters():
            own[name].copy_(parameter)
        for parameter in (mac.w_context.weight, mac.attention.wq.weight, mac.attention.wv.weight):
            parameter.zero_()
        # Equal weights, half of them on what the memory had, which is 0 here.
        mac.attention.wv.weight[:, -1] = 2 * found
        mac.attention.wo.weight.copy_(torch.eye(D))
        titans.w_gate.weight.zero_()[:, -1] = 1 / (1 + found[-1])  # the gate is silu(1) everywhere
        titans.w_out.weight.copy_(torch.eye(D, dtype=torch.float64) / silu(torch.ones((), dtype=torch.float64)))
    read = titans(x + found, None, bounds)[0] @ mac.w_read.weight.T
    unit = [z * (z.square().mean(-1, keepdim=True) + mac.norm_eps).rsqrt() for z in (found, read)]
    want = mac.w_out(unit[0] * silu(unit[1]))
    torch.testing.assert_close(mac(x, None, bounds)[0], want, rtol=1e-10, atol=1e-11)


@every
def test_parameters_are_counted(name):
    config = config_of(name)
    with torch.device("meta"):
        model = Transformer(config, 64)
    count = parameter_count(config, 64)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.memory == sum(p.numel() for p in model.blocks[0].mixer.parameters())


@pytest.mark.parametrize("name", ["mag", "mac"])
def test_a_whole_model_learns_with_a_pair_in_its_blocks(name):
    model = Transformer(config_of(name), 32)
    init_weights(model, 0)
    tokens = torch.randint(32, (B, T), generator=torch.Generator().manual_seed(3))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(T).expand(B, T).contiguous(), Bounds.whole(B, T))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = model(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(model.blocks[0], Block)


def test_a_state_is_refused_where_attention_would_miss_its_tokens():
    mixer = make("mag")
    with pytest.raises(ValueError, match="takes no state from an earlier one"):
        mixer(make_x(), mixer.init_state(B, "cpu", torch.float64), Bounds.whole(B, T))


@pytest.mark.parametrize(
    ("memory", "named"),
    [
        ({"attach": "mac"}, "knows kind titans only, not gated_deltanet"),
        ({**TITANS, "attach": "mac"}, "set memory.mac.segment"),
        ({"attach": "mag", "mac": {"segment": 64}}, "memory.mac is read by memory.attach mac, not by mag"),
    ],
)
def test_attachments_that_a_memory_does_not_know_are_refused(memory, named):
    with pytest.raises(ValidationError, match=named):
        ModelConfig(memory=memory)
