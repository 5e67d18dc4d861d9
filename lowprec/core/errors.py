"""Every error that lowprec raises on purpose.

A message says what was asked, where, what came and what to do, in one sentence. The command line prints the message
and exits with `exit_code`; `--debug` shows the traceback as well.
"""

from collections.abc import Sequence

from lowprec.core.exit_codes import ERROR, USAGE

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "JobError",
    "KernelError",
    "LowprecError",
    "ModelError",
    "PlanError",
    "PoisonedWorkError",
    "QueryError",
    "ResultsError",
    "StorageError",
    "TrafficError",
    "WeightError",
    "WorkerError",
    "first_line",
    "is_panic",
]


class LowprecError(Exception):
    """Root of the tree: catch this to catch all of lowprec."""

    exit_code = ERROR


class ConfigError(LowprecError, ValueError):
    """A config file, an option or an environment variable is wrong."""

    exit_code = USAGE


class PlanError(LowprecError, ValueError):
    """A plan does not fit the model, the checkpoint or the plan format."""

    exit_code = USAGE


class QueryError(LowprecError, ValueError):
    """A query is not valid SQL, or would change the results."""

    exit_code = USAGE


class TrafficError(LowprecError, ValueError):
    """Traffic cannot be read as the config describes it."""


class CheckpointError(LowprecError, ValueError):
    """A checkpoint cannot be read, or holds another model."""


class ModelError(LowprecError, TypeError):
    """A model cannot be built, or does not keep the contract."""


class WeightError(LowprecError, ValueError):
    """A weight has no low-precision form (NaN, Inf, or beyond fp16 range)."""


class ExportError(LowprecError, OSError):
    """What serving loads cannot be written."""


class ResultsError(LowprecError, OSError):
    """The results root cannot be read or written."""


class StorageError(LowprecError, OSError):
    """An object store, or the folder for copies of its files, cannot be used."""


class WorkerError(LowprecError, RuntimeError):
    """A worker failed for good."""


class PoisonedWorkError(WorkerError):
    """A piece of work came to nothing again and again; `work` says which, `tries` what became of each try."""

    def __init__(self, message: str, *, work: str, tries: Sequence[str]) -> None:
        super().__init__(message)
        self.work, self.tries = work, tuple(tries)


class JobError(LowprecError, RuntimeError):
    """A job cannot be submitted to a Ray cluster, or be looked after there."""


class KernelError(LowprecError, ImportError):
    """The native module is missing or does not load."""


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked. Each such library has a class of its own, derived from `BaseException`."""
    return type(error).__name__ == "PanicException"


def first_line(said: BaseException | str) -> str:
    """The first line of a text or of what an error says; of an error that says nothing, its type."""
    lines = str(said).strip().splitlines()
    if not lines:
        return type(said).__name__ if isinstance(said, BaseException) else ""
    return lines[0]
