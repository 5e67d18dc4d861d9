"""The life of a deployment: how both of its promises stood after every window, as far as is known now."""

from __future__ import annotations

from collections.abc import Mapping

from lowprec.monitor.judging.budget_test import BudgetState, BudgetTest
from lowprec.monitor.judging.judge import WindowEvidence

__all__ = ["BreachHistory"]

_NOTHING = WindowEvidence(None, None, 0, 0)


class BreachHistory:
    """What is known of each window, by its start, and what follows from it.

    The promise by labels and the one without them are told window after window; evidence that comes late for a window
    tells both anew from the beginning, which is cheap.
    """

    def __init__(
        self,
        known: Mapping[int, WindowEvidence | None],
        *,
        judged_by: str,
        budget_pct: float,
        false_alarm_rate: float,
        confidence: float,
    ) -> None:
        """known: the evidence of the windows judged so far; None where a window could not be judged."""
        self._known = dict(known)
        self._judged_by, self._budget = judged_by, budget_pct / 100
        self._rate, self._confidence = false_alarm_rate, confidence
        # Windows after which a breach of the promise was found to begin.
        self.breaches: set[int] = set()
        self._told: list[int] = []
        self._standings: list[tuple[BudgetState, BudgetState]] = []
        self._promises = self._new_promises()

    def add(self, start: int, evidence: WindowEvidence | None) -> None:
        """What is known of a window now."""
        if start in self._known and start in self._told:
            self._told, self._standings, self._promises = [], [], self._new_promises()
        self._known[start] = evidence

    def after(self, start: int) -> tuple[BudgetState, BudgetState, int]:
        """How the promise stands after a window: by what it is judged by, and by KL; and the window's number."""
        order = [k for k in sorted(self._known) if k <= start]
        if order[: len(self._told)] != self._told[: len(order)]:
            self._told, self._standings, self._promises = [], [], self._new_promises()
        for k in order[len(self._told) :]:
            evidence = self._known[k] or _NOTHING
            by_labels, by_kl = self._promises
            self._standings.append(
                (
                    by_labels.after(evidence.of(self._judged_by), is_known_breach=k in self.breaches),
                    by_kl.after(evidence.of("kl")),
                )
            )
            self._told.append(k)
        return *self._standings[len(order) - 1], len(order) - 1

    def start_of(self, number: int) -> int:
        """The start of the window of that number, as `BudgetState` counts them."""
        return sorted(self._known)[number]

    def _new_promises(self) -> tuple[BudgetTest, BudgetTest]:
        first, second = (
            BudgetTest(budget=self._budget, false_alarm_rate=self._rate, confidence=self._confidence) for _ in range(2)
        )
        return first, second
