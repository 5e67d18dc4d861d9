"""The config file: one YAML document, checked once, with errors that name file and key."""

from lowprec.config.document import Config, load_config
from lowprec.config.gate import GateConfig
from lowprec.config.monitor import DriftConfig, MonitorConfig, WebhookConfig
from lowprec.config.override import with_gate
from lowprec.config.sections import (
    CostConfig,
    EvaluationConfig,
    ModelConfig,
    ResultsConfig,
    SearchConfig,
    SparseConfig,
    TimeBound,
    TrafficConfig,
    TrainConfig,
    WindowConfig,
    WindowsConfig,
)
from lowprec.config.space import ArithmeticConfig, LayersConfig, SpaceConfig, UnitRule

__all__ = [
    "ArithmeticConfig",
    "Config",
    "CostConfig",
    "DriftConfig",
    "EvaluationConfig",
    "GateConfig",
    "LayersConfig",
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
    "with_gate",
]
