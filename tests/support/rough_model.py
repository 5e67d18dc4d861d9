"""The model of small searches: untrained, with tables rough enough to suffer from int2."""

import torch

from lowprec.config import Config
from lowprec.models.checkpoints.checkpoint import save_checkpoint
from lowprec.models.factory import build_model


def save_rough_model(config: Config) -> None:
    """Write the checkpoint that a config names; the same for the same config."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config.model.factory, config.model.args, config.traffic.schema_of_columns())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("tables."):
                    parameter.normal_(0, 0.3)
    save_checkpoint(model, config.model.checkpoint, {})
