"""The trainer as a process: `python -P -m tuner.training CONFIG.json`.

Writes one JSON object per line to standard output, and nothing else there; whatever a library
prints goes to standard error, as the log does. Ends with a code of `ExitCode`. It dies with the
process that started it, and SIGTERM ends it at once: checkpoints make both cheap.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.training.config import PARENT_VARIABLE, ConfigError, ExitCode, TrainingConfig

_PR_SET_PDEATHSIG = 1

Emit = Callable[[dict[str, Any]], None]


def main(arguments: list[str] | None = None) -> int:
    """Train as the configuration says; the exit code."""
    emit = _claim_stdout()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    if not _bind_to_parent():
        return ExitCode.CRASHED
    try:
        config = _read_config(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        emit(_failed("bad_config", str(error)))
        return ExitCode.REFUSED
    return run_config(config, emit)


def run_config(config: TrainingConfig, emit: Emit) -> int:
    """Train, and tell how it ended when it failed; the exit code."""
    # Importing torch takes seconds; a bad configuration is refused before.
    from transformers.utils.logging import disable_progress_bar

    from tuner.training.data import NothingToLearn
    from tuner.training.guards import GuardStopped
    from tuner.training.loop import train
    from tuner.training.rows import DataError

    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        train(config, emit)
    except GuardStopped as stopped:
        emit(_failed(stopped.code, stopped.message))
        return ExitCode.GUARDED
    except ConfigError as error:
        emit(_failed("bad_config", str(error)))
        return ExitCode.REFUSED
    except NothingToLearn as error:
        emit(_failed("nothing_to_learn", str(error)))
        return ExitCode.REFUSED
    except DataError as error:
        emit(_failed("bad_data", str(error)))
        return ExitCode.REFUSED
    except Exception as error:
        logging.getLogger(__name__).exception("Training crashed")
        emit(_failed("trainer_crashed", f"{type(error).__name__}: {error}"))
        return ExitCode.CRASHED
    return ExitCode.FINISHED


def _failed(code: str, message: str) -> dict[str, Any]:
    return {"event": "failed", "code": code, "message": message}


def _read_config(arguments: list[str]) -> TrainingConfig:
    if len(arguments) != 1:
        raise ConfigError(f"found {len(arguments)} arguments, expected the configuration's path")
    try:
        return TrainingConfig.from_json(Path(arguments[0]).read_bytes())
    except OSError as error:
        raise ConfigError(f"{arguments[0]!r} can't be read ({error.strerror})") from None


def _claim_stdout() -> Emit:
    """Keep standard output for events; what else is written to it goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        stream.write(json.dumps(_finite(event), allow_nan=False) + "\n")
        stream.flush()

    return emit


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _bind_to_parent() -> bool:
    """Let the kernel end this process with the one that started it; False when that one is gone."""
    expected = os.environ.get(PARENT_VARIABLE)
    if expected is None:
        return True
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have ended before the kernel knew.
    if os.getppid() != int(expected):
        sys.stderr.write(f"The process {expected} that started this trainer is gone.\n")
        return False
    return True


if __name__ == "__main__":
    # Not through the interpreter's end, which joins the threads of libraries.
    code = main()
    sys.stderr.flush()
    os._exit(code)
