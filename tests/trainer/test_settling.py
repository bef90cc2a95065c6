"""Settings that are auto: the fastest mesh that fits, by the plan of each; the same experiment whatever mesh is chosen; presets in the
order in which they are wanted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memory_mgmt.plan import MemoryPlan
from models.errors import UserError
from parallel.dims import ParallelDims
from trainer import planning, settling
from trainer.config import RunConfig
from trainer.config_file import resolve
from trainer.settling import degrees_of, settled

HOME = Path(__file__).resolve().parents[2]
DEGREES = ("dp_replicate", "dp_shard", "cp")


def config(ranks=None, grad_accum=4, seq_len=65536, budget=None, recompute="none", **degrees):
    return RunConfig.model_validate(
        {
            "model": {"d_model": 256, "n_heads": 4, "layers": ["full"], "n_layers": 2},
            "data": {"seq_len": seq_len},
            "train": {"precision": "bf16", "grad_accum": grad_accum},
            "parallel": {"ranks": ranks, **dict.fromkeys(DEGREES, "auto"), **degrees},
            "memory": {"budget_gib": budget, "recompute": recompute},
        }
    )


def plan(chosen):
    return planning.plan_run(chosen, "h100", with_changes=False)


def seconds(made):
    assert made.prediction is not None
    return made.prediction.step_seconds


@pytest.fixture(scope="module")
def free():
    return settled(config(ranks=4), "h100")


def test_the_fastest_of_all_that_fit_is_chosen(free):
    plans = {one.words: plan(one.config) for one in free.tried if one.status == "fits"}
    assert len(plans) == 6 and len({round(seconds(one), 6) for one in plans.values()}) > 1
    fastest = min(seconds(one) for one in plans.values())
    assert seconds(plans[degrees_of(free.config)]) == fastest
    for one in free.tried:
        assert one.seconds == seconds(plans[one.words]) and one.peak_bytes == plans[one.words].peak_bytes
    assert degrees_of(free.config) in free.lines()[0] and len(free.lines()) == 7


def test_every_choice_is_the_same_experiment(free):
    for one in free.tried:
        assert one.config.global_batch_sequences == 4 and ParallelDims.from_config(one.config.parallel).world_size == 4
        assert one.config.parallel.ranks is None and not one.config.parallel.chosen_by_plan


def test_a_budget_that_only_split_sequences_keep_decides(free):
    by_cp = {one.config.parallel.cp: one.peak_bytes for one in free.tried}
    between = (by_cp[4] + by_cp[2]) / 2 / 2**30
    chosen = settled(config(ranks=4, budget=between), "h100")
    assert chosen.config.parallel.cp == 4 and plan(chosen.config).fits
    assert {one.status for one in chosen.tried if one.config.parallel.cp < 4} == {"does not fit"}
    nothing = settled(config(ranks=4, budget=by_cp[4] / 2 / 2**30), "h100")
    assert not plan(nothing.config).fits and nothing.config.parallel.cp == 4


def test_with_a_policy_to_choose_as_well(free):
    by_cp = {one.config.parallel.cp: one.peak_bytes for one in free.tried}
    budget = (by_cp[4] + by_cp[2]) / 2 / 2**30
    chosen = settled(config(ranks=2, grad_accum=2, budget=budget, recompute="auto", dp_replicate=1), "h100")
    made = plan(chosen.config)
    assert made.fits and made.policy is not None and [one.status for one in chosen.tried] == ["fits", "fits"]
    assert seconds(made) <= 1.02 * chosen.tried[0].seconds  # the ranking's problem sees more memory than the traced policy takes


@pytest.mark.parametrize("setting", ["memory.quantise=feed_forward", "optim.weights=bf16_stochastic"])
def test_settings_that_only_traces_know_do_not_stop_the_order_of_tries(setting):
    """Formulas guess what to try first; what they refuse by name must not reach them."""
    small = ["model.d_model=256", "model.n_heads=4", "model.layers=[full]", "model.n_layers=2", "data.seq_len=4096", "train.precision=bf16"]
    chosen = settled(
        resolve(None, [*small, "parallel.ranks=2", "train.grad_accum=2", "parallel.cp=auto", "parallel.dp_shard=auto", setting]), "h100"
    )
    assert [one.status for one in chosen.tried].count("fits") >= 1 and chosen.config.parallel.cp in (1, 2)


def test_tensor_parallel_ranks_are_considered_within_a_node():
    """One short sequence per step of a wide model: with parts of the weights nothing of them is gathered."""
    wide = {"d_model": 1024, "n_heads": 8, "n_kv_heads": 4, "layers": ["full"], "n_layers": 2, "vocab_size": 32000}
    values = config(ranks=8, grad_accum=1, seq_len=4096, dp_replicate=1, dp_shard=1, tp="auto").model_dump()
    chosen = settled(RunConfig.model_validate({**values, "model": wide}), "h100")
    degrees = {(one.config.parallel.cp, one.config.parallel.tp): one for one in chosen.tried}
    assert set(degrees) == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert "model.n_kv_heads 4" in degrees[1, 8].status and degrees[1, 8].status.startswith("refused")
    fits = {key: one for key, one in degrees.items() if one.status == "fits"}
    assert chosen.config is min(fits.values(), key=lambda one: one.seconds).config and chosen.config.parallel.tp == 4
    assert all(one.seconds == seconds(plan(one.config)) for one in fits.values())
    across = RunConfig.model_validate({**values, "model": wide, "parallel": {**values["parallel"], "ranks": 16, "cp": 1}})
    with pytest.raises(UserError, match=r"parallel\.tp 16 would cross nodes of 8 ranks"):
        settled(across, "h100")


def test_given_degrees_stay(free):
    chosen = settled(config(ranks=4, dp_replicate=2), "h100")
    assert chosen.config.parallel.dp_replicate == 2 and {one.config.parallel.dp_replicate for one in chosen.tried} == {2}
    assert chosen.config.global_batch_sequences == 8  # grad_accum passes of each of the two given replicas
    given = RunConfig()
    assert settled(given).config is given


def with_presets(budget, ranks=1, **changes):
    one = config(ranks=ranks, grad_accum=1, seq_len=4096, budget=budget, **changes)
    model = one.model.model_copy(update={"vocab_size": 32768})
    return one.model_copy(update={"model": model, "optim": one.optim.model_copy(update={"preset": "auto"})})


def test_the_most_wanted_preset_that_fits_is_taken():
    free = settled(with_presets(None, dp_replicate=1, dp_shard=1, cp=1), "h100")
    assert free.config.optim.preset == "adamw" and len(free.tried) == 1
    peak = free.tried[0].peak_bytes / 2**30
    tight = settled(with_presets(peak - 0.03, dp_replicate=1, dp_shard=1, cp=1), "h100")
    assert tight.config.optim.preset == "adamw_8bit" and plan(tight.config).fits
    assert [(one.words, one.status) for one in tight.tried] == [("adamw", "does not fit"), ("adamw_8bit", "fits")]
    assert tight.lines()[0] == "chosen: adamw_8bit, of 2 possible"
    hopeless = settled(with_presets(0.1, dp_replicate=1, dp_shard=1, cp=1), "h100")
    assert hopeless.config.optim.preset == "adamw_8bit" and not plan(hopeless.config).fits


def test_a_preset_takes_only_settings_that_it_reads():
    asked = with_presets(None, dp_replicate=1, dp_shard=1, cp=1)
    optim = {"preset": "auto", "allowed": ["adamw", "galore"], "rank": 16, "lr": 1e-3}
    chosen = settled(RunConfig.model_validate({**asked.model_dump(), "optim": optim}), "h100").config.optim
    assert chosen.preset == "adamw" and chosen.rank is None and chosen.lr == 1e-3
    assert chosen.model_validate(chosen.model_dump()) == chosen  # as a run directory reads it back
    with pytest.raises(ValueError, match="rank is not read by preset adamw, sgd"):
        RunConfig.model_validate({"optim": {**optim, "allowed": ["adamw", "sgd"]}})


def test_a_preset_that_other_settings_refuse_is_left_out():
    asked = with_presets(0.1, dp_replicate=1, dp_shard=1, cp=1)
    host = asked.model_copy(update={"memory": asked.memory.model_copy(update={"offload_optimizer": "host", "offload_parameters": "host"})})
    chosen = settled(host, "h100")
    assert chosen.config.optim.preset == "adamw"
    assert chosen.tried[-1].words == "adamw_8bit" and "moves parameters with adamw's states" in chosen.tried[-1].status


def test_tries_stop_at_the_time_limit(monkeypatch):
    monkeypatch.setattr(settling, "TIME_LIMIT", -1.0)
    chosen = settled(config(ranks=4), "h100")
    assert {one.status for one in chosen.tried} == {"not tried"} and chosen.config.parallel.cp == 1


@pytest.mark.parametrize(
    ("wrong", "ranks", "words"),
    [
        ({}, None, "set parallel.ranks or --nproc"),
        ({"ranks": 4}, 2, "parallel.ranks: 4, but 2 were started"),
        ({"ranks": 3, "grad_accum": 1}, None, "(?s)no degrees for 3 ranks.*sequences per step are not divisible.*data.seq_len"),
    ],
)
def test_what_cannot_be_chosen_says_why(wrong, ranks, words):
    with pytest.raises(UserError, match=words):
        settled(config(**wrong), "h100", ranks)


def test_formulas_choose_no_degrees():
    with pytest.raises(UserError, match="memory.plan at trace"):
        settled(resolve(HOME / "configs" / "debug_cpu.yaml", ["parallel.cp=auto", "parallel.ranks=2", "memory.plan=estimate"]))


def test_ranks_must_be_the_product_of_given_degrees():
    with pytest.raises(UserError, match="parallel.ranks 3 is not .* = 2; leave it null"):
        resolve(HOME / "configs" / "debug_cpu.yaml", ["parallel.cp=2", "parallel.ranks=3"])
    with pytest.raises(UserError, match="neither a whole number nor auto"):
        resolve(HOME / "configs" / "debug_cpu.yaml", ["parallel.cp=automatic"])
    with pytest.raises(UserError, match="auto has not been resolved"):
        ParallelDims.from_config(config(ranks=2).parallel)


SMALL = "data.seq_len=64 model.d_model=16 model.n_heads=2 model.window=16 data.source=jsonl data.path=text.jsonl data.cache_dir=tokens"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("started", [[sys.executable], TORCHRUN], ids=["own ranks", "torchrun"])
def test_a_run_holds_what_was_chosen(tmp_path, started):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"the {n} of the many words"}) + "\n" for n in range(40)))
    own = ["--nproc", "2"] if len(started) == 1 else []
    settings = [
        "parallel.cp=auto",
        "parallel.dp_shard=auto",
        "train.grad_accum=2",
        "train.steps=1",
        "train.eval_sequences=0",
        "run.name=it",
    ]
    command = [*started, str(HOME / "longstride.py"), "train", "debug_cpu", *own, *SMALL.split(), *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("chosen: ") == 1
    run_dir = tmp_path / "runs" / "it"
    held = resolve(run_dir / "config.yaml")
    assert not held.parallel.chosen_by_plan and held.global_batch_sequences == 2
    assert MemoryPlan.from_json((run_dir / "memory_plan.json").read_text()).ranks == 2
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_sweep_over_gpus_chooses_in_every_row():
    command = [sys.executable, str(HOME / "longstride.py"), "plan", "debug_cpu", "parallel.cp=auto", "parallel.dp_shard=auto"]
    command += ["train.grad_accum=2", "--sweep", "gpus=1,2", "--device", "h100", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["ranks"] for row in rows] == [1, 2] and "auto" not in done.stdout and all(row["fits"] for row in rows)
