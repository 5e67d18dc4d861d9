"""Evidence of a window for the lifetime tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowprec.evaluation.stats.confidence import RatioMoments
from lowprec.monitor.judging.budget_test import Evidence

__all__ = ["WindowEvidence"]


@dataclass(frozen=True)
class WindowEvidence:
    """What is kept of a window for the tests over the whole life, by labels and without them, and what was there.

    num_rows, num_labels: rows as they are logged, and those with a label: if they change, the window is judged again.
    """

    labels: Evidence | None
    kl: Evidence | None
    num_rows: int
    num_labels: int

    def of(self, judged_by: str) -> Evidence:
        """The evidence that the promise is judged by; nothing where there is none."""
        found = self.labels if judged_by == "labels" else self.kl
        return found or Evidence(RatioMoments(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Numbers that come back the same to the bit."""
        return {
            "labels": _evidence_dict(self.labels),
            "kl": _evidence_dict(self.kl),
            "num_rows": self.num_rows,
            "num_labels": self.num_labels,
        }

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> WindowEvidence:
        """The inverse of `to_dict`."""
        return cls(
            _evidence_of(flat["labels"]), _evidence_of(flat["kl"]), int(flat["num_rows"]), int(flat["num_labels"])
        )


def _evidence_dict(evidence: Evidence | None) -> dict[str, Any] | None:
    return None if evidence is None else {**vars(evidence.moments), "design_effect": evidence.design_effect}


def _evidence_of(flat: Mapping[str, Any] | None) -> Evidence | None:
    if flat is None:
        return None
    moments = {k: v for k, v in flat.items() if k != "design_effect"}
    return Evidence(RatioMoments(**moments), float(flat["design_effect"]))
