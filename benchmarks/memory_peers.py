"""What ``benchmarks/memory_models.py`` compares: longstride's memories and other packages' own code for the same thing, by case.

Operators (gated delta rule, gated slots, decayed sum) compute one function: all take the same tensors [B, T, H, .], and exact is the token
recurrence in float64, written here. Modules (Titans, RMT, memory layers) have the same sizes and each its author's details, so that each is
compared with itself in float64; longstride's, at smoke size, with their oracles (RMT: plain backpropagation). Packages are imported when
asked for; what they raise is the answer.

Legend: B row, T token, H head, K key, V value, M slot, C channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.memory.decayed_sum import decayed_sum
from models.memory.delta_rule import gated_delta_rule
from models.memory.gated_slots import gated_slots
from models.memory.protocol import build_memory
from models.memory.short_conv import from_chunks, to_chunks

Step = Callable[[], list[Tensor]]
"""One forward and backward pass: the result and its gradients."""


@dataclass(frozen=True)
class Size:
    """Of one case: one row of ``tokens`` tokens."""

    tokens: int
    heads: int = 4
    dim: int = 64
    """Of a head."""
    slots: int = 64
    chunk: int = 64
    segment: int = 512
    n_keys: int = 128

    @property
    def width(self) -> int:
        """C"""
        return self.heads * self.dim


@dataclass(frozen=True)
class System:
    """``prepare(size, dtype)`` makes the step, in float32 or, to compare with, float64; it raises what the package raises."""

    name: str
    package: str
    """As it is known to the package index; empty: longstride."""
    prepare: Callable[[Size, torch.dtype], Step]
    exact: Callable[[Size], Step] | None = None
    """What its results are compared with at smoke size; None, or at another size: those of the case, or ``prepare`` in float64."""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """What is computed, by whom."""

    name: str
    about: str
    sizes: Size
    systems: Sequence[System]
    exact: Callable[[Size], Step] | None = None
    """The results that every system should have; None: each has its own."""
    results: Sequence[str] = field(default=("out", "dx", "dparameters"))
    """What a step gives."""


# --- operators ------------------------------------------------------------------------------------------------------------------


def _drawn(size: Size, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Normal numbers of these shapes, drawn in float32."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def delta_inputs(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """q, k (unit length), v [B, T, H, .], beta and log decay [B, T, H], dout."""
    T, H, D = size.tokens, size.heads, size.dim
    drawn = _drawn(size, dict.fromkeys("qkvo", (1, T, H, D)) | dict.fromkeys("bg", (1, T, H)), torch.float32)
    q, k = (F.normalize(drawn[name], dim=-1) for name in "qk")
    return [x.to(dtype) for x in (q, k, drawn["v"], drawn["b"].sigmoid(), 0.1 * F.logsigmoid(drawn["g"]), drawn["o"])]


def slot_inputs(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [B, T, H, .], log decay [B, T, H, M], dout."""
    T, H, D = size.tokens, size.heads, size.dim
    drawn = _drawn(size, dict.fromkeys("qkvo", (1, T, H, D)) | {"g": (1, T, H, size.slots)}, torch.float32)
    return [x.to(dtype) for x in (*(drawn[name] for name in "qkv"), F.logsigmoid(drawn["g"]) / 8, drawn["o"])]


def _step(function: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    """``function`` of all but the last, which is the gradient of what it returns."""
    leaves, dout = [x.clone().requires_grad_() for x in inputs[:-1]], inputs[-1]

    def step() -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return step


def _operator(inputs: Callable[[Size, torch.dtype], list[Tensor]], function: Callable[..., Tensor], size: Size, dtype: torch.dtype) -> Step:
    return _step(partial(function, size), inputs(size, dtype))


def _by_token(advance: Callable[..., tuple[Tensor, ...]], states: Sequence[Tensor], *inputs: Tensor) -> Tensor:
    """A token recurrence; inside stretches of 64 tokens it is run again in the backward pass, or a state per token would be kept."""

    def stretch(*given: Tensor) -> tuple[Tensor, ...]:
        states, tokens, outputs = given[: len(given) - len(inputs)], given[len(given) - len(inputs) :], []
        for t in range(tokens[0].shape[1]):
            out, *states = advance(*(x[:, t] for x in tokens), *states)
            outputs.append(out)
        return torch.stack(outputs, 1), *states

    outputs = []
    for pieces in zip(*(x.split(64, dim=1) for x in inputs), strict=True):
        out, *states = checkpoint(stretch, *states, *pieces, use_reentrant=False)
        outputs.append(out)
    return torch.cat(outputs, 1)


def exact_delta(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S = a (I - b k k') S + b k v', o = S' q / sqrt(K)."""

    def advance(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        S = S * g.exp()[..., None, None]
        S = S + k.unsqueeze(-1) * (beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ S).squeeze(-2))).unsqueeze(-2)
        return (q.unsqueeze(-2) @ S).squeeze(-2) / size.dim**0.5, S

    return _by_token(advance, [q.new_zeros(1, size.heads, size.dim, size.dim)], q, k, v, beta, g)


def exact_slots(size: Size, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Slots' keys and values decay by a and take (1 - a) of the token's; o = values' softmax(keys q / sqrt(K))."""

    def advance(q: Tensor, k: Tensor, v: Tensor, g: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        a = g.exp().unsqueeze(-1)
        keys, values = (a * old + (1 - a) * new.unsqueeze(-2) for old, new in ((keys, k), (values, v)))
        p = ((keys @ q.unsqueeze(-1)).squeeze(-1) / size.dim**0.5).softmax(-1)
        return (p.unsqueeze(-2) @ values).squeeze(-2), keys, values

    return _by_token(advance, [q.new_zeros(1, size.heads, size.slots, size.dim) for _ in range(2)], q, k, v, g)


def exact_sum(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S = a S + b k v', o = S' q."""

    def advance(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        S = S * g.exp()[..., None, None] + k.unsqueeze(-1) * (beta.unsqueeze(-1) * v).unsqueeze(-2)
        return (q.unsqueeze(-2) @ S).squeeze(-2), S

    return _by_token(advance, [q.new_zeros(1, size.heads, size.dim, size.dim)], q, k, v, beta, g)


def _own_delta(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    q = q * size.dim**-0.5
    beta, g = (to_chunks(x.unsqueeze(-1), size.chunk).squeeze(-1) for x in (beta, g))
    q, k, v = (to_chunks(x, size.chunk) for x in (q, k, v))
    return from_chunks(gated_delta_rule(q, k, v, beta, g, q.new_zeros(size.heads, size.dim, size.dim))[0], 1, size.tokens)


def _own_slots(size: Size, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k, v, g = (to_chunks(x, 16) for x in (q * size.dim**-0.5, k, v, g))
    out, _ = gated_slots(q, k, v, g, q.new_zeros(size.heads, size.slots, 2 * size.dim))
    assert out is not None
    return from_chunks(out, 1, size.tokens)


def _own_sum(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    beta, g = (to_chunks(x.unsqueeze(-1), size.chunk).squeeze(-1) for x in (beta, g))
    q, k, v = (to_chunks(x, size.chunk) for x in (q, k, v))
    out, _ = decayed_sum(q, k, v, beta, g, q.new_zeros(size.heads, size.dim, size.dim))
    assert out is not None
    return from_chunks(out, 1, size.tokens)


def _fla_delta(recurrent: bool, size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import naive  # pyright: ignore[reportMissingImports]

    if recurrent:
        return naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0]
    return naive.naive_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, chunk_size=size.chunk)[0]


def _fla_slots(size: Size, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gsa.naive import naive_recurrent_gsa  # pyright: ignore[reportMissingImports]

    return naive_recurrent_gsa(q, k, v, 1 - g.exp(), g)[0]


def _fla_sum(name: str, size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.simple_gla import naive  # pyright: ignore[reportMissingImports]

    own = {"chunk_size": size.chunk} if "chunk" in name else {}
    return getattr(naive, name)(q, k, v * beta.unsqueeze(-1), g, scale=1.0, **own)[0]


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


_SUMS = ("naive_chunk_simple_gla", "naive_recurrent_simple_gla", "naive_parallel_simple_gla")
_SUM_RESULTS = ("out", "dq", "dk", "dv", "dbeta", "dlog_decay")

_RMT_EXACT = partial(_own_rmt, "plain", dtype=torch.float64)
CASES = (
    Case(
        "Gated DeltaNet",
        "the gated delta rule",
        Size(2048),
        (
            System("gated_delta_rule", "", partial(_operator, delta_inputs, _own_delta)),
            System("naive_chunk_gated_delta_rule", "fla-core", partial(_operator, delta_inputs, partial(_fla_delta, False))),
            System("naive_recurrent_gated_delta_rule", "fla-core", partial(_operator, delta_inputs, partial(_fla_delta, True))),
        ),
        partial(_operator, delta_inputs, exact_delta, dtype=torch.float64),
        _SUM_RESULTS,
    ),
    Case(
        "Gated Slot Attention",
        "64 slots per head",
        Size(2048),
        (
            System("gated_slots", "", partial(_operator, slot_inputs, _own_slots)),
            System("naive_recurrent_gsa", "fla-core", partial(_operator, slot_inputs, _fla_slots)),
        ),
        partial(_operator, slot_inputs, exact_slots, dtype=torch.float64),
        ("out", "dq", "dk", "dv", "dlog_decay"),
    ),
    Case(
        "Mamba-2",
        "its scan, one decay per head (SSD)",
        Size(2048),
        (
            System("decayed_sum", "", partial(_operator, delta_inputs, _own_sum)),
            *(System(name, "fla-core", partial(_operator, delta_inputs, partial(_fla_sum, name))) for name in _SUMS),
        ),
        partial(_operator, delta_inputs, exact_sum, dtype=torch.float64),
        _SUM_RESULTS,
    ),
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
