"""What an error looks like to a person: one or two lines and an exit code. Imports no torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

from models.errors import UserError


def guarded(run: Callable[[], int], stream: TextIO, debug: bool) -> int:
    """Call ``run`` and turn what it raises into one or two lines on ``stream`` and an exit code."""

    try:
        return run()
    except UserError as error:
        if debug:
            traceback.print_exc(file=stream)
        print(f"error: {error}", file=stream, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; a run that was going on resumes from its last checkpoint", file=stream, flush=True)
        return 130
    except BrokenPipeError:  # longstride runs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc(file=stream)
        detail = " ".join(str(error).split())[:300]
        print(f"error: {type(error).__name__}: {detail} (not an expected error; --debug shows where)", file=stream, flush=True)
        return 1
