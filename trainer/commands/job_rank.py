"""One rank of a run that a batch script started through torchrun: always resumes, logs for itself, leaves a note how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from models.errors import UserError
from parallel.distributed import Env, end_distributed, environment, on_one_rank
from parallel.launcher import STOPPED, join_launcher
from trainer import trace_workers
from trainer.commands.guard import guarded
from trainer.commands.open_run import checked_plan, kept_plan, open_run, reload
from trainer.commands.terminal import tell
from trainer.commands.train import join_ranks, prepare_data
from trainer.rank_notes import RankNote, write_note
from trainer.run_dir import RunDir
from trainer.run_timeline import drawn

ATTEMPT_BEFORE_SECONDS = 600.0
"""How long an attempt waits for the processes of the one before to let go of the run."""


def run_job_rank(path: str, attempt: str, flag: str) -> int:
    """Train until the end, a signal, or the appearance of the file ``flag``. Both, saved, are exit code 0 to the launcher, which would
    report any other as a failure; the note tells them apart."""
    env = environment()
    run_dir = RunDir(path)
    log_path = run_dir.log(env.rank, int(attempt))
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log = join_launcher(os.getppid(), env.rank, log_path, stamped=True, console_stamped=True)
    code = guarded(lambda: _train(run_dir, env, int(attempt), Path(flag)), log, debug=True)
    return 0 if code == STOPPED else code


def _train(run_dir: RunDir, env: Env, attempt: int, flag: Path) -> int:
    def leave(note: RankNote) -> None:
        write_note(run_dir, attempt, env.rank, note)

    try:
        code, stop = _train_noted(run_dir, env, flag)
    except UserError as error:
        leave(RankNote(error.exit_code, (str(error).splitlines() or [""])[0], refused=True))
        raise
    except BaseException as error:
        leave(RankNote(1, " ".join(f"{type(error).__name__}: {error}".split())[:300]))
        raise
    state = run_dir.read_state()
    leave(RankNote(code, signal_number=stop if code == STOPPED else 0, step=state.step if state else 0))
    end_distributed()
    return code


def _train_noted(run_dir: RunDir, env: Env, flag: Path) -> tuple[int, int]:
    """Exit code and the signal that the ranks agreed to stop for."""
    from trainer import build
    from trainer.preemption import StopSignal

    config = reload(run_dir)
    join_ranks(config, env)
    on_one_rank(env, lambda: prepare_data(config), per_machine=True)
    on_one_rank(env, lambda: run_dir.wait_until_free(ATTEMPT_BEFORE_SECONDS))
    on_one_rank(env, lambda: _plan_again_if_needed(run_dir))
    # Rank 0 looks for the file; the others hear of it at the step boundary.
    stop = StopSignal(poll=(lambda: signal.SIGUSR1 if flag.exists() else 0) if env.rank == 0 else None)
    with drawn(run_dir, tell) if env.rank == 0 else contextlib.nullcontext():
        code = build.train(config, run_dir.path, resume=True, stop=stop)
    return code, stop.agreed_number


def _plan_again_if_needed(run_dir: RunDir) -> None:
    """Memory ran out in an attempt before: the plan counts what was measured then."""
    config = reload(run_dir)
    if not kept_plan(config, run_dir):
        open_run(config, run_dir, run_dir.name, checked_plan(config, run_dir))
        trace_workers.close()  # what they hold is needed now
