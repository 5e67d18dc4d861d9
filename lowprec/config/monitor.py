"""The section `monitor`: how a deployed plan is monitored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lowprec.config.sections import Budget, TimeBound, WindowConfig
from lowprec.core.section import Section
from lowprec.core.sizes import parse_seconds
from lowprec.traffic.length import WindowLength

__all__ = ["DriftConfig", "MonitorConfig", "WebhookConfig"]


class DriftConfig(Section):
    """When a feature is named as moved: at that false discovery rate over the features of a window, and when its
    Jensen-Shannon distance from the certified window (0 to 1) is at least so large, and its distance from the nearest
    earlier window is larger by as much than was normal so far in this deployment.
    """

    false_discovery_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    min_distance: Annotated[float, Field(ge=0, le=1)] = 0.1


class WebhookConfig(Section):
    """Where alerts are posted: `url`, or the environment variable `url_env` where it holds a secret.

    One incident is told again after `cooldown` at the earliest, and when it is over.
    """

    url: str | None = None
    url_env: str | None = None
    states: Annotated[tuple[Literal["breach", "warn", "error"], ...], Field(min_length=1)] = ("breach", "error")
    cooldown: str = "6h"
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    retries: Annotated[int, Field(ge=0)] = 3

    _cooldown = field_validator("cooldown")(lambda text: _duration(text))

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> WebhookConfig:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("give either url or url_env")
        return self


class MonitorConfig(Section):
    """How a deployed plan is watched.

    window: the length of a window, aligned to the clock in UTC: 15m, 1h, 1d, 1w (from Monday), 1 month, 1 quarter,
    1 year; an integer where times are counters. A window is judged when it ended `lateness` ago, and again where labels
    or rows came within `labels_within` of its end. The first one begins at `start` (default: where the certified window
    ends), the last one ends at `end`.

    certified: the window that the plan was certified on, for what "moved" means; default windows.confirm.
    checkpoint: a path or URL with strftime fields, such as snapshots/%Y-%m-%d/model.safetensors: each window takes the
    latest snapshot from before it; default model.checkpoint.
    budget: percent; default: the plan's own. judge_by: the labelled gap, or kl, the label-free one, for traffic that
    never gets labels; that promise holds where the reference is calibrated.
    false_alarm_rate: the chance that a promise that holds is ever called broken, over the whole life of a deployment.
    expected_drift: features, by name or pattern, that are known to move, such as users who come and go; no window warns
    of their inputs. Warnings of the gap stay.
    textfile: a file that Prometheus's node exporter reads.
    """

    window: int | str = "1d"
    lateness: str = "0s"
    labels_within: str = "0s"
    start: TimeBound = None
    end: TimeBound = None
    certified: WindowConfig | None = None
    checkpoint: str | None = None
    budget: Budget | None = None
    judge_by: Literal["labels", "kl"] = "labels"
    false_alarm_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    drift: DriftConfig = DriftConfig()
    expected_drift: tuple[str, ...] = ()
    textfile: str | None = None
    webhook: WebhookConfig | None = None

    _durations = field_validator("lateness", "labels_within")(lambda text: _duration(text))

    @field_validator("window")
    @classmethod
    def _window_is_a_length(cls, value: int | str) -> int | str:
        WindowLength.parse(value)
        return value

    @field_validator("start", "end", mode="before")
    @classmethod
    def _yaml_dates_are_text(cls, value: object) -> object:
        return value.isoformat() if hasattr(value, "isoformat") else value


def _duration(text: str) -> str:
    parse_seconds(text, zero=True)
    return text
