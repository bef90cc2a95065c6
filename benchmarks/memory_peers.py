"""What ``benchmarks/memory_models.py`` compares: longstride's memories and other packages' own code for the same thing, by case.

Operators (gated delta rule, gated slots, decayed sum) compute one function: all take the same tensors [B, T, H, .], and exact is the token
recurrence in float64 (``benchmarks/memory_operators.py``). Modules (Titans, RMT, memory layers) have the same sizes and each its author's
details, so that each is compared with itself in float64; longstride's, at smoke size, with their oracles (RMT: plain backpropagation).
Packages are imported when asked for; what they raise is the answer.

Legend: B row, T token, H head, K key, V value, M slot, C channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory_operators import OPERATORS, Case, Size, Step, System
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.memory.protocol import build_memory

# --- modules --------------------------------------------------------------------------------------------------------------------


def _module_step(parameters: Sequence[Tensor], x_BTC: Tensor, run: Callable[[Tensor], Tensor], stretch: int | None = None) -> Step:
    """Output, gradient of the input and gradients of all parameters in one row, of the sum of the output times fixed numbers.

    ``stretch``: so many tokens at a time, of a module that treats each by itself.
    """
    dout_BTC = torch.randn(x_BTC.shape, generator=torch.Generator().manual_seed(3)).to(x_BTC.dtype)

    def step() -> list[Tensor]:
        for one in parameters:
            one.grad = None
        leaf, found = x_BTC.clone().requires_grad_(), []
        size = stretch or leaf.shape[1]
        for x, dout in zip(leaf.split(size, 1), dout_BTC.split(size, 1), strict=True):
            out = run(x)
            out.backward(dout)
            found.append(out.detach())
        assert leaf.grad is not None
        return [torch.cat(found, 1), leaf.grad, *(one.grad for one in parameters if one.grad is not None)]

    return step


def _inputs(size: Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, size.tokens, size.width, generator=torch.Generator().manual_seed(7)).to(dtype)


def _initialised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters by the module's own rules, else normal with standard deviation 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parent = module.get_submodule(name.rpartition(".")[0])
            rule = getattr(parent, "init_parameter", lambda *given: None)
            value = rule(name.rpartition(".")[2], parameter.shape, generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 if value is None else value)
    return module.to(dtype)


def _own_titans(network: str, size: Size, dtype: torch.dtype, oracle: bool = False, tile: int = 0) -> Step:
    own = {"kind": "titans", "conv_kernel": 1, "titans": {"network": network, "chunk_size": size.chunk}}
    config = ModelConfig.model_validate({"d_model": size.width, "n_heads": size.heads, "layers": ["memory"], "memory": own})
    module: Any = _initialised(build_memory(config), dtype)
    module.tile_tokens = tile
    bounds = Bounds.whole(1, size.tokens)
    read = partial(_by_oracle, module, bounds) if oracle else lambda x_BTC: module(x_BTC, None, bounds)[0]
    return _module_step(list(module.parameters()), _inputs(size, dtype), read)


def _by_oracle(module: Any, bounds: Bounds, x_BTC: Tensor) -> Tensor:
    """A memory's oracle, stretch by stretch, each run again in the backward pass: it keeps states of every token.

    Reentrant: inside, the oracle takes gradients of its own, for which the other kind would run a stretch again, token by token."""
    state, outputs = module.init_state(1, x_BTC.device, x_BTC.dtype), []
    for start in range(0, x_BTC.shape[1], 32):
        piece = x_BTC[:, start : start + 32]
        here = bounds.with_ranges(((start, start + piece.shape[1]),))

        def stretch(piece: Tensor, *values: Tensor, here: Bounds = here, names: tuple[str, ...] = tuple(state)) -> tuple[Tensor, ...]:
            out, after = module.oracle(piece, dict(zip(names, values, strict=True)), here)
            return out, *(after[name] for name in names)

        out, *values = checkpoint(stretch, piece, *state.values(), use_reentrant=True)
        state = dict(zip(state, values, strict=True))
        outputs.append(out)
    return torch.cat(outputs, 1)


def _titans_pytorch(depth: int, per_chunk: bool, size: Size, dtype: torch.dtype) -> Step:
    from titans_pytorch import NeuralMemory  # pyright: ignore[reportMissingImports]

    torch.manual_seed(5)
    module = NeuralMemory(
        dim=size.width,
        dim_head=size.dim,
        heads=size.heads,
        chunk_size=size.chunk,
        batch_size=size.chunk if per_chunk else None,
        default_model_kwargs={"depth": depth, "expansion_factor": 4.0},
    ).to(dtype)
    return _module_step(list(module.parameters()), _inputs(size, dtype), lambda x: module(x)[0])


def _own_keys(size: Size, dtype: torch.dtype, oracle: bool = False) -> Step:
    from models.product_keys import ProductKeyMemory
    from models.value_table import ValueTable

    keys = {"n_keys": size.n_keys, "heads": size.heads, "key_dim": 2 * size.dim, "qk_norm": True, "gate": "none"}
    config = ModelConfig.model_validate(
        {"d_model": size.width, "n_heads": size.heads, "layers": ["swa"], "feedforward": ["product_keys"], "product_keys": keys}
    )
    table = ValueTable(config.table_rows, config.value_width)
    with torch.no_grad():
        table.draw(torch.Generator().manual_seed(6))
    table.to(dtype)
    layer: Any = _initialised(ProductKeyMemory(config, table), dtype)
    parameters = [*layer.parameters(), table.weight]

    def read(x_BTC: Tensor) -> Tensor:
        if oracle:
            return layer.oracle(x_BTC, table.weight)
        bounds = Bounds.whole(*x_BTC.shape[:2])
        table.begin(bounds)
        return layer(x_BTC, bounds)

    return _module_step(parameters, _inputs(size, dtype), read, stretch=32 if oracle else None)


def _product_key_memory(size: Size, dtype: torch.dtype) -> Step:
    from product_key_memory import PKM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(5)
    module = PKM(size.width, heads=size.heads, num_keys=size.n_keys, topk=32, dim_head=size.dim).to(dtype)
    return _module_step(list(module.parameters()), _inputs(size, dtype), module)


VOCABULARY, LAYERS, MEMORY_TOKENS = 256, 2, 16


def _text(size: Size) -> Tensor:
    return torch.randint(VOCABULARY, (1, size.tokens + 1), generator=torch.Generator().manual_seed(9))


def _parameter_gradients(module: nn.Module) -> list[Tensor]:
    return [one.grad for one in module.parameters() if one.grad is not None]


def _own_rmt(how: str, size: Size, dtype: torch.dtype) -> Step:
    from memory_mgmt.apply import apply_policy
    from memory_mgmt.config import MemoryConfig
    from memory_mgmt.policy_settings import policy_of
    from models.transformer import Transformer, init_weights
    from trainer.replay import SegmentRunner

    shape = {"d_model": size.width, "n_heads": size.heads, "d_ff": int(size.width * 4 * 2 / 3), "layers": ["full"]}
    memory = {"kind": "rmt", "rmt": {"segment": size.segment, "tokens": MEMORY_TOKENS}}
    config = ModelConfig.model_validate({**shape, "n_layers": LAYERS, "memory": memory})
    model = Transformer(config, VOCABULARY)
    init_weights(model, 0)
    model.to(dtype)
    if how == "lean":
        lean = MemoryConfig(recompute="block", loss_tile_tokens=256, ffn_tile_tokens=128)
        apply_policy(model, policy_of(lean, config.layer_kinds))
    text, n = _text(size), size.tokens
    batch = Batch(text[:, :-1], text[:, 1:], torch.arange(n).unsqueeze(0), Bounds.whole(1, n))
    runner = SegmentRunner(model)

    def step() -> list[Tensor]:
        model.zero_grad()
        if how == "plain":
            loss = model(batch).sum() / n
            loss.backward()
        else:
            loss = runner(lambda shard, segment: model(shard, segment), batch, n).sum() / n
        return [loss.detach(), *_parameter_gradients(model)]

    return step


def _rmt_pytorch(replay: bool, size: Size, dtype: torch.dtype) -> Step:
    import recurrent_memory_transformer_pytorch as package  # pyright: ignore[reportMissingImports]

    torch.manual_seed(5)
    model = package.RecurrentMemoryTransformer(
        dim=size.width,
        num_tokens=VOCABULARY,
        depth=LAYERS,
        num_memory_tokens=MEMORY_TOKENS,
        seq_len=size.segment,
        dim_head=size.dim,
        heads=size.heads,
        use_flash_attn=True,
        abs_pos_emb=False,
        rotary_pos_emb=True,
        use_xl_memories=False,
        emb_gradient_frac=1.0,
        num_residual_streams=1,
    ).to(dtype)
    wrapped, text = package.RecurrentMemoryTransformerWrapper(model), _text(size)

    def step() -> list[Tensor]:
        model.zero_grad()
        if replay:
            loss = wrapped(text, memory_replay_backprop=True)
        else:
            loss, _ = wrapped(text, return_loss=True)
            loss.backward()
        return [loss.detach(), *_parameter_gradients(model)]

    return step


# --- the cases ------------------------------------------------------------------------------------------------------------------


def _titans_case(network: str, depth: int, about: str) -> Case:
    own = partial(_own_titans, network)
    exact = partial(own, dtype=torch.float64, oracle=True)
    systems = [
        System("titans", "", own, exact),
        System("titans, tiles of 256", "", partial(own, tile=256), exact),
        System("NeuralMemory", "titans-pytorch", partial(_titans_pytorch, depth, True), note="batch_size = chunk_size, as the paper"),
        System("NeuralMemory, one batch", "titans-pytorch", partial(_titans_pytorch, depth, False), note="gradients at the first weights"),
    ]
    return Case(f"Titans, {network}", about, Size(1024), systems)


_RMT_EXACT = partial(_own_rmt, "plain", dtype=torch.float64)
CASES = (
    *OPERATORS,
    _titans_case("mlp", 2, "two layers, hidden width 4 times the head's, momentum, forgetting"),
    _titans_case("linear", 1, "one matrix per head, momentum, forgetting"),
    Case(
        "Recurrent Memory Transformer",
        f"{LAYERS} layers, segments of 512 tokens, {MEMORY_TOKENS} memory tokens, vocabulary {VOCABULARY}",
        Size(4096),
        (
            System("rmt, replay", "", partial(_own_rmt, "replay"), _RMT_EXACT),
            System("rmt, replay, recompute: block", "", partial(_own_rmt, "lean"), _RMT_EXACT),
            System("rmt, all segments kept", "", partial(_own_rmt, "plain"), _RMT_EXACT),
            System("memory_replay_backprop", "recurrent-memory-transformer-pytorch", partial(_rmt_pytorch, True)),
            System("all segments kept", "recurrent-memory-transformer-pytorch", partial(_rmt_pytorch, False)),
        ),
        results=("loss", "dparameters"),
    ),
    Case(
        "Memory layer",
        "16,384 values by product keys, 4 heads, the best 32 of each",
        Size(2048),
        (
            System("product_keys", "", _own_keys, partial(_own_keys, dtype=torch.float64, oracle=True)),
            System("PKM", "product-key-memory", _product_key_memory),
        ),
    ),
)
SMOKE = Size(tokens=96, heads=2, dim=8, slots=8, chunk=16, segment=32, n_keys=32)
