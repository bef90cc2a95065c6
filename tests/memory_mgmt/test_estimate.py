"""The arithmetic against what torch really keeps and really allocates, and the plan's own logic."""

import dataclasses

import pytest
import torch

from memory_mgmt.activations import Shapes
from memory_mgmt.apply import apply_policy
from memory_mgmt.config import MemoryConfig
from memory_mgmt.devices import DEVICES
from memory_mgmt.estimate import estimate
from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_buckets import BUCKET_BYTES
from memory_mgmt.optimizer_offload import OffloadedOptimizer
from memory_mgmt.plan import refusal
from memory_mgmt.policy_settings import policy_of
from models.batch import Batch, Bounds
from models.config import MemoryModuleConfig, ModelConfig, TitansConfig
from models.transformer import Transformer, init_weights
from optim.build import build_optimizer
from optim.clip import clip_grad_norm
from optim.config import OptimConfig
from parallel.config import ParallelConfig
from tests.memory_mgmt.measured import kept_bytes, peak_allocated

TOKENS, VOCAB = 1024, 512
TILES = MemoryConfig(ffn_tile_tokens=128, memory_tile_tokens=128, loss_tile_tokens=128)
DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def config_of(*kinds: str, **changes) -> ModelConfig:
    return ModelConfig(**{"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "layers": kinds, "window": 128, **changes})


def model_of(config: ModelConfig, precision: str, memory: MemoryConfig) -> Transformer:
    model = Transformer(config, VOCAB).to(DTYPES[precision])
    init_weights(model, 0)
    apply_policy(model, policy_of(memory, config.layer_kinds))
    return model


def batch_of(rows: int = 1, length: int = TOKENS) -> Batch:
    tokens = torch.randint(VOCAB, (rows, length))
    return Batch(tokens, tokens, torch.arange(length).expand(rows, -1).contiguous(), Bounds.whole(rows, length))


def autocast(precision: str):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def planned_for(config: ModelConfig, memory: MemoryConfig, precision: str = "fp32", rows: int = 1, **changes):
    arguments = {
        "seq_len": TOKENS,
        "micro_batch_size": rows,
        "precision": precision,
        "vocab_size": VOCAB,
        "layout": "contiguous",
        "parallel": ParallelConfig(),
        **changes,
    }
    parallel = arguments.pop("parallel")
    return estimate(config, parallel, memory, OptimConfig(), **arguments)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("memory", [MemoryConfig(), TILES, MemoryConfig(recompute="block")], ids=["whole", "tiles", "recompute"])
@pytest.mark.parametrize("kind", ["full", "swa", "memory"])
def test_kept_bytes_of_a_block_equal_what_it_leaves_allocated(kind, memory, precision):
    config = config_of(kind)
    model, batch = model_of(config, precision, memory), batch_of()
    x_BTC = torch.randn(1, TOKENS, config.d_model, dtype=DTYPES[precision], requires_grad=True)

    def run():
        with autocast(precision):
            return model.blocks[0](x_BTC, batch.positions_BT, batch.bounds)

    shapes = Shapes(config, 1, TOKENS, precision, memory.ffn_tile_tokens, memory.memory_tile_tokens)
    if memory.recompute == "block":
        expected = shapes.stream
    else:
        expected = shapes.block_kept(kind)
    if kind != "memory":
        expected += shapes.rope_table()
    assert kept_bytes(run) + x_BTC.nbytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        config_of("memory", memory=MemoryModuleConfig(n_heads=2, head_dim=16, expand_v=2.0, conv_kernel=1, chunk_size=32)),
        config_of("full", n_kv_heads=1, head_dim=32, d_ff=96),
        config_of("full", qkv_bias=True, qk_norm=True),
        config_of("memory", memory=MemoryModuleConfig(kind="titans", expand_v=2.0, titans=TitansConfig(chunk_size=32))),
        config_of("memory", memory=MemoryModuleConfig(kind="titans", titans=TitansConfig(variant="lact", chunk_size=128))),
        config_of("memory", memory=MemoryModuleConfig(kind="titans", titans=TitansConfig(network="linear", read="token", chunk_size=32))),
    ],
    ids=["memory", "attention", "biases and normed heads", "titans", "lact", "titans by token"],
)
def test_kept_bytes_of_other_shapes(config):
    model, batch = model_of(config, "fp32", MemoryConfig()), batch_of(rows=2)
    x_BTC = torch.randn(2, TOKENS, config.d_model, requires_grad=True)
    kind, shapes = config.layer_kinds[0], Shapes(config, 2, TOKENS, "fp32")
    expected = shapes.block_kept(kind) + (shapes.rope_table() if kind != "memory" else 0)
    kept = kept_bytes(lambda: model.blocks[0](x_BTC, batch.positions_BT, batch.bounds))
    assert kept + x_BTC.nbytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("attach", ["mag", "mal", "after", "mac"])
def test_kept_bytes_of_a_memory_with_attention(attach):
    """Within a tenth: what a kernel keeps of a mask is not modelled."""
    config = config_of("memory", memory=MemoryModuleConfig(kind="titans", attach=attach))
    model, batch = model_of(config, "fp32", MemoryConfig()), batch_of()
    x_BTC = torch.randn(1, TOKENS, config.d_model, requires_grad=True)
    kept = kept_bytes(lambda: model.blocks[0](x_BTC, batch.positions_BT, batch.bounds))
    assert kept + x_BTC.nbytes == pytest.approx(Shapes(config, 1, TOKENS, "fp32").block_kept("memory"), rel=0.1)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("memory", [MemoryConfig(), TILES, TILES.model_copy(update={"recompute": "block"})], ids=["whole", "tiles", "all"])
@pytest.mark.parametrize("kinds", [("full", "swa"), ("memory",), ("swa", "memory")], ids="-".join)
def test_planned_peak_of_a_step_is_the_allocator_s(kinds, memory, precision, one_thread):
    """A real step of forward, loss, backward, clipping and AdamW on one process, by the CPU allocator's own log. One thread: the
    scratch of more is counted in "libraries"."""
    config = config_of(*kinds)
    model = model_of(config, precision, memory)
    optimizer = build_optimizer(model, OptimConfig())
    batch = batch_of()

    def step():
        with autocast(precision):
            loss = model(batch).sum() / TOKENS
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    plan = planned_for(config, memory, precision)
    at_peak = {term.name: term.bytes for term in plan.terms}
    before = at_peak["parameters"] + at_peak["AdamW moments"]
    apart = sum(at_peak.get(name, 0) for name in ("libraries", "heap", "heap holes", "process", "batch"))
    assert plan.peak_bytes - apart == pytest.approx(before + peak_allocated(step), rel=0.12)


@pytest.mark.parametrize("tokens", [64, TOKENS])
def test_planned_peak_of_a_step_with_moments_in_host_memory(tokens, one_thread):
    """Host memory is not the allocator's, here as on a GPU: what is left are parameters, gradients and two buckets."""
    config, memory = config_of("full", "swa"), MemoryConfig(offload_optimizer="host")
    model = model_of(config, "fp32", memory)
    with HostStore("cpu") as store:
        named = dict(model.named_parameters())
        optimizer = OffloadedOptimizer(build_optimizer(model, OptimConfig(), with_states=False), named, store)
        batch = batch_of(length=tokens)

        def step():
            (model(batch).sum() / tokens).backward()
            clip_grad_norm(model.parameters(), 1.0, None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        plan = planned_for(config, memory, "fp32", seq_len=tokens)
        at_peak = {term.name: term.bytes for term in plan.terms}
        assert "AdamW moments" not in at_peak and plan.host_bytes == pytest.approx(store.used_bytes, rel=0.02)
        apart = sum(at_peak.get(name, 0) for name in ("libraries", "heap", "heap holes", "process", "batch"))
        assert plan.peak_bytes - apart == pytest.approx(at_peak["parameters"] + peak_allocated(step), rel=0.12)


def test_moments_in_host_memory_leave_the_device():
    config = config_of("full", d_model=1024, n_heads=8, n_layers=4)
    here, there = (planned_for(config, MemoryConfig(offload_optimizer=where), device=DEVICES["h100"]) for where in ("none", "host"))
    moments = {t.name: t.max_bytes for t in here.terms}["AdamW moments"]
    buckets = {t.name: t.max_bytes for t in there.terms}["buckets of moments"]
    assert there.host_bytes == moments > 0 and 0 < buckets <= 2 * BUCKET_BYTES
    assert here.peak_bytes - moments <= there.peak_bytes <= here.peak_bytes - moments + buckets
    offered = {change.settings for change in here.changes}
    assert "memory.offload_optimizer=host" in offered
    assert not any("offload" in change.settings for change in planned_for(config, MemoryConfig()).changes)  # a CPU has no other memory


def test_terms_add_up_to_the_largest_moment():
    plan = planned_for(config_of("full", "memory", n_layers=4), MemoryConfig(recompute="block"))
    assert plan.peak_bytes == max(moment.bytes for moment in plan.moments)
    assert plan.peak_moment in {moment.name for moment in plan.moments}
    assert all(term.bytes <= term.max_bytes for term in plan.terms)
    assert plan.method == "estimate from shapes" and plan.not_counted


def test_long_sequences_grow_linearly_and_shards_divide():
    config, memory = config_of("full", "swa", "memory"), MemoryConfig(recompute="block")

    def activations(**changes) -> int:
        kinds = planned_for(config, memory, **changes).by_kind()
        return kinds["activations"] + kinds["transient"]

    assert activations(seq_len=2**20) == pytest.approx(4 * activations(seq_len=2**18), rel=0.05)
    two = activations(seq_len=2**20, parallel=ParallelConfig(cp=2), layout="zigzag")
    assert two < 0.6 * activations(seq_len=2**20)
    sharded = {t.name: t.bytes for t in planned_for(config, memory, parallel=ParallelConfig(dp_shard=4)).terms}
    whole = {t.name: t.bytes for t in planned_for(config, memory, parallel=ParallelConfig(dp_replicate=4)).terms}
    assert sharded["parameters"] == pytest.approx(whole["parameters"] / 4, rel=1e-3)


def test_cuda_counts_what_only_cuda_has():
    cpu = {t.name: t for t in planned_for(config_of("full"), MemoryConfig()).terms}
    plan = planned_for(config_of("full"), MemoryConfig(), device=DEVICES["h100"], parallel=ParallelConfig(cp=2))
    cuda = {t.name: t for t in plan.terms}
    assert {"CUDA context", "NCCL buffers", "cuBLAS workspace"} <= cuda.keys() - cpu.keys()
    assert plan.device_bytes == DEVICES["h100"].memory_bytes and plan.device == "h100"


def test_a_stream_in_bf16_halves_the_block_inputs():
    inputs = [
        {t.name: t.max_bytes for t in planned_for(config_of("full"), MemoryConfig(recompute="block"), "bf16", residual=residual).terms}[
            "block inputs"
        ]
        for residual in ("fp32", "bf16")
    ]
    assert inputs[0] == 2 * inputs[1] > 0


def test_refusal_offers_settings_that_really_fit():
    config = config_of("full", "memory", n_layers=6)
    memory = MemoryConfig(budget_gib=1.5)
    plan = planned_for(config, memory, seq_len=65536)
    assert not plan.fits
    fitting = [change for change in plan.changes if change.peak_bytes <= plan.limit_bytes]
    assert fitting and fitting[0].settings in refusal(plan)
    for change in plan.changes:
        overrides = dict(pair.split("=") for pair in change.settings.split())
        if any(key.startswith("parallel") for key in overrides):
            again = planned_for(config, memory, seq_len=65536, parallel=ParallelConfig(cp=int(overrides["parallel.cp"])))
        else:
            values = {key.removeprefix("memory."): v if v == "block" else int(v) for key, v in overrides.items()}
            again = planned_for(config, memory.model_copy(update=values), seq_len=65536)
        assert again.peak_bytes == change.peak_bytes < plan.peak_bytes
    enough = memory.model_copy(update={"budget_gib": plan.smallest_budget_gib})
    assert planned_for(config, enough, seq_len=65536).fits


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="not divisible by 4"):
        planned_for(config_of("full"), MemoryConfig(), seq_len=1022, parallel=ParallelConfig(cp=2), layout="zigzag")
    with pytest.raises(ValueError, match="fp8"):
        planned_for(config_of("full"), MemoryConfig(), precision="fp8")
    assert dataclasses.is_dataclass(planned_for(config_of("full"), MemoryConfig()))
