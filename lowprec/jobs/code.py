"""The code of the user's model: which files of the current folder an import would take."""

from __future__ import annotations

import ast
import errno
import os
import stat
import sys
from collections.abc import Collection, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from lowprec.core.errors import ConfigError

__all__ = ["model_code"]


def model_code(module: str, folder: Path, *, data: Collection[str] = ()) -> dict[Path, Path]:
    """The files of a module or package in `folder`, and of all that its code imports from there; relative to absolute.

    What is installed is left out, and so is lowprec itself: its sources, without the compiled module, would hide the
    installed one. A package goes whole, but for hidden files, byte code, and the files and folders of `data`. Empty
    where `folder` has no such module. Raises `ConfigError` for what cannot be read.
    """
    found: dict[Path, Path] = {}
    seen = {"lowprec"}
    wanted = [module]
    while wanted:
        name = wanted.pop()
        if name in seen or not name.isidentifier():
            continue
        seen.add(name)
        # The model's own module is taken from the folder in any case, as by a search on this machine.
        if name != module and _is_installed(name, folder):
            continue
        try:
            files = [file for file in _module_files(name, folder) if not _lies_in(file, data)]
            for file in files:
                _check_file(file)
            wanted += [imported for file in files if file.suffix == ".py" for imported in _imports(file)]
        except OSError as error:
            raise ConfigError(
                f"model.factory: {error.filename}, which goes with the job as a part of the model's code, cannot be "
                f"read: {error.strerror}; remove it, or mend it"
            ) from None
        found |= {file.relative_to(folder): file for file in files}
    return found


def _module_files(name: str, folder: Path) -> Iterator[Path]:
    package, file = folder / name, folder / f"{name}.py"
    if (package / "__init__.py").is_file() or (not file.is_file() and any(package.rglob("*.py"))):
        yield from _files_in(package, frozenset())
    elif file.is_file():
        yield file


def _files_in(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files of a package's folder; a link to a folder that it lies in, which would have no end, is left out."""
    above |= {folder.resolve()}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__pycache__" or entry.suffix == ".pyc":
            continue
        if not entry.is_dir():
            yield entry
        elif entry.resolve() not in above:
            yield from _files_in(entry, above)


def _check_file(file: Path) -> None:
    """Raise `OSError` for what is no file that can be sent, such as a link to nowhere or a pipe."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "it is neither a file nor a folder", str(file))
    if not os.access(file, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))


def _lies_in(file: Path, paths: Collection[str]) -> bool:
    return any(str(path) in paths for path in (file, *file.parents))


def _is_installed(name: str, folder: Path) -> bool:
    """Whether an import finds the module somewhere else than in the folder."""
    if name in sys.stdlib_module_names:
        return True
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != folder.resolve()]
    return PathFinder.find_spec(name, elsewhere) is not None


def _imports(file: Path) -> Iterator[str]:
    """The top-level names that a file imports; none where it is no Python, which the cluster will say."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
