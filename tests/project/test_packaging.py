"""What is shipped: the wheel holds lowprec/ and nothing else, works on its own, and the versions agree."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lowprec

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(hook: str, folder: Path, build_dir: Path) -> Path:
    """Run one build hook as pip does, but with the tools of this environment, so without a network."""
    code = (
        "import sys; from scikit_build_core import build;"
        "print(getattr(build, sys.argv[1])(sys.argv[2], {'build-dir': sys.argv[3]}), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, hook, str(folder), str(build_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("build"))


def test_wheel_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lowprec", f"lowprec-{lowprec.__version__}.dist-info"}
    assert len([name for name in names if re.fullmatch(r"lowprec/_native\.[^/]*\.so", name)]) == 1


def test_wheel_holds_every_file_of_the_package_and_the_module(wheel: Path) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lowprec/")}
    (module,) = (name for name in shipped if name.endswith(".so"))
    present = (path for path in (ROOT / "lowprec").rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc"))
    assert shipped - {module} == {path.relative_to(ROOT).as_posix() for path in present}


def test_metadata_is_that_of_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"lowprec-{lowprec.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert f"lowprec = {PYPROJECT['project']['scripts']['lowprec']}" in scripts
    assert metadata["Version"] == lowprec.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert set(metadata.get_all("Provides-Extra")) == {"cpu", "cuda", "dev", "torchrec"}
    assert any(line.startswith("fbgemm-gpu-cpu==1.8") for line in metadata.get_all("Requires-Dist"))


def test_unpacked_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {sysconfig.get_path("purelib")!r}]
import numpy as np
import lowprec
from lowprec import _native, ops
from lowprec.plan import Precision
assert lowprec.__file__.startswith({str(tmp_path)!r}), lowprec.__file__
assert _native.__file__.startswith({str(tmp_path)!r}), _native.__file__
print(ops.quantize(np.array([[0, 255]], np.float32), Precision.INT8).tolist())
"""
    # -S leaves out the hooks of site-packages, where an editable install would put the source tree in front.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[[0, 60, 0, 0, 0, 255]]\n", done.stderr


def test_sdist_holds_what_a_build_needs_and_no_leftovers(tmp_path: Path) -> None:
    sdist = build("build_sdist", tmp_path, tmp_path / "build")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "kernels/CMakeLists.txt",
        "kernels/path.cc",
        "kernels/mse.h",
        "lowprec/cli/main.py",
    } <= names
    built = re.compile(r"\.(so|a|o|pyc|parquet)$|CMakeCache|CMakeFiles|(^|/)(\.venv|build|runs|\.\w+_cache)(/|$)")
    assert not [name for name in names if built.search(name)]


def test_constraints_lie_within_the_bounds_of_the_project() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    version_of = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in pinned}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["cpu"], *extras["dev"], *PYPROJECT["build-system"]["requires"]]
    for requirement in map(Requirement, needed):
        name = canonicalize_name(requirement.name)
        if name == "pip":
            continue
        assert name in version_of, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(version_of[name]), f"{name}=={version_of[name]} is outside {requirement}"
