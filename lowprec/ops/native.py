"""The compiled module: import, version check and CPU path."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from lowprec.core.errors import ConfigError, KernelError

_import_error: ImportError | None = None
try:
    from lowprec import _native
except ImportError as error:  # said by kernels(): costs and plans need this package, but no kernel
    _import_error = error

__all__ = ["CPU_PATH_VARIABLE", "check_kernels", "cpu_path", "cpu_paths", "kernels", "using_cpu_path"]

CPU_PATH_VARIABLE = "LOWPREC_CPU_PATH"
"""The environment variable that asks for a CPU path; unset, the best one of this CPU is taken."""

_PACKAGE = Path(__file__).parents[1]
_HOW_TO_BUILD = "build it with `make setup` (or `pip install .`), which needs a C++17 compiler"


def cpu_paths() -> tuple[str, ...]:
    """The CPU paths that run on this machine, best first, of avx512, avx2 and portable."""
    return tuple(kernels().cpu_paths())


def cpu_path() -> str:
    """The CPU path that the kernels of this process take. No result depends on it."""
    return str(kernels().cpu_path())


@contextmanager
def using_cpu_path(name: str) -> Iterator[None]:
    """Take another path for a while, in the whole process. Raises `ConfigError` where this CPU does not have it."""
    before = cpu_path()
    _use(name)
    try:
        yield
    finally:
        kernels().use_cpu_path(before)


@cache
def kernels() -> ModuleType:
    """The compiled module.

    Raises `KernelError` when it is missing, or older than the sources that lie beside it, and `ConfigError` when the
    environment asks for a CPU path that is not there.
    """
    if _import_error is not None:
        raise KernelError(_why_not_there(_import_error)) from _import_error
    sources = _PACKAGE.parent / "kernels"
    if (sources / "CMakeLists.txt").is_file() and _source_digest(sources) != _native.SOURCE_DIGEST:
        raise KernelError(f"{_native.__file__} was built from other sources than those in {sources}; {_HOW_TO_BUILD}")
    if asked := os.environ.get(CPU_PATH_VARIABLE):
        _choose(_native, asked, f"environment variable {CPU_PATH_VARIABLE}")
    return _native


def check_kernels() -> None:
    """Raise what `kernels` raises."""
    kernels()


def _why_not_there(error: ImportError) -> str:
    others = (Path(folder or os.curdir, "lowprec") for folder in sys.path)
    hidden = next((o for o in others if any(o.glob("_native.*")) and not o.samefile(_PACKAGE)), None)
    is_submitted = _is_submitted(_PACKAGE)
    if hidden is None and not is_submitted:
        return f"the native module lowprec._native does not load ({error}); {_HOW_TO_BUILD}"
    submitted = ", submitted as the working dir of this Ray job" if is_submitted else ""
    hiding = f"they hide the lowprec installed in {hidden.parent}" if hidden else "lowprec has to be installed instead"
    return (
        f"lowprec was imported from {_PACKAGE}, sources without their native module{submitted}: {hiding}; keep the "
        "source tree out of a Ray job's working dir and off the path: submit with `lowprec submit`, or with "
        "--working-dir jobs"
    )


def _is_submitted(package: Path) -> bool:
    """Whether the source tree is a Ray job's working dir, from which it imports before anything that is installed."""
    # Ray unpacks working dirs in a folder of that name; the command of a job runs in its working dir.
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return "working_dir_files" in package.parts or (is_job and Path("lowprec", "__init__.py").is_file())


def _use(name: str) -> None:
    _choose(kernels(), name, "CPU path")


def _choose(module: ModuleType, name: str, where: str) -> None:
    paths = module.cpu_paths()
    if name not in paths:
        raise ConfigError(f'{where}: this CPU has {", ".join(paths)}; got "{name}"')
    module.use_cpu_path(name)


def _source_digest(sources: Path) -> str:
    """What kernels/CMakeLists.txt computes when it is configured."""
    files = [sources / "CMakeLists.txt", *sources.glob("*.cc"), *sources.glob("*.h")]
    files.sort(key=lambda path: path.name)
    lines = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
