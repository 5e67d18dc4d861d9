"""The import rule: arrows go one way, and what is heavy or compiled is imported in one place only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lowprec"

# From the bottom up: a part imports parts of lower layers and of its own; a part is a file or a folder of lowprec/.
LAYERS = (
    {"_version", "core"},
    {"storage"},
    {"plan"},
    {"ops"},
    {"traffic", "models", "shards", "results", "config", "latency"},
    {"evaluation"},
    {"session"},
    {"search"},
    {"gate", "monitor", "debug", "export", "jobs"},
    {"cli"},
)
# The package itself, and the command that `python -m lowprec` is.
TOP = {"__init__", "__main__"}
LAYER_OF = {part: index for index, layer in enumerate(LAYERS) for part in layer}

# Who alone may import these, as paths below lowprec/.
OWNERS = {
    "ray": ("evaluation/workers/ray/", "jobs/client.py"),
    "optuna": ("search/proposals/study.py",),
    # Results are written through it; of traffic that is a Delta table it only reads which files are in a version.
    "deltalake": ("results/", "traffic/files/delta_table.py"),
    "duckdb": ("results/",),
    "lowprec._native": ("ops/",),
    "fbgemm_gpu": ("ops/",),
    "torchrec": ("models/inputs.py", "export/torchrec.py"),
}
CLI_FILES = tuple(f"cli/{name}.py" for name in ("main", "command", "console", "plan", "serving", "machine", "jobs"))
TORCH_FREE = ("traffic/", "storage/", "core/", "plan/", "config/", "jobs/", *CLI_FILES)
HEAVY = ("torch", "ray", "optuna", "fbgemm_gpu", "pyarrow", "pandas", "deltalake", "duckdb")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


@cache
def python_files() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Every module that a file imports, at its top or inside functions; names from lowprec may be modules."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this project"
            module = node.module or ""
            yield module
            if module.split(".")[0] == "lowprec":
                yield from (f"{module}.{alias.name}" for alias in node.names)


def below_package(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def part_of(path: Path) -> str:
    return below_package(path).split("/")[0].removesuffix(".py")


def parts_imported(path: Path) -> set[str]:
    modules = (module.split(".") for module in imported_modules(path))
    parts = {names[1] for names in modules if names[0] == "lowprec" and len(names) > 1}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()}


def test_every_part_has_a_layer_and_every_layer_has_its_parts() -> None:
    parts = {part_of(path) for path in python_files()} - TOP
    assert parts == LAYER_OF.keys(), f"give these a place in LAYERS, or take it: {sorted(parts ^ LAYER_OF.keys())}"


def test_arrows_go_one_way() -> None:
    arrows: dict[str, set[str]] = {}
    for path in python_files():
        part = part_of(path)
        for target in parts_imported(path) - {part, *TOP}:
            # The package itself imports what it exports when it is asked for it.
            assert part in TOP or LAYER_OF[target] <= LAYER_OF[part], f"{path} imports {target} from above"
            arrows.setdefault(part, set()).add(target)
    TopologicalSorter(arrows).prepare()  # raises CycleError: two parts of one layer must not import each other


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_is_imported_by_what_it_imports() -> None:
    modules = {module_of(path): path for path in python_files()}
    arrows = {module: (imported_modules(path) & modules.keys()) - {module} for module, path in modules.items()}
    for module, targets in arrows.items():
        # `from lowprec.plan import cost` names the package too; what is meant is the module, or a name of the package.
        named = {t for t in targets if any(other.startswith(f"{t}.") for other in targets)}
        arrows[module] = targets - named - {"lowprec"}
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize(("module", "owners"), OWNERS.items())
def test_is_imported_by_its_owner_only(module: str, owners: tuple[str, ...]) -> None:
    for path in python_files():
        if any(is_within(imported, module) for imported in imported_modules(path)):
            assert below_package(path).startswith(owners), f"{below_package(path)} imports {module}"


def test_torch_stays_out_of_what_starts_quickly() -> None:
    for path in python_files():
        if below_package(path).startswith(TORCH_FREE):
            assert not any(is_within(module, "torch") for module in imported_modules(path)), below_package(path)


def test_the_rule_sees_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "probe.py"
    path.write_text("def f():\n    from lowprec import _native\n    import ray.util\nfrom lowprec.ops.native import y")
    assert {"lowprec._native", "ray.util", "lowprec.ops.native"} <= set(imported_modules(path))


def test_kernels_and_jobs_are_no_packages() -> None:
    assert not [path for folder in ("kernels", "jobs") for path in (ROOT / folder).rglob("__init__.py")]


def test_every_package_says_what_is_public() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert "__all__" in path.read_text(), f"{below_package(path)} has no __all__"


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in python_files()}
    assert not [below_package(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_names_say_what_a_file_does() -> None:
    files = [*python_files(), *(ROOT / "jobs").rglob("*.py"), *(ROOT / "kernels").glob("*.[ch]*")]
    assert not [path.name for path in files if set(path.stem.lower().split("_")) & VAGUE_NAMES]


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from lowprec.cli.main import main
sys.argv = ["lowprec", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print("heavy:", sorted(set({HEAVY!r}) & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n"), done.stdout[-200:]
