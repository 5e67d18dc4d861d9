"""The code of the user's model: which files of the current folder an import would take."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Collection, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

__all__ = ["model_code"]


def model_code(module: str, folder: Path, *, data: Collection[str] = ()) -> dict[Path, Path]:
    """The files of a module or package in `folder`, and of all that its code imports from there; relative to absolute.

    What is installed is left out, and so is lowprec itself: its sources, without the compiled module, would hide the
    installed one. A package goes whole, but for hidden files, byte code, and the files and folders of `data`. Empty
    where `folder` has no such module.
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
        files = [file for file in _module_files(name, folder) if not _lies_in(file, data)]
        found |= {file.relative_to(folder): file for file in files}
        wanted += [imported for file in files if file.suffix == ".py" for imported in _imports(file)]
    return found


def _module_files(name: str, folder: Path) -> Iterator[Path]:
    package, file = folder / name, folder / f"{name}.py"
    if (package / "__init__.py").is_file() or (not file.is_file() and any(package.rglob("*.py"))):
        for where, folders, files in os.walk(package, followlinks=True):
            folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
            yield from (Path(where, f) for f in files if not f.startswith(".") and not f.endswith(".pyc"))
    elif file.is_file():
        yield file


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
