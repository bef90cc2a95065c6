"""Take the pictures in docs/monitoring.md: a small run, watched by ``monitor``, told by ``report``, served by TensorBoard.

usage: python scripts/screenshots.py [--run DIR] [--output docs/pictures]      ``make screenshots``

Trains two ranks for a few minutes (``--run``: a run that is there already is shown as it is) and takes the pictures with headless Chromium
(``apt-get install chromium``; another one by CHROMIUM=PATH).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "debug_cpu", "run.name=screenshots", "parallel.cp=2", "train.steps=300", "train.eval_every_steps=20", "checkpoint.save_every_steps=40",
    "guards.report_every_steps=20", "data.seq_len=1024",
)  # fmt: skip
WATCHED_AT = 180
"""The step at which ``monitor`` is looked at."""
COLUMNS, LINES = 118, 32
PAGE = """<!doctype html><meta charset="utf-8"><body style="background:{background};margin:0;padding:14px">
<pre style="font:14px/1.3 'DejaVu Sans Mono',Menlo,Consolas,monospace;color:{foreground};margin:0">{code}</pre></body>"""


class Cannot(Exception):
    """Why there is no picture."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="show this run; without it one is trained")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures")
    args = parser.parse_args()
    try:
        browser = (
            os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        )
        if browser is None:
            raise Cannot("no Chromium on PATH: apt-get install chromium, or name one by CHROMIUM=PATH")
        with tempfile.TemporaryDirectory(prefix="longstride-screenshots-") as folder:
            take(browser, args.run, args.output, Path(folder))
    except (Cannot, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def take(browser: str, run: Path | None, output: Path, folder: Path) -> None:
    """Monitor while the run runs, the others when it has ended."""
    output.mkdir(parents=True, exist_ok=True)
    if run is None:
        run = folder / "screenshots"
        command = [*longstride(), "train", *SETTINGS, f"run.root={folder}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as training:
            wait_for_step(run, WATCHED_AT, training)
            frame = screen(run)
            if training.wait(timeout=3600):
                raise Cannot(f"training ended with exit code {training.returncode}")
    else:
        frame = screen(run)
    page = folder / "monitor.html"
    page.write_text(terminal_page(frame))
    picture(browser, page.as_uri(), output / "monitor.png", (1020, 900))

    page = folder / "report.html"
    subprocess.run([*longstride(), "report", str(run), "--output", str(page)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
    picture(browser, page.as_uri(), output / "report.png", (1000, 1850))

    with tensorboard(run / "tensorboard") as address:
        # Curves as SVG: headless Chromium paints none with WebGL.
        shown = "?forceSVG=true&darkMode=false&smoothing=0&tagFilter=loss%7Cgrad_norm%7Ctokens_per_second%7Cmemory_p#timeseries"
        picture(browser, address + shown, output / "tensorboard.png", (1400, 1000), patience_ms=30_000)


def longstride() -> list[str]:
    return [sys.executable, str(ROOT / "longstride.py")]


def wait_for_step(run: Path, step: int, training: subprocess.Popen[bytes]) -> None:
    """Until the run has made ``step`` steps; raises Cannot when it ends before."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b'"train"') < step:
        if training.poll() is not None:
            raise Cannot(f"training ended with exit code {training.returncode} before step {step}")
        time.sleep(0.2)


def screen(run: Path) -> str:
    """What ``monitor`` first writes to a terminal, escape sequences and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    env = {**{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}, "TERM": "xterm-256color"}
    found, deadline = b"", time.monotonic() + 120
    with subprocess.Popen([*longstride(), "monitor", str(run), "--every", "60"], cwd=ROOT, env=env, stdin=theirs, stdout=theirs) as monitor:
        os.close(theirs)
        while found.count("╯".encode()) < 2 and time.monotonic() < deadline:  # the ends of two panels
            if select.select([ours], [], [], 1)[0]:
                try:
                    found += os.read(ours, 65536)
                except OSError:  # it has ended
                    break
        monitor.send_signal(signal.SIGINT)
    os.close(ours)
    if found.count("╯".encode()) < 2:
        raise Cannot(f"monitor showed no run: {found.decode(errors='replace')[-300:]!r}")
    return found.decode()


def terminal_page(frame: str) -> str:
    """A terminal's content as a page, in the terminal's colours."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    shown = re.sub(r"\x1b\[\?\d+[hl]", "", frame).replace("\r", "").strip("\n")  # cursor off and on
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(shown), soft_wrap=True)
    return console.export_html(theme=MONOKAI, inline_styles=True, code_format=PAGE)


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard that has read ``folder``."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            found = next((match for line in server.stdout if (match := re.search(r"\w+://(127.0.0.1|localhost):\d+/", line))), None)
            if found is None:
                raise Cannot("tensorboard ended without serving")
            deadline = time.monotonic() + 120
            while b"train/loss" not in urllib.request.urlopen(f"{found[0]}data/plugin/scalars/tags", timeout=60).read():
                if time.monotonic() > deadline:
                    raise Cannot("tensorboard shows no curve")
                time.sleep(0.5)
            yield found[0]
        finally:
            server.kill()


def picture(browser: str, address: str, path: Path, size: tuple[int, int], patience_ms: int = 2_000) -> None:
    """A picture of a page, without the empty margin below it. ``patience_ms``: of the page's own clock, for what it loads."""
    from PIL import Image, ImageChops

    with tempfile.TemporaryDirectory(prefix="longstride-browser-") as profile:
        made = Path(profile) / "page.png"
        options = [
            "--headless=new", "--hide-scrollbars", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}/profile",
            f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={patience_ms}", f"--screenshot={made}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]  # fmt: skip
        done = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=500, check=False)
        if not made.exists():
            raise Cannot(f"{browser}: {done.stderr[-500:]}")
        with Image.open(made) as image:
            shown = image.convert("RGB")
    background = Image.new("RGB", shown.size, shown.getpixel((shown.width - 1, shown.height - 1)))
    box = ImageChops.difference(shown, background).getbbox()
    bottom = min(shown.height, (box[3] if box else shown.height) + 14)
    whole = shown.crop((0, 0, shown.width, bottom)).quantize(256, dither=Image.Dither.NONE)
    whole.save(path, optimize=True)
    print(f"written: {path} ({whole.width} x {whole.height})")


if __name__ == "__main__":
    sys.exit(main())
