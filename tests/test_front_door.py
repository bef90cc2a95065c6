"""The command as a user types it: start-up time, bad usage, and runs that are stopped, killed or started by other launchers."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from longstride import main

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "longstride.py")]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "SLURM", "RANK", "WORLD_SIZE", "MASTER"))}


def run(*arguments: object, cwd: Path, prefix: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *map(str, arguments)], cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["runs"]])
def test_starts_in_half_a_second(arguments: list[str], tmp_path: Path) -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*arguments, cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.5  # processor time: what a wall clock shows on an idle machine


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["runs"],
        ["train", "--help-config"],
        ["plan", "debug_cpu"],
        ["train", "debug_cpu", "train.steps=x"],
        ["submit", "debug_cpu", "--device", "cpu", "--dry-run", "memory.plan=estimate"],
    ],
)
def test_does_without_torch(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path, prefix=[sys.executable, "-X", "importtime", str(ROOT / "longstride.py")])
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in modules
    assert not modules & {"torch", "datasets", "accelerate", "transformers", "tensorboard"}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["VERB"]),
        (["trian"], ["no verb 'trian'", "did you mean train?", "resume"]),
        (["--json", "runs"], ["no option --json before the verb"]),
        (["runs", "a", "b"], ["one word too many: b"]),
        (["plan", "debug_cpu", "--dev=cpu"], ["no option --dev=cpu"]),
        (["train"], ["CONFIG"]),
        (["train", "debug_cpu", "--nprocs", "2"], ["no option --nprocs", "did you mean --nproc?"]),
        (["train", "absent"], ["absent", ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))]),
        (["train", "debug_cup"], ["did you mean 'debug_cpu'"]),
        (["train", "debug_cpu", "train.stps=3"], ["command line", "'train.steps'"]),
        (["train", "debug_cpu", "--nproc", "2"], ["parallel", "1 ranks", "2 were started"]),
        (["train", "debug_cpu", "--nproc", "2", "train.steps=0"], ["train.steps", "> 0"]),
        (["train", "debug_cpu", "model.layers=[swa]", "memory.budget_gib=0.001"], ["memory.budget_gib"]),
        (["train", "debug_cpu", "parallel.cp=2", "memory.budget_gib=0.001", "memory.plan=estimate"], ["memory.budget_gib"]),
        (["train", "debug_cpu", "data.source=text", "data.path=absent.txt"], ["absent.txt"]),
        (["train", "debug_cpu", "data.tokenizer=absent.json"], ["data.tokenizer", "absent.json"]),
        (["plan", "debug_cpu", "--device", "abacus"], ["abacus", "h100"]),
        (["resume", "absent"], ["absent"]),
        (["eval", "absent"], ["absent"]),
        (["runs", "absent"], ["absent"]),
        (["monitor", "absent"], ["absent"]),
        (["report", "absent"], ["absent"]),
    ],
)
def test_bad_usage_exits_2_says_where_and_writes_nothing(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - set(CLEAN):
        monkeypatch.delenv(name)
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse's own
        code = end.code
    err = capsys.readouterr().err
    assert code == 2, err
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_version_says_which_one(tmp_path: Path) -> None:
    assert re.fullmatch(rf"longstride \S+.* in {re.escape(str(ROOT))}\n", run("--version", cwd=tmp_path).stdout)


@pytest.mark.parametrize("arguments", [[], ["train", "debug_cpu", "train.stps=3"]])
def test_a_process_ends_with_that_code(arguments: list[str], tmp_path: Path) -> None:
    """By argparse, and by a rule of ours."""
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_debug_shows_where(tmp_path: Path) -> None:
    done = run("train", "absent", "--debug", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_unexpected_exceptions_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr("trainer.config_file.find", fail)
    assert main(["train", "x"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: one two (not an expected error; --debug shows where)\n"


def test_ctrl_c_before_anything_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.config_file.find", interrupt)
    assert main(["train", "x"]) == 130


def test_plan_as_json_is_the_plan(tmp_path: Path) -> None:
    shown = json.loads(run("plan", "debug_cpu", "--device", "h100", "--json", cwd=tmp_path).stdout)
    assert shown["device"] == "h100" and shown["derived"]["peak_bytes"] > 0
    assert "planned peak" in run("plan", "debug_cpu", cwd=tmp_path).stdout


def test_runs_into_a_closed_pipe(tmp_path: Path) -> None:
    done = subprocess.run(f"{' '.join(COMMAND)} train --help-config | head -1", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "  engine  (native | deepspeed; default native)\n" and "Traceback" not in done.stderr


# --- small real runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("front_door")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} " + "to be or not to be " * 20}) + "\n" for n in range(40)))
    return place


def tiny(name: str, *more: str) -> list[str]:
    small = "data.source=jsonl data.path=text.jsonl data.cache_dir=tokens data.seq_len=64 model.d_model=16 model.n_heads=2 model.window=16"
    return ["train", "debug_cpu", f"run.name={name}", *small.split(), "train.eval_sequences=0", *more]


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in records(run_dir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(place: Path, name: str, *more: str) -> subprocess.Popen[str]:
    arguments = tiny(name, "train.steps=100000", *more)
    return subprocess.Popen([*COMMAND, *arguments], cwd=place, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def state(run_dir: Path) -> dict:
    return json.loads((run_dir / "state.json").read_text())


def test_one_rank_runs_in_this_process(place: Path) -> None:
    done = run(*tiny("one", "train.steps=2"), cwd=place)
    assert done.returncode == 0, done.stderr
    run_dir = place / "runs" / "one"
    assert [record["step"] for record in records(run_dir)] == [1, 2]
    assert state(run_dir)["status"] == "done"
    assert (run_dir / "config.yaml").is_file() and (run_dir / "memory_plan.json").is_file()
    assert f"memory timeline: {Path('runs/one/memory_timeline.html')}" in done.stderr
    assert (run_dir / "memory_timeline.html").is_file() and (run_dir / "memory_timeline.png").is_file()
    assert (run_dir / "code" / "longstride.py").read_text() == (ROOT / "longstride.py").read_text()
    log = (run_dir / "logs" / "rank_0.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log) and len(log) >= len(done.stdout.splitlines())
    assert [line for line in log if " step 2 | step 2/2 | loss " in line], "clock and step"
    again = run(*tiny("one", "train.steps=2"), cwd=place)
    assert again.returncode == 2 and "longstride resume" in again.stderr
    assert "one\tdone\t2/2" in run("runs", cwd=place).stdout
    evaluated = run("eval", "one", "--sequences", "1", cwd=place)
    assert evaluated.returncode == 0 and evaluated.stdout.startswith("step 2: "), evaluated.stderr
    asked = run("eval", "one", "--suite", "mqar,position", "--lengths", "300", "--samples", "2", "data.synthetic.pairs=3", cwd=place)
    assert asked.returncode == 0, asked.stderr
    kept = sorted(path.name for path in (run_dir / "evals").iterdir())
    assert kept == ["mqar_step_2.json", "mqar_step_2.png", "position_step_2.json", "position_step_2.png"]
    found = json.loads((run_dir / "evals" / "mqar_step_2.json").read_text())
    assert found["settings"]["pairs"] == 3 and sum(cell["questions"] for cell in found["cells"]) == 6
    assert f"mqar (guessing: {found['chance']:.1%}" in asked.stdout and "0 to 64" in asked.stdout and "256 to 300" in asked.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_saves_and_exits_75_and_resume_goes_on(place: Path, ranks: int) -> None:
    name = f"stopped_{ranks}"
    process = start(place, name, f"parallel.cp={ranks}", "memory.plan=estimate")
    run_dir = place / "runs" / name
    wait_for_step(process, run_dir, 2)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert state(run_dir)["status"] == "stopped"
    step = records(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    if ranks == 2:
        assert f"stopped by SIGUSR1 after step {step}" in (run_dir / "logs" / "rank_0.log").read_text() and "SIGUSR1: the 2 ranks" in err
    before = (run_dir / "config.yaml").read_text()
    assert run("resume", name, "optim.lr=1", cwd=place).returncode == 2
    assert (run_dir / "config.yaml").read_text() == before
    done = run("resume", name, f"train.steps={step + 2}", cwd=place)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(run_dir)] == list(range(1, step + 3))
    assert (run_dir / "config.before_resume_1.yaml").read_text() == before


def test_a_killed_rank_fails_the_run_and_says_who(place: Path) -> None:
    process = start(place, "killed", "parallel.cp=2", "memory.plan=estimate")
    run_dir = place / "runs" / "killed"
    wait_for_step(process, run_dir, 1)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "_rank" in child.cmdline()]
    assert len(ranks) == 2
    victim = next(child for child in ranks if child.environ()["RANK"] == "1")
    began = time.monotonic()
    victim.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 15
    assert "rank 1 of 2 was killed by SIGKILL (signal 9)" in err and "logs/rank_1.log" in err
    assert state(run_dir)["status"] == "failed"
    assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_started_by_torchrun(place: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "longstride.py")]
    done = run(*tiny("torchrun", "train.steps=2", "parallel.cp=2"), cwd=place, prefix=torchrun)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(place / "runs" / "torchrun")] == [1, 2]
    assert (place / "runs" / "torchrun" / "memory_timeline.html").is_file() and done.stderr.count("memory timeline: ") == 1
    wrong = run(*tiny("torchrun_wrong", "train.steps=2"), cwd=place, prefix=torchrun)
    assert wrong.returncode != 0 and "1 ranks, but 2 were started" in wrong.stderr
    assert not (place / "runs" / "torchrun_wrong").exists()


def accelerate(*options: str) -> list[str]:
    quiet = ["--num_machines", "1", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *quiet, *options, str(ROOT / "longstride.py")]


def test_started_by_accelerate(place: Path) -> None:
    two = accelerate("--cpu", "--num_processes", "2", "--mixed_precision", "no")
    done = run(*tiny("accelerate", "train.steps=2", "parallel.cp=2"), cwd=place, prefix=two)
    assert done.returncode == 0, done.stderr
    assert "longstride starts the 2 ranks" in done.stderr
    assert [record["step"] for record in records(place / "runs" / "accelerate")] == [1, 2]
    alone = run(*tiny("accelerate_alone", "train.steps=2"), cwd=place, prefix=two)
    assert alone.returncode != 0 and "connected to no other" in alone.stderr
    bf16 = run(
        *tiny("accelerate_bf16", "train.steps=2"),
        cwd=place,
        prefix=accelerate("--cpu", "--num_processes", "1", "--mixed_precision", "bf16"),
    )
    assert bf16.returncode != 0 and "train.precision=bf16" in bf16.stderr
    assert sorted(path.name for path in (place / "runs").glob("accelerate*")) == ["accelerate"]
