"""Tensor parallelism: gathered and summed tokens are inverse in their gradients, the shared vocabulary gives the loss of the whole one, and
what cannot be shared is refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from models.batch import IGNORE_INDEX, Batch, Bounds
from models.errors import UserError
from models.loss import chunked_cross_entropy
from optim.codecs import codec_named
from parallel.tensor_parallel import SplitTokens, sent_bytes
from parallel.vocabulary import SharedSweep
from tests.distributed import run_distributed
from trainer.build import build_model, mesh_for
from trainer.config import RunConfig
from trainer.planning import model_vocab_size
from trainer.settling import settled
from trainer.tensor_rules import STATE_BLOCK

ROWS, TOKENS, WIDTH, VOCABULARY = 2, 12, 6, 10


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_BTC, head weight, norm weight, labels with some tokens without one."""
    torch.manual_seed(0)
    x_BTC = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    labels_BT = torch.randint(VOCABULARY, (ROWS, TOKENS))
    labels_BT[0, 3:5] = labels_BT[1, :2] = labels_BT[1, -1] = IGNORE_INDEX
    return x_BTC, torch.randn(VOCABULARY, WIDTH, dtype=torch.float64), torch.rand(WIDTH, dtype=torch.float64) + 0.5, labels_BT


def losses(x_BtC, weight_VC, norm_C, labels_BT, scale_BT, **sweep):  # type: ignore[no-untyped-def]
    """(nll, dx, dweight, dnorm), for a gradient per token, or of the mean where ``scale`` is None."""
    x_BtC, weight_VC, norm_C = (value.detach().clone().requires_grad_() for value in (x_BtC, weight_VC, norm_C))
    nll_BT = chunked_cross_entropy(x_BtC, weight_VC, labels_BT, 5, (norm_C, 1e-5), **sweep)
    (nll_BT.sum() / 7 if scale_BT is None else (nll_BT * scale_BT).sum()).backward()
    return nll_BT.detach(), x_BtC.grad, weight_VC.grad, norm_C.grad


def sent(layers: int, recompute: str) -> int:
    """Bytes that this rank sends to its tensor-parallel group in one forward and backward pass of a model of ``layers``."""
    settings = {"model": {"d_model": 16, "n_heads": 2, "layers": ["full"] * layers}, "train": {"precision": "fp64", "device": "cpu"}}
    parallel, memory = {"tp": dist.get_world_size()}, {"recompute": recompute, "loss_tile_tokens": 8}
    config = RunConfig.model_validate({**settings, "data": {"seq_len": TOKENS}, "parallel": parallel, "memory": memory})
    mesh = mesh_for(config, torch.device("cpu"))
    assert mesh is not None
    model, total = build_model(config, 64, mesh, torch.device("cpu")), 0
    originals = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def counted(original, out, value, *args, group=None, **more):  # type: ignore[no-untyped-def]
        nonlocal total
        if group is mesh.tp_group:
            shared = value.numel() * value.element_size()
            total += shared * (mesh.dims.tp - 1) // (1 if original is originals[0] else mesh.dims.tp)
        return original(out, value, *args, group=group, **more)

    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = (partial(counted, original) for original in originals)
    try:
        zeros_BT = torch.zeros(1, TOKENS, dtype=torch.long)
        model(Batch(zeros_BT, zeros_BT, torch.arange(TOKENS)[None], Bounds.whole(1, TOKENS))).sum().backward()
    finally:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = originals
    return total


def on_a_rank() -> list[tuple]:
    """Of this rank's part: losses and gradients, the norm's summed over ranks."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    tokens = SplitTokens(group)
    x_BTC, weight_VC, norm_C, labels_BT = inputs()
    mine = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    rows = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    found = []
    for scale_BT in (None, torch.arange(ROWS * TOKENS).view(ROWS, TOKENS).double()):
        nll, dx, dweight, dnorm = losses(
            x_BTC[:, mine], weight_VC[rows], norm_C, labels_BT, scale_BT, sweep=partial(SharedSweep, group=group)
        )
        dist.all_reduce(dnorm)
        found.append((nll, dx, dweight, dnorm))
    x_BtC = x_BTC[:, mine].clone().requires_grad_()
    y_BTC = tokens.gathered(x_BtC)
    own_BtC = tokens.summed(y_BTC * (rank + 1))
    own_BtC.square().sum().backward()
    assert x_BtC.grad is not None
    counted = tuple(sent(layers, recompute) for recompute in ("none", "block") for layers in (1, 3))
    return [*found, (y_BTC.detach(), own_BtC.detach(), x_BtC.grad), counted]


def test_a_shared_vocabulary_gives_the_loss_of_the_whole_and_tokens_come_back() -> None:
    x_BTC, weight_VC, norm_C, labels_BT = inputs()
    answers = run_distributed(on_a_rank, 2)
    scales = (None, torch.arange(ROWS * TOKENS).view(ROWS, TOKENS).double())
    for i, scale_BT in enumerate(scales):
        nll, dx, dweight, dnorm = losses(x_BTC, weight_VC, norm_C, labels_BT, scale_BT)
        for answer in answers:
            torch.testing.assert_close(answer[i][0], nll, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(answer[i][3], dnorm, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([answer[i][1] for answer in answers], 1), dx, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([answer[i][2] for answer in answers]), dweight, rtol=1e-12, atol=1e-12)
        assert torch.equal(answers[0][i][0], answers[1][i][0]), "the loss of a token is the same bits on all ranks"
    for rank, (gathered, summed, grad) in enumerate(answer[2] for answer in answers):
        mine = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
        assert torch.equal(gathered, x_BTC)
        torch.testing.assert_close(summed, 3 * x_BTC[:, mine])
        torch.testing.assert_close(grad, 2 * 9 * x_BTC[:, mine])

    message, per_token = TOKENS * 16 * 8 // 2, 2 * TOKENS * 8
    ends = 2 * message + 2 * message + per_token  # embedding; normed tokens and their gradient, and two numbers of each
    for counts in (answer[3] for answer in answers):
        for (one, three), kept in zip((counts[:2], counts[2:]), (True, False), strict=True):
            block = sum(sent_bytes(TOKENS, 16, 2, 8, kept))
            assert (one, three) == (ends + block, ends + 3 * block), "bytes sent are those of the formula"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"n_heads": 3, "n_kv_heads": 3, "d_model": 48}}, "model.n_heads 3"),
        ({"model": {"n_heads": 4, "n_kv_heads": 1}}, "model.n_kv_heads 1"),
        ({"model": {"d_ff": 33}}, "model.d_ff 33"),
        ({"model": {"vocab_size": 301}}, "model.vocab_size 301"),
        ({"data": {"seq_len": 31}}, "data.seq_len 31"),
        ({"optim": {"preset": "muon", "weights": "bf16_24bit"}, "train": {"precision": "bf16"}}, "optim.weights bf16_24bit"),
        ({"optim": {"preset": "lomo", "clip_norm": None}}, "optim.fuse_backward"),
        ({"optim": {"preset": "sgd", "fuse_backward": True, "clip_norm": None}}, "optim.fuse_backward"),
        ({"memory": {"plan": "estimate"}}, "memory.plan=trace"),
        ({"optim": {"preset": "adamw_8bit"}}, "blocks of 128"),
        ({"optim": {"preset": "sgd", "weights": "bf16_stochastic"}, "train": {"precision": "bf16"}}, "optim.weights bf16_stochastic"),
        ({"model": {"layers": ["memory", "swa"], "memory": {"kind": "titans", "attach": "mac"}}}, "attach mac"),
        ({"model": {"layers": ["memory", "full"], "memory": {"attach": "mag"}}, "parallel": {"cp": 2}}, "parallel.layout=contiguous"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(settings: dict, words: str) -> None:
    settings = {**settings, "model": {"layers": ["full"], **settings.get("model", {})}}
    RunConfig.model_validate(settings)
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate({**settings, "parallel": {**settings.get("parallel", {}), "tp": 2}})


def test_degrees_that_are_chosen_leave_tp_alone() -> None:
    config = RunConfig.model_validate({"model": {"layers": ["full"]}, "parallel": {"tp": 2, "cp": "auto"}})
    with pytest.raises(UserError, match=r"parallel\.tp 2 does not divide 3 ranks"):
        settled(config, "cpu", 3)
    assert settled(config, "cpu", 2).config.parallel.model_dump(include={"cp", "tp"}) == {"cp": 1, "tp": 2}


def test_a_vocabulary_that_the_data_brings_is_refused_by_name() -> None:
    config = RunConfig.model_validate(
        {"model": {"layers": ["full"], "n_heads": 3, "d_model": 48, "d_ff": 96}, "data": {"seq_len": 96}, "parallel": {"tp": 3}}
    )
    with pytest.raises(UserError, match=r"parallel\.tp 3 does not divide the 320 rows .* model\.vocab_size=321"):
        model_vocab_size(config, 300)


def test_the_blocks_of_states_are_those_of_the_codecs() -> None:
    assert {codec_named(name).block for name in ("int8", "int4")} == {STATE_BLOCK}  # type: ignore[attr-defined]
