"""memory.offload_optimizer auto: host where it is needed or faster, and the plan says which."""

from pathlib import Path

import pytest

from memory_mgmt.devices import device_named
from memory_mgmt.plan import MemoryPlan, Prediction, Term, refusal
from memory_mgmt.plan_view import plain
from memory_mgmt.problem import baseline_policy, problem_of_trace
from models.errors import UserError
from parallel.dims import ParallelDims
from trainer import planning, settling
from trainer.choosing import setting_of
from trainer.choosing_offload import as_planned, resolve_offload
from trainer.config import RunConfig
from trainer.config_file import resolve
from trainer.plan_files import planned_trace
from trainer.planning import same_step
from trainer.tracing import trace_step

GIB = 2**30
HOME = Path(__file__).resolve().parents[2]


def config(where="auto", **memory):
    return RunConfig.model_validate(
        {
            "model": {"d_model": 512, "n_heads": 4, "layers": ["full"], "n_layers": 4},
            "data": {"seq_len": 256},
            "memory": {"offload_optimizer": where, **memory},
        }
    )


def plan_with(peak, seconds=1.0, recompute=0.0, host=0, device="h100"):
    prediction = Prediction(seconds, 1.0, None, seconds, recompute, 0.0, 0.0, 0, 0) if seconds else None
    terms = (Term("all", "transient", peak, peak),)
    return MemoryPlan("m", device, 1, terms, (), 100, None, host_bytes=host, host_budget_bytes=50, prediction=prediction)


@pytest.mark.parametrize(
    ("none", "host", "recompute", "expected", "asked"),
    [
        (plan_with(90), plan_with(50), "none", "none", 1),  # it fits, and nothing would be faster
        (plan_with(90, seconds=None), plan_with(50), "auto", "none", 1),
        (plan_with(110), plan_with(50), "none", "host", 2),
        (plan_with(110, seconds=None), plan_with(50, seconds=None), "none", "host", 2),
        (plan_with(110), plan_with(50, host=51), "none", "none", 2),  # there is no such host memory
        (plan_with(300), plan_with(200), "none", "host", 2),  # nearer
        (plan_with(300), plan_with(200, host=51), "none", "none", 2),
        (plan_with(90), plan_with(50, seconds=0.5), "auto", "none", 1),  # nothing is recomputed that could be kept
        (plan_with(90, recompute=0.2), plan_with(50, seconds=0.9), "auto", "host", 2),
        (plan_with(90, recompute=0.2), plan_with(50, seconds=1.1), "auto", "none", 2),
        (plan_with(90, recompute=0.2), plan_with(50, seconds=0.5), "block", "none", 1),  # a fixed policy recomputes all the same
        (plan_with(110, device="cpu"), plan_with(50, device="cpu"), "none", "none", 1),
    ],
)
def test_the_better_of_both(none, host, recompute, expected, asked):
    calls = []

    def plan(cfg):
        calls.append(cfg.memory.offload_optimizer)
        return {"none": none, "host": host}[calls[-1]]

    chosen, its_plan = resolve_offload(config(recompute=recompute), plan)
    assert chosen.memory.offload_optimizer == expected and its_plan is {"none": none, "host": host}[expected]
    assert calls == ["none", "host"][:asked] and chosen == config(expected, recompute=recompute)


@pytest.mark.parametrize("where", ["none", "host"])
def test_what_is_said_is_done(where):
    assert resolve_offload(config(where), lambda cfg: plan_with(110))[0] == config(where)


# --- traced -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    return [planning.plan_run(config(where), "h100", with_changes=False) for where in ("none", "host")]


def test_states_leave_the_device_for_the_node(both):
    here, there = both
    states = next(term.bytes for term in here.terms if term.name == "optimizer states")
    assert (here.offload_optimizer, there.offload_optimizer) == ("none", "host")
    assert states > 64 * 2**20 and there.host_bytes - here.host_bytes == pytest.approx(states, rel=0.01)
    assert here.peak_bytes - states <= there.peak_bytes < here.peak_bytes
    # What stays: each of the 39 parameters' count of steps, which the fused update reads on the device.
    assert [term.bytes for term in there.terms if term.name == "optimizer states"] == [39 * 512]
    assert there.prediction.copied_bytes - here.prediction.copied_bytes == pytest.approx(2 * states, rel=0.01)
    assert "the optimizer's states live there" in plain(there) and "live there" not in plain(here)
    assert there.prediction.exposed_copy_seconds > here.prediction.exposed_copy_seconds


def test_auto_takes_host_memory_only_where_it_must(both):
    here, there = both
    between = (here.peak_bytes + there.peak_bytes) / 2 / GIB
    roomy, tight = planning.plan_run(config(), "h100"), planning.plan_run(config(budget_gib=between), "h100")
    assert roomy.offload_optimizer == "none" and roomy.peak_bytes == here.peak_bytes
    assert tight.offload_optimizer == "host" and tight.fits and tight.peak_bytes == there.peak_bytes
    read = MemoryPlan.from_json(tight.to_json())
    assert read.offload_optimizer == "host" and as_planned(config(), read).memory.offload_optimizer == "host"
    assert planned_trace(config(budget_gib=between), tight, "h100").peak()[0] < planned_trace(config(), roomy, "h100").peak()[0]
    assert same_step(config(), config()) and not same_step(config(), config("host"))


@pytest.mark.parametrize("settings", [{}, {"recompute": "auto"}])
def test_a_plan_that_does_not_fit_offers_it(settings):
    def offered(device, where):
        target = planning.target_of(config(where, **settings), device_named(device))
        return "memory.offload_optimizer=host" in {text for text, _, _ in planning._options(target)}

    assert offered("h100", "none") and not offered("h100", "host") and not offered("cpu", "none")


def test_degrees_are_tried_with_both_places(monkeypatch):
    def tried(target, words):
        host = target.config.memory.offload_optimizer == "host"
        assert target.config.memory.offload_optimizer in ("none", "host")
        return settling.Tried(target.config, words, "fits" if host else "does not fit", 2.0 if host else 1.0, 100)

    monkeypatch.setattr(settling, "_try_placed", tried)
    for device, status in (("h100", "fits"), ("cpu", "does not fit")):
        found = settling._try(planning.target_of(config(), device_named(device)), "cp 1")
        assert found.status == status and found.config == config()  # which place it is stays the plan's to say


def test_host_memory_is_one_budget(both):
    """What the planner may swap is what the states leave of memory.host_gib; and they never go to disk."""
    there = both[1]
    little = {"host_gib": 0.9 * there.host_bytes / GIB}
    for settings in (little, {**little, "offload_dir": "/tmp"}):
        plan = planning.plan_run(config("host", **settings), "h100", with_changes=False)
        assert not plan.fits and not plan.host_fits and plan.peak_bytes == there.peak_bytes
        assert "memory.offload_optimizer=none" in refusal(plan)
    target = planning.target_of(config("host", recompute="auto", offload="kept"), device_named("h100"))
    dims = ParallelDims.from_config(target.config.parallel, 1)
    setting = setting_of(target.config, target.vocab_size, planning.rates_of(target.device), dims, 1, budget=GIB, host=GIB, cuda=True)
    baseline = baseline_policy(setting)
    problem = problem_of_trace(trace_step(target.request(baseline)), baseline, setting)
    assert setting.host_bytes - problem.host_bytes == pytest.approx(there.host_bytes, abs=2**20)


def test_formulas_count_it_too(both):
    estimated = [planning.plan_run(config(where, plan="estimate"), "h100") for where in ("none", "host")]
    for plan, traced in zip(estimated, both, strict=True):
        assert plan.offload_optimizer == traced.offload_optimizer
        assert plan.host_bytes == pytest.approx(traced.host_bytes, rel=0.05) or plan.offload_optimizer == "none"
    saved = [estimated[0].peak_bytes - estimated[1].peak_bytes, both[0].peak_bytes - both[1].peak_bytes]
    assert saved[0] == pytest.approx(saved[1], rel=0.3)
    tight = config(plan="estimate", budget_gib=(estimated[0].peak_bytes + estimated[1].peak_bytes) / 2 / GIB)
    assert planning.plan_run(tight, "h100").offload_optimizer == "host"


def test_an_unknown_place_is_refused():
    with pytest.raises(UserError, match=r"memory\.offload_optimizer"):
        resolve(HOME / "configs/debug_cpu.yaml", ["memory.offload_optimizer=disk"])
