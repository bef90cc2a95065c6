"""submit, resume --submit, cancel and runs against commands that stand in for Slurm's and write down what they were asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longstride import main
from models.errors import RunFailed
from slurm import attempts, health
from slurm.submission import read_submission
from trainer.run_dir import RunDir

SMALL = ["memory.plan=estimate", "parallel.cp=4", "data.seq_len=64", "model.d_model=16", "model.n_heads=2", "model.window=16"]
SUBMIT = ["submit", "debug_cpu", *SMALL, "--device", "cpu"]


class FakeSlurm:
    """sbatch, squeue and scancel that answer what a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sbatch", "squeue", "scancel"):
            self.answer(name, "")

    def answer(self, command: str, text: str, code: int = 0) -> None:
        (self.folder / f"{command}.txt").write_text(text)
        script = f'#!/bin/sh\nprintf "%s\\n" "$0 $*" >> "$0.calls"\ncat "$0.txt" {">&2" if code else ""}\nexit {code}\n'
        (self.folder / command).write_text(script)
        (self.folder / command).chmod(0o755)

    def calls(self, command: str) -> list[str]:
        path = self.folder / f"{command}.calls"
        return [line.removeprefix(f"{self.folder}/") for line in path.read_text().splitlines()] if path.exists() else []

    def queue(self, *jobs: tuple[str, str, str, str, str]) -> None:
        self.answer("squeue", "".join("|".join(job) + "\n" for job in jobs))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr("slurm.site.user_config_dir", lambda name: str(tmp_path / name))
    fake = FakeSlurm(tmp_path / "bin")
    fake.answer("sbatch", "41;cluster\n")
    return fake


def submitted(slurm: FakeSlurm, *more: str) -> RunDir:
    assert main([*SUBMIT, "run.name=a", *more]) == 0
    return RunDir("runs/a")


def test_a_submitted_run_has_everything_a_job_needs(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = submitted(slurm, "--nodes", "2", "--time", "1-00:00:00", "--partition", "long", "--dependency", "afterok:7")
    out = capsys.readouterr()
    assert "job 41 queued" in out.out and "longstride cancel runs/a" in out.out and "planned peak" in out.err
    assert slurm.calls("sbatch") == ["sbatch --parsable -- runs/a/slurm/job.sbatch"]
    script = (run_dir.slurm / "job.sbatch").read_text()
    for line in (
        '--time="1-00:00:00"',
        '--partition="long"',
        '--dependency="afterok:7"',
        "--nodes=2",
        f'--chdir="{run_dir.path.resolve()}"',
    ):
        assert f"#SBATCH {line}\n" in script
    assert "--nproc-per-node=2 " in script and "gpus" not in script
    assert run_dir.config.is_file() and run_dir.memory_plan.is_file()
    for file in ("longstride.py", "slurm/job.sbatch", "memory_mgmt/timeline_page.html"):
        assert (run_dir.code / file).is_file()
    assert run_dir.path.stat().st_mode & 0o777 == 0o700, "the settings may name what is nobody else's business"
    state = run_dir.read_state()
    assert state is not None and (state.status, state.reason) == ("queued", "job 41")
    assert read_submission(run_dir).token in script


def test_a_dry_run_prints_the_script_and_writes_nothing(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "run.root=my $(touch PWNED) runs", "run.name=a", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n") and f"run='{Path.cwd()}/my $(touch PWNED) runs/a'" in script
    assert list(Path.cwd().iterdir()) == [] and slurm.calls("sbatch") == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["submit", "debug_cpu", *SMALL], ["--device", "h100 or cpu", "site.yaml"]),
        ([*SUBMIT, "--nodes", "3"], ["--nodes", "4 ranks", "3 nodes"]),
        ([*SUBMIT, "--nodes", "0"], ["--nodes"]),
        ([*SUBMIT, "memory.budget_gib=0.0001"], ["memory.budget_gib", "nothing was queued", "--force"]),
        ([*SUBMIT, "--device", "abacus"], ["--device", "abacus"]),
        ([*SUBMIT, "train.stps=1"], ["train.steps"]),
        ([*SUBMIT, "--account", "two\nlines"], ["--account", "line break"]),
        ([*SUBMIT, "--time", "a day"], ["--time", "'a day' is no time limit", "24:00:00"]),
        ([*SUBMIT, "--time", "2"], ["--time", "as soon as it begins", "warn_seconds"]),
        (["cancel", "absent"], ["absent"]),
        (["resume", "absent", "--submit"], ["absent"]),
    ],
)
def test_bad_usage_queues_and_writes_nothing(
    slurm: FakeSlurm, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert slurm.calls("sbatch") == [] and list(Path.cwd().iterdir()) == []


def test_without_slurm_nothing_is_planned_or_made(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slurm.client.shutil.which", lambda command: None)
    assert main([*SUBMIT, "run.name=a"]) == 2
    error = capsys.readouterr().err
    assert "sbatch: not found; is this a machine with Slurm?" in error and "planned peak" not in error
    assert list(Path.cwd().iterdir()) == []
    assert main([*SUBMIT, "--dry-run"]) == 0


def test_what_does_not_fit_is_queued_when_someone_insists(slurm: FakeSlurm) -> None:
    submitted(slurm, "memory.budget_gib=0.0001", "--force")
    assert len(slurm.calls("sbatch")) == 1


def test_a_refusal_of_slurm_is_told_and_the_run_can_be_submitted_later(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer("sbatch", "sbatch: error: invalid partition specified: long\n", code=1)
    assert main([*SUBMIT, "run.name=a", "--partition", "long", "--nodes", "2"]) == 2
    error = capsys.readouterr().err
    assert "sbatch: invalid partition specified: long" in error and "longstride resume runs/a --submit" in error
    assert main([*SUBMIT, "run.name=a"]) == 2 and "exists and is not empty" in capsys.readouterr().err
    slurm.answer("sbatch", "42\n")
    assert main(["resume", "a", "train.steps=30", "--submit", "--partition", "short"]) == 0
    script = Path("runs/a/slurm/job.sbatch").read_text()
    assert '--partition="short"' in script and "--nodes=2" in script, "options are those of the last job unless given"
    assert read_submission(RunDir("runs/a")).job_id == "42" and "steps: 30" in Path("runs/a/config.yaml").read_text()


def test_changes_of_the_experiment_need_to_be_allowed(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = submitted(slurm)
    before = run_dir.config.read_text()
    assert main(["resume", "a", "optim.lr=1e-5", "--submit"]) == 2
    assert "--allow optim.lr" in capsys.readouterr().err and run_dir.config.read_text() == before
    assert main(["resume", "a", "optim.lr=1e-5", "--allow", "optim.beta1", "--allow", "optim.lr", "--submit"]) == 2
    assert "--allow optim.beta1: this setting is not changed" in capsys.readouterr().err
    assert main(["resume", "a", "optim.lr=1e-5", "--allow", "optim.lr", "--submit"]) == 0
    assert (run_dir.path / "config.before_resume_1.yaml").read_text() == before and run_dir.config.read_text() != before
    assert main(["resume", "a", "run.private=false", "--submit"]) == 0
    assert run_dir.path.stat().st_mode & 0o777 == 0o755
    assert main(["resume", "a", "--nodes", "2"]) == 2
    assert "--nodes: is of a Slurm job; add --submit" in capsys.readouterr().err


def test_a_run_whose_job_lives_is_not_submitted_twice(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    token = read_submission(submitted(slurm)).token
    slurm.queue(("41", "PENDING", "", "Priority", f"longstride {token}"))
    assert main(["resume", "a", "--submit"]) == 2
    assert "41 is PENDING" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "shown"),
    [
        (("41", "PENDING", "", "Resources", "longstride {}"), ("queued", "job 41 pending (Resources)")),
        (("41", "RUNNING", "n[1-2]", "None", "longstride {}"), ("starting", "job 41 running on n[1-2]")),
        (("41", "RUNNING", "n1", "None", "longstride another"), ("died", "no longer in the queue")),
        (("41", "RUNNING", "n1", "None", "a note | with bars"), ("died", "no longer in the queue")),
        (("43_2", "RUNNING", "n1", "None", "(null)"), ("died", "no longer in the queue")),
    ],
)
def test_runs_shows_the_queue_and_knows_a_job_by_its_token(
    slurm: FakeSlurm, job: tuple[str, str, str, str, str], shown: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    token = read_submission(submitted(slurm)).token
    slurm.queue((*job[:4], job[4].format(token)))
    capsys.readouterr()
    assert main(["runs"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split("\t")
    assert line[1] == shown[0] and shown[1] in line[-1]


def test_a_run_that_has_saved_and_is_about_to_end_does_not_start(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = submitted(slurm)
    slurm.queue(("41", "RUNNING", "n1", "None", f"longstride {read_submission(run_dir).token}"))

    def shown() -> tuple[str, str]:
        capsys.readouterr()
        assert main(["runs"]) == 0
        line = capsys.readouterr().out.splitlines()[1].split("\t")
        return line[1], line[-1]

    attempts.start(run_dir, "41", "n1")
    run_dir.write_state("stopped", step=3, reason="stopped by SIGUSR1")
    assert shown() == ("stopped", "job 41 running on n1; stopped by SIGUSR1")
    attempts.start(run_dir, "41", "n1")
    assert shown() == ("starting", "job 41 running on n1; stopped by SIGUSR1")


def test_runs_without_an_answer_shows_what_directories_say(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(slurm)
    slurm.answer("squeue", "squeue: error: no DNS\nsqueue: error: no DNS\nsqueue: fatal: no   configuration\n", code=1)
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert "a\tqueued" in out and err.endswith("\nnote: squeue: no DNS; no configuration; the table shows what run directories say\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("41|TIMEOUT|0:0|n[1-2]|a|longstride {}", "job 41 ended TIMEOUT on n[1-2]; its job is no longer in the queue"),
        ("41|OUT_OF_MEMORY|0:125|n1|a|", "job 41 ended OUT_OF_MEMORY (exit code 0:125) on n1; its job"),
        ("41|CANCELLED by 0|0:15||a|", "job 41 ended CANCELLED (exit code 0:15); its job"),
        ("41|COMPLETED|0:0|n1|another|", "its job is no longer in the queue"),
        ("41|COMPLETED|0:0|n1|a|longstride another", "its job is no longer in the queue"),
        ("", "its job is no longer in the queue"),
    ],
)
def test_accounting_says_why_a_job_is_gone(slurm: FakeSlurm, line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A number that Slurm gave again is told by the comment, or by the name where comments are not kept."""
    token = read_submission(submitted(slurm)).token
    slurm.answer("sacct", line.format(token) + "\n")
    capsys.readouterr()
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out.splitlines()[1].split("\t")
    assert shown[1] == "died" and shown[-1].startswith(told), shown
    assert shown[-3:-1] == ["41", "-"] and len(slurm.calls("sacct")) == 1
    slurm.answer("sacct", "sacct: error: Slurm accounting storage is disabled\n", code=1)
    assert main(["runs"]) == 0 and "\tits job is no longer in the queue" in capsys.readouterr().out


def test_an_answer_of_squeue_that_is_no_text_is_asked_for_as_json(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    token = read_submission(submitted(slurm)).token
    job = {"job_id": 41, "job_state": ["RUNNING"], "nodes": "n[1-2]", "state_reason": "None", "comment": f"longstride {token}"}
    slurm.answer("squeue", json.dumps({"jobs": [job]}))
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert "\tstarting\t" in (shown := capsys.readouterr().out) and shown.splitlines()[1].endswith("\t41\tn[1-2]\tjob 41 running on n[1-2]")
    assert [call.split()[-1] for call in slurm.calls("squeue")] == ["--format=%i|%T|%N|%r|%k", "--json"]


SWEEP = ["--sweep", "optim.lr=1e-3,3e-4", "train.seed=0,1"]


def test_a_sweep_is_one_array_of_planned_runs(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "run.name=grid", "--nodes", "2", "--at-once", "3", *SWEEP]) == 0
    out = capsys.readouterr()
    assert "job array 41 queued: 4 runs" in out.out and "41_2  runs/grid-2  optim.lr=3e-4 train.seed=0" in out.out
    assert out.err.count("planned peak") == 4 and slurm.calls("sbatch") == ["sbatch --parsable -- runs/grid.sweep/job.sbatch"]
    script = Path("runs/grid.sweep/job.sbatch").read_text()
    prefix = Path.cwd() / "runs" / "grid"
    for line in ("--array=0-3%3", f'--chdir="{prefix.parent}"', f'--output="{prefix}-%a/slurm/job_%A_%a.log"', "--nodes=2"):
        assert f"#SBATCH {line}\n" in script
    assert f'run={prefix}-"$SLURM_ARRAY_TASK_ID"\n' in script and 'longstride="$run/code/longstride.py"\n' in script
    listed = json.loads(Path("runs/grid.sweep/sweep.json").read_text())["runs"]
    assert [run["settings"] for run in listed][3] == {"optim.lr": "3e-4", "train.seed": "1"}
    for i in range(4):
        run_dir = RunDir(f"runs/grid-{i}")
        assert (run_dir.slurm / "job.sbatch").read_text() == script and (run_dir.code / "longstride.py").is_file()
        submission = read_submission(run_dir)
        assert (submission.job_id, submission.task) == (f"41_{i}", str(i)) and submission.token in script
        assert f"lr: {['0.001', '0.001', '0.0003', '0.0003'][i]}" in run_dir.config.read_text()
        assert run_dir.memory_plan.is_file() and f"name: grid-{i}\n" in run_dir.config.read_text()
    token = read_submission(RunDir("runs/grid-0")).token
    slurm.queue(
        *(
            (f"41_{i}", "RUNNING" if i == 2 else "PENDING", "n1" if i == 2 else "", "JobArrayTaskLimit", f"longstride {token}")
            for i in range(4)
        )
    )
    assert main(["runs"]) == 0
    shown = {line.split("\t")[0]: line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]}
    assert {name: (row[1], row[-3]) for name, row in shown.items()} == {
        f"grid-{i}": ("starting" if i == 2 else "queued", f"41_{i}") for i in range(4)
    }
    assert main(["cancel", "grid-3"]) == 0 and slurm.calls("scancel") == ["scancel -- 41_3"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--sweep", "optim.lrr=1,2"], ["--sweep", "optim.lr"]),
        (["--sweep", "optim.lr=1e-3,fast"], ["optim.lr=fast", "optim.lr"]),
        (["--sweep", "gpus=1,2"], ["--sweep", "gpus"]),
        (["--array", "0-3%2"], ["--array 0-3%2", "train.seed=0,1,2,3", "--at-once"]),
        (["--sweep", "parallel.cp=1,4"], ["equally many nodes", "4 ranks"]),
        (["--sweep", "memory.budget_gib=4,0.0001"], ["memory.budget_gib=0.0001", "nothing was queued"]),
        (["--sweep", "train.seed=0,1", "--at-once", "0"], ["--at-once"]),
        (["--at-once", "2"], ["--at-once", "--sweep"]),
    ],
)
def test_a_sweep_that_cannot_be_writes_nothing(
    slurm: FakeSlurm, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SUBMIT, "run.name=grid", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert slurm.calls("sbatch") == [] and list(Path.cwd().iterdir()) == []


def test_a_node_that_is_not_fit_is_left_out_by_a_new_job(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = submitted(slurm)
    monkeypatch.setattr("slurm.attempts.MOST_EXCLUDED", 2)
    for number, (node, new) in enumerate((("n1", "42"), ("n2", "43"), ("n3", "")), 1):
        attempt = int(attempts.start(run_dir, str(40 + number), node))
        folder = health.folder_of(run_dir, attempt)
        folder.mkdir(parents=True)
        (folder / f"{node}.json").write_text(json.dumps({"node": node, "problems": ["it crawls"], "measured": {}}))
        (folder / "n9.json").write_text(json.dumps({"node": "n9", "problems": [], "measured": {}}))
        slurm.answer("sbatch", f"{new}\n")
        decision = attempts.end(run_dir, str(40 + number), attempt, health.UNFIT)
        if new:
            assert str(decision) == f"moved: node {node} is not fit: it crawls; job {new} goes on without it"
            assert read_submission(run_dir).job_id == new
            state = run_dir.read_state()
            assert state is not None and state.status == "queued" and state.reason.startswith(f"job {new}; node {node} is not fit")
        else:
            assert decision.word == "fail" and "3 nodes were not fit" in decision.reason
            state = run_dir.read_state()
            assert state is not None and (state.status, state.reason) == ("failed", decision.reason)
    job = Path("runs/a/slurm/job.sbatch")
    assert slurm.calls("sbatch")[1:] == [f"sbatch --parsable --exclude=n1 -- {job}", f"sbatch --parsable --exclude=n1,n2 -- {job}"]


def test_cancel(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = submitted(slurm)
    token = read_submission(run_dir).token
    assert main(["cancel", "a"]) == 2 and "no job in the queue" in capsys.readouterr().err
    slurm.queue(("41", "RUNNING", "n1", "None", f"longstride {token}"))
    assert main(["cancel", "a"]) == 0
    assert slurm.calls("scancel") == ["scancel --batch --signal=USR1 -- 41"] and (run_dir.slurm / "cancel_41").is_file()
    assert main(["cancel", "a", "--now"]) == 0
    slurm.queue(("41", "PENDING", "", "None", f"longstride {token}"))
    assert main(["cancel", "a"]) == 0
    assert slurm.calls("scancel")[1:] == ["scancel -- 41"] * 2
    assert json.loads(run_dir.state.read_text())["reason"] == "job 41 cancelled before it started"


def test_a_chain_of_jobs_for_clusters_that_do_not_requeue(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.folder / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$0 $*" >> "$0.calls"\necho $((40 + $(wc -l < "$0.calls")))\n')
    run_dir = submitted(slurm, "--chain", "3")
    script = "runs/a/slurm/job.sbatch"
    assert "jobs 42, 43 wait behind it" in capsys.readouterr().out
    behind = [f"sbatch --parsable --dependency=afterany:{number} -- {script}" for number in (41, 42)]
    assert slurm.calls("sbatch") == [f"sbatch --parsable -- {script}", *behind]
    submission = read_submission(run_dir)
    assert (submission.job_id, submission.chain) == ("41", ("42", "43"))
    for usage in (["--chain", "0"], ["--chain", "2", "--sweep", "train.seed=0,1"]):
        assert main([*SUBMIT, "run.name=b", *usage]) == 2 and "--chain" in capsys.readouterr().err and not Path("runs/b").exists()
    assert main(["resume", "a", "--chain", "2"]) == 2 and "--chain: is of a Slurm job" in capsys.readouterr().err

    def waiting(number: str) -> tuple[str, str, str, str, str]:
        return number, "PENDING", "", "Dependency", f"longstride {submission.token}"

    # The first one meets a node that is not fit: those that wait are kept off it, and no other job is queued.
    slurm.queue(waiting("43"), ("41", "RUNNING", "n1", "None", f"longstride {submission.token}"), waiting("42"))
    slurm.answer("scontrol", "")
    folder = health.folder_of(run_dir, int(attempts.start(run_dir, "41", "n1")))
    folder.mkdir(parents=True)
    (folder / "n1.json").write_text(json.dumps({"node": "n1", "problems": ["it crawls"]}))
    assert str(attempts.end(run_dir, "41", 1, health.UNFIT)).startswith("moved: node n1 is not fit: it crawls; job 42 goes on")
    assert slurm.calls("scontrol") == [f"scontrol update JobId={number} ExcNodeList=n1" for number in (43, 42)]
    assert len(slurm.calls("sbatch")) == 3

    # Attempts without progress are counted over all jobs of a chain.
    for number in ("42", "43"):
        attempt = int(attempts.start(run_dir, number, "n2"))
        assert attempts.end(run_dir, number, attempt, 1).word == "requeue"
    with pytest.raises(RunFailed, match="3 attempts in a row brought no new checkpoint"):
        attempts.start(run_dir, "43", "n2")
    slurm.queue(waiting("42"), waiting("43"))
    assert main(["cancel", "a"]) == 0
    assert slurm.calls("scancel") == ["scancel -- 43", "scancel -- 42"], "none starts because the one before it was cancelled"
