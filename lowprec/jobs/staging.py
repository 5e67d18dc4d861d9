"""What a job takes along: its config, a plan, the code of the user's model. Never data, and never lowprec itself."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import yaml

from lowprec.config import Config
from lowprec.core.errors import ConfigError, PlanError
from lowprec.core.exit_codes import ERROR
from lowprec.jobs.code import model_code
from lowprec.storage import AnyPath, Location

__all__ = ["StagedJob", "local_paths", "stage_job"]

CONFIG_NAME, PLAN_NAME, START_NAME = "lowprec-job.yaml", "lowprec-plan.json", "lowprec-job.sh"

# Ray sends the folder through the cluster's head node. This is plenty for code, and no checkpoint fits by mistake.
MAX_CODE_BYTES = 50 * 2**20

# A Ray job gets the `python` of the head node's PATH, which is not Ray's own where `ray start` came from an environment
# that was not activated. On this machine, or in the same image, the submitter's Python is the next best guess.
_START = """\
for python in {pythons}; do
  "$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("ray", "lowprec"))))' 2>/dev/null &&
    exec "$python" -m lowprec "$@"
done
echo "error: none of these has lowprec and Ray on the cluster's head node:" {pythons} >&2
echo "install lowprec where the cluster's Ray is, or say which Python that is: lowprec submit ... --python PATH" >&2
exit {error}
"""


@dataclass(frozen=True)
class StagedJob:
    """A folder to send, and the command line that runs in it on the cluster.

    code: the names of the modules and packages that go with it, empty where the model has none in the submitter's
    folder.
    """

    folder: Path
    entrypoint: str
    job: str
    config: Config
    code: tuple[str, ...]

    def notes(self, *, is_here: bool) -> list[str]:
        """What the submitter should know, in sentences; `is_here` where the cluster is on this machine."""
        notes = [f"sent with the job: {', '.join(self.code)}"] if self.code else []
        module = _module(self.config)
        if not self.code and module != "lowprec":
            notes.append(f"model.factory: {module} is not in this folder, so it has to be installed on the cluster")
        local = [f"{key} {path}" for key, path in local_paths(self.config).items()]
        if local and not is_here:
            notes.append(f"every machine of the cluster has to see the same as this one at: {', '.join(local)}")
        return notes


@contextmanager
def stage_job(
    config: Config, job: str, options: Mapping[str, object] = MappingProxyType({}), *, python: str | None = None
) -> Iterator[StagedJob]:
    """A folder that holds all that `lowprec JOB CONFIG OPTIONS` needs on a cluster but data; gone after the block.

    The config is as it was resolved, with local paths made absolute, and workers on the cluster that the job runs on.
    options: by name (`--resume`), with values as the command line gives them; None and False are those that were not
    given. A plan of this machine is sent, other files are named by their URL or absolute path. python: the interpreter
    to take there. Raises `PlanError` where the plan cannot be read, `ConfigError` where the code is too large to be
    only code.
    """
    config = _for_cluster(config)
    with tempfile.TemporaryDirectory(prefix="lowprec-job-") as name:
        folder = Path(name)
        # YAML, not JSON: what reads it takes 1e-05 for text.
        (folder / CONFIG_NAME).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        pythons = " ".join(map(shlex.quote, [python] if python else ["python", "python3", sys.executable]))
        (folder / START_NAME).write_text(_START.format(pythons=pythons, error=ERROR))
        code = model_code(_module(config), Path.cwd(), data=local_paths(config).values())
        _copy_code(code, folder)
        arguments = [part for option, value in options.items() for part in _arguments(option, value, folder)]
        yield StagedJob(
            folder=folder,
            entrypoint=shlex.join(["sh", START_NAME, job, CONFIG_NAME, *arguments]),
            job=job,
            config=config,
            code=tuple(sorted({file.parts[0] for file in code})),
        )


def local_paths(config: Config) -> dict[str, str]:
    """The paths of a config that are not URLs, by key."""
    paths = {
        "traffic.path": config.traffic.path,
        "model.checkpoint": config.model.checkpoint,
        "cost.calibration": config.cost.calibration,
        "results.root": config.results.root,
    }
    return {key: path for key, path in paths.items() if path is not None and "://" not in path}


def _module(config: Config) -> str:
    """The top-level module or package of the model's factory."""
    return config.model.factory.partition(":")[0].split(".")[0]


def _for_cluster(config: Config) -> Config:
    paths = {key: _absolute(path) for key, path in local_paths(config).items()}
    paths["evaluation.address"] = "auto"  # the cluster that the job runs on, as Ray tells it
    for key, value in paths.items():
        section, name = key.split(".")
        config = config.with_(**{section: {name: value}})
    return config


def _arguments(option: str, value: object, folder: Path) -> list[str]:
    """An option as the job gets it."""
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, tuple):  # an option that may be given several times
        return [part for one in value for part in _arguments(option, one, folder)]
    if isinstance(value, Location) and value.local is not None and option == "--plan":
        _copy_plan(value.local, folder / PLAN_NAME)
        return [option, PLAN_NAME]
    return [option, _absolute(value) if isinstance(value, Location | Path) else str(value)]


def _absolute(path: AnyPath) -> str:
    return str(Location.of(path).absolute())


def _copy_plan(plan: Path, target: Path) -> None:
    try:
        shutil.copyfile(plan, target)
    except OSError as error:
        raise PlanError(f"plan {plan}: cannot be read: {error.strerror or error}") from None


def _copy_code(code: Mapping[Path, Path], folder: Path) -> None:
    sizes = {file: source.stat().st_size for file, source in code.items()}
    if sum(sizes.values()) > MAX_CODE_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(
            f"model.factory: the code of the model to send with the job has {sum(sizes.values()):,} bytes, {largest} "
            f"alone {sizes[largest]:,}; at most {MAX_CODE_BYTES:,} are sent: keep data out of its package, or install "
            "the package on the cluster and submit from another folder"
        )
    for file, source in code.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / file)
