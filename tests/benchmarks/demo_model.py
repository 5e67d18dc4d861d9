"""The demo's traffic and model, made once under runs/demo and used by every benchmark."""

from pathlib import Path

from lowprec.config import Config, load_config
from lowprec.demo import DEMO_CONFIG, generate_traffic
from lowprec.models.train import train
from lowprec.progress import Silent


def demo_config(*overrides: str) -> Config:
    """The demo config with its traffic generated and its model trained."""
    config = load_config(DEMO_CONFIG, overrides)
    generate_traffic(config, progress=Silent())
    if not Path(config.model.checkpoint).exists():
        train(config)
    return config
