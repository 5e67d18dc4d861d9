"""The complete demo: generate traffic, train, search, confirm."""

from __future__ import annotations

import json
from pathlib import Path

from lowprec.config import Config, load_config
from lowprec.core.errors import ConfigError
from lowprec.core.progress import Progress
from lowprec.search import SearchOutcome, run_search

__all__ = ["DEMO_CONFIG", "generate_traffic", "run_demo"]

# Inside the package, so that an installed lowprec has it; configs/demo.yaml is a link to it.
DEMO_CONFIG = Path(__file__).with_name("demo.yaml")


def run_demo(root: Path, *, progress: Progress) -> SearchOutcome:
    """Run the demo config with results under `root`, traffic and checkpoint under its folder `demo`.

    Traffic and a checkpoint that are there already are kept.
    """
    config = load_config(
        DEMO_CONFIG,
        (
            f"traffic.path={json.dumps(str(root / 'demo' / 'traffic'))}",
            f"model.checkpoint={json.dumps(str(root / 'demo' / 'model.safetensors'))}",
            f"results.root={json.dumps(str(root))}",
        ),
    )
    num_rows = generate_traffic(config, progress=progress)
    progress.note(f"traffic: {num_rows:,} examples in {config.traffic.path}")
    if Path(config.model.checkpoint).exists():
        progress.note(f"model: {config.model.checkpoint} is there already")
    else:
        from lowprec.models.training.train import train

        report = train(config, progress=progress)
        progress.note(
            f"model: NE {report.validation.ne:.4f}, AUC {report.validation.auc:.4f}, calibration "
            f"{report.validation.calibration:.3f} on the validation window, {report.seconds:.0f} s"
        )
    return run_search(config, progress=progress)


def generate_traffic(config: Config, *, progress: Progress) -> int:
    """Write the traffic of `traffic.synthetic` to `traffic.path`, unless it is there already; returns its rows."""
    if config.traffic.synthetic is None:
        raise ConfigError("traffic.synthetic: is required to generate traffic; {} takes every default")
    from lowprec.traffic import SyntheticSpec, generate

    spec = SyntheticSpec.from_dict(config.traffic.synthetic)
    progress.stage("traffic", 1)
    num_rows = generate(spec, config.traffic.path)
    progress.advance()
    return num_rows
