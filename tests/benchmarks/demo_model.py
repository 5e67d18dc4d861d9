"""The demo's traffic and model, made once under runs/ and used by every benchmark; also with more traffic."""

from pathlib import Path

from sizes import IS_SMOKE, sized

from lowprec.cli.demo import DEMO_CONFIG, generate_traffic
from lowprec.config import Config, load_config
from lowprec.core.progress import Silent
from lowprec.models.training.train import train

# The demo with 1,000,000 examples: 500,000 to train on, 250,000 to search on, 200,000 to confirm on. By minmax, as the
# searches written by hand quantize; mixed plans then have gaps of up to a percent, on which statistics are tried.
LARGE = (
    "name=large-demo",
    "traffic.synthetic.num_rows=1000000",
    "traffic.path=runs/large-demo/traffic",
    "model.checkpoint=runs/large-demo/calibrated.safetensors",
    "train.embedding_learning_rate=0.03",
    "train.decay=linear",
    "space.row_range=minmax",
    "windows.search={start: 2026-01-06T12:00, end: 2026-01-09}",
    "windows.confirm={start: 2026-01-09}",
)

# The same with the default way of choosing row ranges. It leaves rows of dim 16 little error; at dim 64 int2 has gaps
# as large as with minmax.
DEFAULT_ROW_RANGE = (
    "space.row_range=mse",
    "model.args={embedding_dim: 64, bottom: [64], top: [64, 32]}",
    "model.checkpoint=runs/large-demo/dim64.safetensors",
)


SMALL = sized((), ("traffic.synthetic.num_rows=20000", "evaluation.batches_per_task=1"))


def demo_config(*overrides: str) -> Config:
    """The demo config with its traffic generated and its model trained."""
    return _made(load_config(DEMO_CONFIG, (*overrides, *SMALL)))


def large_demo_config(*overrides: str) -> Config:
    """The demo with a search window of 250,000 examples; in process, on one thread, so that passes can be compared."""
    return _made(load_config(DEMO_CONFIG, (*LARGE, "evaluation.num_workers=0", *overrides, *SMALL)))


def _made(config: Config) -> Config:
    if IS_SMOKE:
        path, checkpoint = (
            text.replace("runs/", "runs/smoke/") for text in (config.traffic.path, config.model.checkpoint)
        )
        config = config.with_(traffic={"path": path}, model={"checkpoint": checkpoint})
    generate_traffic(config, progress=Silent())
    if not Path(config.model.checkpoint).exists():
        train(config)
    return config
