"""memory.recompute auto: the chosen policy fits by its own traced step, and more memory never makes the step slower."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from memory_mgmt.cost_ops import op_class
from memory_mgmt.cost_rates import cpu_rates
from memory_mgmt.devices import device_named
from memory_mgmt.plan_view import policy_lines
from memory_mgmt.planner_problem import Problem
from memory_mgmt.policy import KEEP_ALL, Policy
from models.config import ModelConfig
from models.errors import UserError
from parallel.dims import ParallelDims
from tests.memory_mgmt.planner_cases import gpt
from trainer import choosing, planning
from trainer.choosing import choose_policy, setting_of
from trainer.config import DataSection, RunConfig, TrainSection
from trainer.step_trace import trace_request
from trainer.tracing import TraceRequest, trace_step

HOME = Path(__file__).resolve().parents[2]


def config(budget=None, offload="none", layers=("full",), **memory):
    return RunConfig.model_validate(
        {
            "model": {"d_model": 512, "n_heads": 4, "layers": list(layers), "n_layers": 4},
            "data": {"seq_len": 131072},
            "train": {"precision": "bf16"},
            "memory": {"recompute": "auto", "budget_gib": budget, "offload": offload, **memory},
        }
    )


def plan(budget, device="h100", **settings):
    return planning.plan_run(config(budget, **settings), device, with_changes=False)


@pytest.fixture(scope="module")
def free():
    return plan(None)


def test_everything_is_kept_where_there_is_room(free):
    assert free.fits and set(free.policy.layers) == {KEEP_ALL} and "nothing" in free.binding


def test_less_memory_is_kept_within_and_not_faster(free):
    fixed = sum(term.bytes for term in free.terms if term.kind in ("outside", "overhead"))
    lean = plan((fixed + 0.55 * (free.peak_bytes - fixed)) / 2**30)
    leaner = plan((fixed + 0.40 * (free.peak_bytes - fixed)) / 2**30)
    assert lean.fits and leaner.fits and leaner.peak_bytes < lean.peak_bytes < free.peak_bytes
    recomputed = [p.policy.layers[2].feed_forward.recompute + p.policy.layers[2].mixer.recompute for p in (free, lean, leaner)]
    assert recomputed[0] == 0 and recomputed[2] > 0
    seconds = [p.prediction.step_seconds for p in (free, lean, leaner)]
    assert seconds[0] <= seconds[1] * 1.02 and seconds[1] <= seconds[2] * 1.02
    assert "device memory" in leaner.binding


def test_host_memory_is_used_only_where_it_is_allowed(free):
    fixed = sum(term.bytes for term in free.terms if term.kind in ("outside", "overhead"))
    budget = (fixed + 0.40 * (free.peak_bytes - fixed)) / 2**30
    without, with_host = plan(budget), plan(budget, offload="kept")
    assert without.policy is not None and all(layer.input.swap == 0 for layer in without.policy.layers)
    assert with_host.fits and with_host.host_bytes >= 0


def test_what_cannot_fit_names_the_smallest_budget():
    small = planning.plan_run(config(0.7, offload="kept"), "h100")  # hardly more than a CUDA context
    assert not small.fits and "nothing fits" in small.binding
    assert small.smallest_budget_gib > 0.7
    assert {change.settings for change in small.changes} <= {
        "parallel.cp=2",
        "memory.offload_optimizer=host",
        "memory.offload_optimizer=host memory.offload_parameters=host",
    }
    assert all(change.peak_bytes < small.peak_bytes for change in small.changes)


def test_formulas_cannot_choose():
    with pytest.raises(UserError, match=r"memory\.recompute: auto needs a traced step"):
        planning.plan_run(config(None, plan="estimate"), "h100")


def test_formulas_do_not_know_eight_bits():
    with pytest.raises(UserError, match=r"memory\.quantise: feed_forward needs a traced step; leave memory\.plan at trace"):
        planning.plan_run(config(None, recompute="none", quantise="feed_forward", plan="estimate"), "h100")


def test_eight_bits_are_chosen_where_they_are_allowed_and_cheaper():
    """On a CPU, where making gate and up again takes longer than reading and writing them in eight bits."""
    cfg = config(quantise="feed_forward").model_copy(update={"train": TrainSection(precision="fp32")})
    model = ModelConfig(d_model=512, n_heads=8, n_layers=2, layers=("full",))
    cfg = cfg.model_copy(update={"data": DataSection(seq_len=4096), "model": model})

    def trace(policy):
        return trace_request(TraceRequest(cfg, 320, "cpu", policy, whole=True).to_dict())

    def peak(trace):
        return trace.peak()[0]

    budget = int(0.7 * peak(trace(Policy((KEEP_ALL,) * 2, loss_tile_tokens=512))))
    dims = ParallelDims.from_config(cfg.parallel, 1)
    setting = setting_of(cfg, 320, cpu_rates(1), dims, 1, budget=budget, host=0, cuda=False)
    found = choose_policy(setting, trace, peak)
    assert found.choice is not None and peak(found.trace) <= budget
    assert sum(layer.feed_forward.quantise for layer in found.policy.layers) > 0.2
    assert any("feed-forward" in line and "eight bits" in line for line in policy_lines(found.policy))
    plain = cfg.model_copy(update={"memory": cfg.memory.model_copy(update={"quantise": "none"})})
    assert setting_of(plain, 320, cpu_rates(1), dims, 1, budget=budget, host=0, cuda=False).quantise == ()


def test_a_pretended_gpu_is_traced_with_its_own_kernels():
    cfg = config(None)
    cfg = cfg.model_copy(update={"memory": cfg.memory.model_copy(update={"recompute": "none"})})
    trace = trace_step(TraceRequest(cfg, 320, "cuda"))
    names = {op.name for op in trace.ops}
    assert {"aten::_flash_attention_forward", "aten::_flash_attention_backward", "aten::silu_backward"} <= names
    # The update takes a group's parameters at once, in place: it reads four numbers for each, and the counts of steps, and writes three.
    updates = [op for op in trace.ops if op.name == "aten::_fused_adamw_"]
    assert {op.layer for op in updates} == {None, 0, 1, 2, 3} and "aten::_foreach_sqrt" not in names
    parameters = [b.requested for b in trace.of("device") if b.kind == "parameter"]
    assert sum(op.bytes for op in updates) == 7 * sum(parameters) + 4 * len(parameters)
    assert not any("scaled_dot_product_flash_attention_for_cpu" in name or name == "aten::bmm" for name in names)
    assert all(b.size % 512 == 0 for b in trace.of("device")) and trace.device == "cuda"
    # Token ids come from host memory, and no activation is ever as large as all scores would be.
    assert 0 < trace.peak("host")[0] < 2**23
    assert max(b.size for b in trace.of("device") if b.kind == "skeletal") < 131072 * 4096


def test_a_pretended_hopper_is_traced_with_cudnn_unless_it_must_be_deterministic():
    cfg = config(None)
    free = {"memory": cfg.memory.model_copy(update={"recompute": "none"}), "train": cfg.train.model_copy(update={"deterministic": False})}
    trace = trace_step(TraceRequest(cfg.model_copy(update=free), 320, "cuda", capability=(9, 0)))
    of_cudnn = [op for op in trace.ops if "cudnn_attention" in op.name]
    assert {op.name.removesuffix("_backward") for op in of_cudnn} == {"aten::_scaled_dot_product_cudnn_attention"}
    assert all(op.flops > 0 for op in of_cudnn) and {op_class(op) for op in of_cudnn} == {"attention_forward", "attention_backward"}


def test_planning_leaves_torch_out_of_the_process(tmp_path):
    code = (
        "import sys; from trainer.config import RunConfig; from trainer.planning import plan_run\n"
        "p = plan_run(RunConfig.model_validate({'data': {'seq_len': 256}, 'model': {'d_model': 32, 'n_heads': 2}}), 'h100')\n"
        "assert p.method == 'traced step' and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HOME, timeout=120)


def test_a_step_that_cannot_be_traced_is_refused_with_the_reason():
    broken = TraceRequest(config(None), -5, "cpu", None)  # recompute auto without a policy
    with pytest.raises(UserError, match="could not be traced") as error:
        trace_step(broken)
    assert "memory.plan=estimate" in str(error.value)


def test_devices_without_rates_can_be_planned_but_not_chosen_for():
    assert device_named("cpu").name == "cpu"
    unknown = planning.Device("Some GPU", 2**36, {}, ("SOME",))
    with pytest.raises(UserError, match="--calibrate"):
        planning._chosen(planning.target_of(config(None), unknown), with_changes=False)


def test_host_memory_that_a_traced_step_takes_too_much_of_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles may round shares up: the policy whose traced step takes more than is allowed is not taken, though the device has room."""
    asked, traces = [], {"a": 130, "b": 119}
    dims = ParallelDims.from_config(config().parallel, 1)
    setting = replace(setting_of(config(), 320, cpu_rates(1), dims, 1, budget=1000, host=120, cuda=True), host_bytes=117)
    monkeypatch.setattr(choosing, "problem_of_trace", lambda *_: gpt(65536, budget=1000, host=117 * 8))

    def solved(problem: Problem, *_: object) -> SimpleNamespace:
        asked.append(problem.host_bytes)
        policy = "a" if len(asked) == 1 else "b"
        return SimpleNamespace(policy=policy, seconds=10.0, extra_seconds=1.0, peak_bytes=995)

    def traced(policy: object) -> SimpleNamespace:
        return SimpleNamespace(peak=lambda place: (traces.get(str(policy), 0), 0))

    monkeypatch.setattr(choosing, "solve", solved)
    chosen = choose_policy(setting, traced, lambda trace: 995)
    assert chosen.policy == "b" and asked == [117, 107]


def test_a_choice_that_saves_next_to_nothing_is_not_traced() -> None:
    def choice(seconds: float, tile: int, extra: float = 0.04) -> SimpleNamespace:
        return SimpleNamespace(policy=Policy((KEEP_ALL,), ffn_tile_tokens=tile), seconds=seconds, extra_seconds=extra)

    known = choice(10.0, 512)
    assert not choosing._much_the_same(choice(9.9995, 512), choice(10.0, 512, extra=0.06))
    assert [choosing._much_the_same(choice(*one), known) for one in ((9.9995, 512), (9.998, 512), (9.9995, 1024))] == [True, False, False]
