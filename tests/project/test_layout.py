"""The layout: short files, short folders, a README where a folder has many modules, tests that mirror the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lowprec"
MAX_LINES, MAX_MODULES, MODULES_WITHOUT_README = 400, 12, 5


def modules_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def folders() -> list[Path]:
    return sorted(path for path in [PACKAGE, *PACKAGE.rglob("*")] if path.is_dir() and (path / "__init__.py").exists())


def test_no_file_is_long() -> None:
    code = [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = {path.relative_to(ROOT): n for path in code if (n := path.read_text().count("\n")) > MAX_LINES}
    assert not long, f"split these: {long}"


def test_no_folder_is_long() -> None:
    long = {f.relative_to(ROOT): n for f in folders() if (n := len(modules_of(f))) > MAX_MODULES}
    assert not long, f"split these: {long}"


def test_nothing_lies_loose_at_the_top() -> None:
    assert set(modules_of(PACKAGE)) <= {"__main__", "_version", "api"}


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_folder_with_many_modules_says_what_is_in_each(folder: Path) -> None:
    modules, readme = modules_of(folder), folder / "README.md"
    if len(modules) <= MODULES_WITHOUT_README:
        assert not readme.exists(), "its __init__ says enough"
        return
    named = set(re.findall(r"^- `(\w+)`: ", readme.read_text(), re.M))
    assert named == {*modules, *(sub.name for sub in folder.iterdir() if (sub / "__init__.py").exists())}


def test_folders_of_tests_mirror_those_of_the_package() -> None:
    own = {"benchmarks", "e2e", "support", "project"}
    found = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strangers = [f for f in found if f.parts and f.parts[0] not in own and not (PACKAGE / f / "__init__.py").exists()]
    assert not strangers, f"lowprec has no folders for the tests in {sorted(map(str, strangers))}"
