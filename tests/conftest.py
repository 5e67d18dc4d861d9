"""Settings and fixtures that every folder of tests shares."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock, Thread
from typing import Any

# One thread a process: the tests run in parallel, and PyTorch reads this when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from hypothesis import settings

from lowprec.config import Config, load_config

# Examples are the same in every run, so that a failure in one place can be had in another; no deadline, because the
# time of an example says nothing on a machine that runs other tests beside it.
settings.register_profile("lowprec", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lowprec")

SMALL_TABLES = (40, 80, 160, 320, 640, 1000)


@dataclass
class S3Server:
    """An S3 server (moto) in this process, one request after the other: then a conditional put is one step, as on S3.

    `requests` are those that came, with method, path, and the range of bytes that was asked for; `answer` is called
    with the WSGI environment before a request is taken: it may wait, and give another answer, as status and body.
    """

    app: Any
    endpoint: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], tuple[str, bytes] | None] | None = None
    _lock: Lock = field(default_factory=Lock)
    _numbers: Iterator[int] = field(default_factory=count)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        other = self.answer(environ) if self.answer else None
        if other is None:
            with self._lock:
                return list(self.app(environ, start_response))
        start_response(other[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(other[1])))])
        return [other[1]]

    def new_bucket(self) -> str:
        """The URL of an empty bucket."""
        import pyarrow.fs as pafs

        name = f"bucket-{next(self._numbers)}"
        keys = {"access_key": "key", "secret_key": "secret"}
        pafs.S3FileSystem(endpoint_override=self.endpoint, allow_bucket_creation=True, **keys).create_dir(name)
        return f"s3://{name}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The server, on a port of its own; nothing of it is in the environment."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True)
    server.endpoint = f"http://127.0.0.1:{http.server_port}"
    thread = Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield server
    http.shutdown()
    thread.join()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    """The server as this test and the processes that it starts find it: by the variables that a user sets."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("LOWPREC_SCRATCH", str(tmp_path / "scratch"))
    s3_server.requests.clear()
    yield s3_server
    s3_server.answer = None


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of an empty bucket of the test's own."""
    return s3.new_bucket()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic traffic with six tables, and an untrained model with rough tables."""
    from rough_model import save_rough_model

    from lowprec.traffic import SyntheticSpec, generate

    folder = tmp_path_factory.mktemp("small")
    spec = SyntheticSpec(
        num_rows=20_000,
        num_sparse=len(SMALL_TABLES),
        table_sizes=SMALL_TABLES,
        num_multi_hot=2,
        num_dense=3,
        num_interactions=3,
        num_users=300,
    )
    generate(spec, folder / "traffic")
    save_rough_model(_config(folder, folder / "runs"))
    return folder


@pytest.fixture
def small_config(small_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A config on the small traffic and model, with results in a folder of the test's own."""

    def make(*overrides: str) -> Config:
        return _config(small_folder, tmp_path / "runs", *overrides)

    return make


def _config(folder: Path, root: Path, *overrides: str) -> Config:
    document = {
        "name": "small",
        "traffic": {
            "path": str(folder / "traffic"),
            "time": "ts",
            "dense": ["d0", "d1", "d2"],
            "sparse": [{"name": f"c{i}", "num_embeddings": n} for i, n in enumerate(SMALL_TABLES)],
            "batch_size": 1024,
        },
        "windows": {
            "train": {"end": "2026-01-05"},
            "search": {"start": "2026-01-05", "end": "2026-01-08"},
            "confirm": {"start": "2026-01-08"},
        },
        "model": {
            "args": {"embedding_dim": 8, "bottom": [8], "top": [16]},
            "checkpoint": str(folder / "model.safetensors"),
        },
        "search": {"budget": 0.5, "max_trials": 24, "wave_size": 6, "sensitivity_examples": 1024},
        # The model is untrained, so its NE is above 1.
        "gate": {"max_ne": None},
        "evaluation": {"num_workers": 0, "batches_per_task": 2},
        "results": {"root": str(root)},
    }
    root.mkdir(parents=True, exist_ok=True)
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_config(path, overrides)
