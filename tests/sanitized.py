"""Runs tests on a sanitized build of the kernels: python tests/sanitized.py MODULE [PYTEST ARGS]; see `make test-asan`.

MODULE is the compiled `_native`, which takes the place of the installed one before anything imports it.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "lowprec._native"


def main() -> int:
    path, args = Path(sys.argv[1]).resolve(), sys.argv[2:]
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = pytest.main([*args, "-m", "not slow"])
    from lowprec.ops.native import kernels

    assert Path(str(kernels().__file__)) == path, "the tests ran on another module"
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
