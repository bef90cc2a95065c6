"""Measured rates: plausible, stored whole, and good enough to predict what was not measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memory_mgmt import calibration
from memory_mgmt.calibration import Calibration, calibrate, describe, load, save
from memory_mgmt.cost_model import Rates, Topology, op_seconds, predict_step
from memory_mgmt.devices import DEVICES
from memory_mgmt.plan import MemoryPlan
from memory_mgmt.trace import TracedOp
from models.batch import Batch, Bounds
from models.errors import UserError
from models.kernels import CAUSAL, block_attention
from models.transformer import Transformer, init_weights
from tests.distributed import run_distributed
from trainer import planning
from trainer.commands import open_run as opening
from trainer.config import RunConfig
from trainer.config_file import resolve
from trainer.planning import target_of
from trainer.tracing import trace_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured(one_thread: None) -> Calibration:
    return calibrate(CPU, clock=time.process_time)  # one thread: what other processes do does not count


def test_rates_are_plausible(measured: Calibration) -> None:
    rates = measured.rates
    for table in (rates.matmul, rates.batched_matmul, rates.attention_forward, rates.attention_backward):
        assert set(table) == {"fp32", "bf16", "fp64"}
    assert 1e9 < rates.matmul["fp32"].at(1e9) < 1e12
    assert rates.matmul["fp64"].at(1e9) < 0.9 * rates.matmul["fp32"].at(1e9)  # half as many per vector
    assert 1e8 < rates.elementwise.at(1e8) < 1e12 and rates.math.at(1e6) < 1.2 * rates.elementwise.at(1e6)
    assert 1e8 < rates.copy_out < 1e12 and 1e-7 < rates.launch_seconds < 1e-3
    assert rates.shared and not rates.overlap
    assert measured.threads == 1 and measured.torch == torch.__version__ and 0 < measured.seconds < 60
    assert any("GFLOP/s" in line for line in describe(measured))


def test_a_stored_calibration_is_read_back(measured: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "run" / "calibration.json"
    save(measured, path)
    save(measured, path)  # replaces
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    again = load(path)
    assert vars(again) | {"rates": None} == vars(measured) | {"rates": None}
    rates = Rates.from_calibration(path)
    assert rates == again.rates and rates.matmul == measured.rates.matmul
    assert rates.source == f"calibration of {measured.device} on {measured.date}, torch {torch.__version__}"


def test_rates_stay_with_the_run_and_damaged_ones_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "calibration-cpu.json"
    kept.write_text("cut sho")
    for module in (planning, opening):
        monkeypatch.setattr(module, "calibration_path", lambda name: kept)
    with pytest.raises(UserError, match=r"calibration-cpu\.json: not a calibration.*; measure again with longstride plan --calibrate"):
        planning.rates_of(DEVICES["cpu"])
    plan = MemoryPlan("test", "cpu", 1, (), (), None, None)
    run = opening.open_run(resolve(None, [f"run.root={tmp_path}"]), None, "run", plan)
    assert (run.path / "calibration.json").read_bytes() == kept.read_bytes()


def test_other_files_are_refused(measured: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for text in ("", "[]", "{}", '{"format_version": 1, "rates": {}}', '{"format_version": 1, "rates": {"matmul": 3}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"calibration\.json: not a calibration"):
            Rates.from_calibration(path)
    save(measured, path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99; this longstride reads 1"):
        load(path)
    with pytest.raises(ValueError, match="not a calibration"):
        Rates.from_calibration(tmp_path / "absent.json")


def shortest(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(7):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def test_predicts_a_layer_that_was_not_measured(measured: Calibration) -> None:
    """Products, attention and elementwise work of other shapes than the calibration's: within 40 percent on a busy machine, whose
    caches others use too (within 15 percent on a quiet one)."""
    tokens, width, heads = 1536, 384, 6
    x, w = torch.rand(tokens, width), torch.rand(4 * width, width)
    q, k, v = (torch.rand(1, heads, tokens, width // heads) for _ in range(3))

    def layer() -> None:
        for _ in range(4):
            hidden = torch.nn.functional.silu(x @ w.T)
            hidden.mul(2.0)
            block_attention(q, k, v, CAUSAL)

    def traced(name: str, flops: int, moved: int) -> TracedOp:
        return TracedOp(0, f"aten::{name}", "", None, "forward", flops, moved, "float32")

    scores = heads * tokens * (tokens + 1) // 2
    activation = 4 * tokens * 4 * width
    ops = [
        traced("mm", 2 * tokens * width * 4 * width, 4 * tokens * width + activation),
        traced("silu", 0, 2 * activation),
        traced("mul", 0, 2 * activation),
        traced("_scaled_dot_product_flash_attention_for_cpu", 4 * (width // heads) * scores, 16 * tokens * width),
    ]
    predicted = 4 * sum(op_seconds(op, measured.rates, Topology(1)) for op in ops)
    assert 0.25 < predicted / shortest(layer) < 4


def _real_step_seconds(config: RunConfig) -> float:
    """CPU time of one thread of a real step of the same model, whatever else the machine does."""
    length = config.data.seq_len
    model = Transformer(config.model, config.model.vocab_size or 0)
    init_weights(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 256, (1, length + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(length)[None], Bounds.whole(1, length))
    times = []
    for _ in range(4):
        started = time.process_time()
        (model(batch).sum() / length).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.process_time() - started)
    return min(times)


def test_predicts_a_real_training_step_from_its_trace(measured: Calibration) -> None:
    """Traced on fake tensors, timed by measured rates, against the step itself (within 7 percent on a quiet core, on four models)."""
    settings = ["d_model=128", "n_heads=2", "n_kv_heads=1", "head_dim=64", "d_ff=352", "layers=[full]", "n_layers=2", "vocab_size=1024"]
    config = resolve(None, [*(f"model.{s}" for s in settings), "data.seq_len=1536", "train.device=cpu", "train.threads_per_rank=1"])
    trace = trace_step(target_of(config, DEVICES["cpu"]).request())
    predicted = predict_step(trace, measured.rates, Topology(1), tokens_per_step=1536, model_flops_per_step=1.0)
    assert predicted.exposed_communication_seconds == 0
    # Other processes share the caches while this runs, so only the order of magnitude is a test; benchmarks give the figures.
    assert 0.25 < predicted.step_seconds / _real_step_seconds(config) < 4


def _calibrate_links() -> tuple[float, float, float]:
    torch.set_num_threads(1)
    calibration._SECONDS_EACH = 0.002
    few = replace(calibration._CPU, matmul=((512, 512, 512),), attention=((2, 64, 32),), elementwise=(4096,), copy=4096)
    calibration._CPU = few  # this process ends with the test
    rates = calibrate(CPU, ranks_per_node=2).rates
    return rates.link, rates.link_latency, rates.matmul["fp32"].at(1e9)


def test_links_are_measured_when_a_process_group_runs() -> None:
    for link, latency, matmul in run_distributed(_calibrate_links, 2):
        assert link != 1e9 and 1e7 < link < 1e12  # 1e9 is what is assumed of gloo
        assert latency != 100e-6 and 1e-6 < latency < 1.0
        assert matmul > 1e9
