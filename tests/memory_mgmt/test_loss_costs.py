"""The planner's time of a loss in other tiles than the traced one is that of a trace in those tiles."""

import pytest

from memory_mgmt.cost_model import Rates
from memory_mgmt.devices import device_named
from memory_mgmt.problem import _Reader, baseline_policy
from parallel.dims import ParallelDims
from trainer.choosing import setting_of
from trainer.config import RunConfig
from trainer.step_trace import trace_request
from trainer.tracing import TraceRequest

VOCAB = 32_000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_tiles_cost_what_their_traces_say(precision: str) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"d_model": 1024, "n_heads": 8, "layers": ["full"]},
            "data": {"seq_len": 32_768},
            "train": {"precision": precision},
        }
    )
    rates, dims = Rates.from_device(device_named("h100"), cores=1), ParallelDims.from_config(config.parallel, 1)
    setting = setting_of(config, VOCAB, rates, dims, 1, budget=1 << 40, host=0, cuda=True)
    baseline = baseline_policy(setting)
    assert baseline.loss_tile_tokens == 2048

    def traced(tile: int) -> _Reader:
        policy = type(baseline)(baseline.layers, 1, tile, baseline.ffn_tile_tokens, baseline.memory_tile_tokens)
        return _Reader(trace_request(TraceRequest(config, VOCAB, "cpu", policy, whole=True).to_dict()), baseline, setting)

    known, found = traced(2048), []
    for tile in (512, 8192):
        truth = traced(tile).loss_seconds()
        expected = known.loss_seconds() + known.more_loss_seconds(tile)
        assert expected == pytest.approx(truth, rel=5e-3)
        found.append(truth)
    assert known.more_loss_seconds(2048) == 0
    assert found[0] > 1.03 * known.loss_seconds() > 1.03 * found[1]  # or all tiles were alike
