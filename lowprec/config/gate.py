"""The section `gate`: requirements on a model beside the budget of its plan."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from lowprec.core.section import Section

__all__ = ["GateConfig"]


class GateConfig(Section):
    """The floors of `lowprec verify`: a plan that breaks one is rejected, whatever its gap.

    Each floor judges the model that would be served, the plan on its checkpoint, by its point estimate on the window.

    max_ne: NE must be below it; 1 is the loss of predicting the label rate for every example. null turns it off.
    calibration: the range that the sum of predictions divided by the sum of labels must lie in, such as [0.9, 1.1].
    max_ne_change_pct: with --snapshot, the largest rise of NE in percent, against the plan on model.checkpoint, the
    deployed checkpoint, on the same window.
    """

    max_ne: Annotated[float, Field(gt=0)] | None = 1.0
    calibration: tuple[float, float] | None = None
    max_ne_change_pct: Annotated[float, Field(gt=-100)] | None = None

    @field_validator("calibration")
    @classmethod
    def _range_rises(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError("expected a range [lowest, highest] with 0 <= lowest < highest, such as [0.9, 1.1]")
        return value
