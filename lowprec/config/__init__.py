"""The config file: one YAML document, checked once, with errors that name file and key."""

from lowprec.config.document import Config, load_config
from lowprec.config.monitor import DriftConfig, MonitorConfig, WebhookConfig
from lowprec.config.sections import (
    CostConfig,
    EvaluationConfig,
    ModelConfig,
    ResultsConfig,
    SearchConfig,
    SpaceConfig,
    SparseConfig,
    TimeBound,
    TrafficConfig,
    TrainConfig,
    UnitRule,
    WindowConfig,
    WindowsConfig,
)

__all__ = [
    "Config",
    "CostConfig",
    "DriftConfig",
    "EvaluationConfig",
    "ModelConfig",
    "MonitorConfig",
    "ResultsConfig",
    "SearchConfig",
    "SpaceConfig",
    "SparseConfig",
    "TimeBound",
    "TrafficConfig",
    "TrainConfig",
    "UnitRule",
    "WebhookConfig",
    "WindowConfig",
    "WindowsConfig",
    "load_config",
]
