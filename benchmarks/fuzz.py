"""Feed everything that reads something from outside with inputs that it should not like: 100,000 by default.

    python benchmarks/fuzz.py                       writes benchmarks/fuzz.json and fuzz.md; exit code 1 if anything failed
    python benchmarks/fuzz.py --only JSONL --inputs 5000 --seed 7
    python benchmarks/fuzz.py --atheris 60          besides, 60 seconds per target led by coverage (pip install atheris)
    python benchmarks/fuzz.py --atheris 60 --led-only     only that, written beside what the last run has found

Each target runs in a process of its own, in an empty directory, with 8 GiB of address space: a crash is seen and its input kept. An audit
hook reports every process that is started and every connection; inputs carry commands that would leave a file behind. What counts as a
failure is in ``fuzz_targets.py``. The default test suite runs a sample (tests/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

if {"--child", "--atheris"} <= set(sys.argv):  # coverage is counted in what is imported here
    import atheris  # pyright: ignore[reportMissingImports]

    instrumented = atheris.instrument_imports(include=["trainer", "slurm", "models"])
else:
    instrumented = contextlib.nullcontext()
with instrumented:
    from benchmarks.fuzz_targets import ALLOWED, CANARY, Target, targets, variants

INPUTS = 100_000
CPU_SECONDS = 10.0
"""Processor time of one input."""
VARIANTS = 7
"""Of every input that hypothesis makes, changed at chance places."""
ADDRESS_SPACE = 8 << 30
LAST = "last_input"
EVENTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn", "socket.connect"}


class TooSlow(BaseException):
    """An input took more than ``CPU_SECONDS`` of processor time."""


@functools.cache
def _watch() -> list[str]:
    """Events of the interpreter that no input may cause; grows as they come. A hook cannot be taken away: one for all targets."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and not ALLOWED:
            seen.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    return seen


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Processor time of one input is bounded."""

    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def try_input(check: Callable[[bytes], str], data: bytes, seen: list[str]) -> str:
    """``accepted``, ``refused`` or ``failed: why``."""
    seen.clear()
    try:
        with _limited():
            outcome = check(data)
    except KeyboardInterrupt:
        raise
    except TooSlow:
        return f"failed: more than {CPU_SECONDS:.0f} seconds of processor time"
    except BaseException as error:  # a panic of an extension is none of Exception's
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if seen:
        return f"failed: {seen[0]}"
    return f"failed: {CANARY} was run" if Path(CANARY).exists() else outcome


def fuzz(target: Target, inputs: int, seed: int, last: Path | None = None) -> dict[str, Any]:
    """``inputs`` inputs: made by hypothesis, and variants of each. ``last``: a file for the one at hand, should the process die."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    counts: Counter[str] = Counter()
    failures: dict[str, bytes] = {}
    seen = _watch()
    started = time.process_time()
    handle = None if last is None else os.open(last, os.O_RDWR | os.O_CREAT, 0o600)

    def once(made: bytes) -> None:
        for data in (made, *variants(made, target.words, VARIANTS)):
            if sum(counts.values()) >= inputs:
                return
            if handle is not None:
                os.pwrite(handle, len(data).to_bytes(8, "little") + data, 0)
            outcome = try_input(target.check, data, seen)
            kind = outcome.partition(":")[0]
            counts[kind] += 1
            if kind == "failed" and len(failures) < 20:
                failures.setdefault(outcome, data)

    quiet = settings(
        max_examples=min(inputs, 2000), deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    while (missing := inputs - sum(counts.values())) > 0:
        # In rounds: hypothesis keeps what it has tried, and slows down.
        seeded(seed + sum(counts.values()))(
            settings(quiet, max_examples=min(-(-missing // (1 + VARIANTS)), 500))(given(target.inputs)(once))
        )()
    return {
        "target": target.name,
        "inputs": sum(counts.values()),
        "accepted": counts["accepted"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        "failures": {why: base64.b64encode(data).decode() for why, data in failures.items()},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def guided(target: Target, seconds: int, corpus: Path) -> None:
    """Inputs led by coverage, until the time is up; does not return. A failure ends the process with another exit code."""
    seen, counts = _watch(), Counter()

    def once(data: bytes) -> None:
        outcome = try_input(target.check, data, seen)
        counts[outcome.partition(":")[0]] += 1
        Path("counts.json").write_text(json.dumps(counts))
        if outcome.startswith("failed"):
            raise AssertionError(outcome)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-print_final_stats=0", "-verbosity=0", str(corpus)], once)
    atheris.Fuzz()


def _child(name: str, inputs: int, seed: int, atheris_seconds: int) -> int:
    """In a process and a directory of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    target = next(target for target in targets() if target.name == name)
    if atheris_seconds:
        corpus = Path("corpus")
        corpus.mkdir()
        for i in range(20):
            (corpus / str(i)).write_bytes(target.inputs.example())
        guided(target, atheris_seconds, corpus)
    print(json.dumps(fuzz(target, inputs, seed, Path(LAST))))
    return 0


def run(name: str, inputs: int, seed: int, atheris_seconds: int = 0) -> dict[str, Any]:
    """One target in a fresh process; a crash is a failure with its input."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--inputs", str(inputs), "--seed", str(seed)]
    command += ["--atheris", str(atheris_seconds)] if atheris_seconds else []
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, errors="replace", start_new_session=True)
        if atheris_seconds:
            counted = Path(folder) / "counts.json"
            counts = json.loads(counted.read_text()) if counted.exists() else {}
            found = {"target": name, "inputs": sum(counts.values()), "failed": counts.get("failed", 0), "exit": done.returncode}
            crashed = sorted(Path(folder).glob("crash-*"))
            if crashed or not counts:
                found["failures"] = {
                    " ".join(done.stderr.split())[-500:]: base64.b64encode(crashed[0].read_bytes()).decode() if crashed else ""
                }
                found["failed"] = max(1, found["failed"])
            return found
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        last = Path(folder) / LAST
        kept = last.read_bytes() if last.exists() else bytes(8)
        data = kept[8 : 8 + int.from_bytes(kept[:8], "little")]
        why = f"the process ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
        return {
            "target": name, "inputs": 0, "accepted": 0, "refused": 0, "failed": 1, "failures": {why: base64.b64encode(data).decode()},
            "cpu_seconds": 0.0,
        }  # fmt: skip


def sample(inputs: int, seed: int) -> list[dict[str, Any]]:
    """About ``inputs`` inputs of all targets in this process and directory."""
    whole = sum(names_and_weights().values())
    return [fuzz(target, -(-inputs * target.weight // whole), seed) for target in targets()]


def table(result: dict[str, Any]) -> str:
    """fuzz.md."""
    rows = result["targets"]
    lines = [
        "# Inputs that nobody should like",
        "",
        f"`python benchmarks/fuzz.py --inputs {result['inputs']} --seed {result['seed']}`, Python {result['python']}:",
        f"{sum(row['inputs'] for row in rows):,} inputs, {sum(row['failed'] for row in rows)} failures. One in eight is as hypothesis",
        f"{result['hypothesis']} made it, the others are these with some bytes changed. Refused: a clean error (a few lines that name the",
        "place; exit code 2).",
        "Accepted: read as it stands, checked (settings come back from their own dump; bash gives back every value of a job script).",
        "No process was started, no connection opened and no command of an input run.",
        "",
        "| what | inputs | accepted | refused | failed | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = f"{row['inputs']:,} | {row['accepted']:,} | {row['refused']:,} | {row['failed']}"
        lines.append(f"| {row['target']} | {counts} | {row['cpu_seconds']:.0f} s |")
    if result["guided"]:
        lines += [
            "",
            f"Led by coverage (atheris, {result['atheris_seconds']} seconds each):",
            "",
            "| what | inputs | failed |",
            "|---|---|---|",
        ]
        lines += [f"| {row['target']} | {row['inputs']:,} | {row['failed']} |" for row in result["guided"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, write the result beside this file, say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TARGET", help="this one, and write nothing")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (default: 2)")
    parser.add_argument("--atheris", type=int, default=0, metavar="SECONDS")
    parser.add_argument("--led-only", action="store_true", help="with --atheris: keep the other results of the last run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(args.child, args.inputs, args.seed, args.atheris)
    names = names_and_weights()
    if args.only:
        names = {name: 1 for name in names if name == args.only} or parser.error(f"--only: one of {', '.join(names)}")
    if args.led_only and not args.atheris:
        parser.error("--led-only: give the seconds of each target with --atheris")
    whole, rows = sum(names.values()), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda name: run(name, -(-args.inputs * names[name] // whole), args.seed), () if args.led_only else names):
            rows.append(row)
            told = f"{row['inputs']:,} inputs, {row['accepted']:,} accepted, {row['refused']:,} refused, {row['failed']} failed"
            print(f"{row['target']}: {told}, {row['cpu_seconds']} s", flush=True)
        led = []
        for row in pool.map(lambda name: run(name, 0, args.seed, args.atheris), names if args.atheris else ()):
            led.append(row)
            print(f"{row['target']}, led by coverage: {row['inputs']:,} inputs, {row['failed']} failed", flush=True)
    for row in [*rows, *led]:
        for why, data in row.get("failures", {}).items():
            print(f"FAILED {row['target']}: {why}\n  input (base64): {data[:400]}")
    if not args.only:
        import hypothesis

        last = json.loads((HERE / "fuzz.json").read_text()) if args.led_only else {}
        result = {
            "inputs": args.inputs, "seed": args.seed, "python": platform.python_version(),
            "hypothesis": hypothesis.__version__, "atheris_seconds": args.atheris, "targets": rows, "guided": led,
        }  # fmt: skip
        result |= {name: last[name] for name in ("inputs", "seed", "python", "hypothesis", "targets") if name in last}
        (HERE / "fuzz.json").write_text(json.dumps(result, indent=1) + "\n")
        (HERE / "fuzz.md").write_text(table(result))
    return 1 if any(row["failed"] for row in [*rows, *led]) else 0


def names_and_weights() -> dict[str, int]:
    """Of all targets; made in a directory that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return {target.name: target.weight for target in targets()}


if __name__ == "__main__":
    sys.exit(main())
