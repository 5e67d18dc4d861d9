"""The history of a deployment: the state of both tests after every window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lowprec.monitor.judging.budget_test import BudgetState, BudgetTest
from lowprec.monitor.judging.evidence import WindowEvidence

__all__ = ["BreachHistory", "HistoryAt"]

_NOTHING = WindowEvidence(None, None, 0, 0)


@dataclass(frozen=True)
class HistoryAt:
    """How a deployment stands after a window.

    state: of the test by what the deployment is judged by; kl_state: of the test without labels. number: of the window,
    from 0. breach_start: the start of the window in which the breach was found that stands.
    """

    state: BudgetState
    kl_state: BudgetState
    number: int
    breach_start: int | None

    @property
    def num_running(self) -> int:
        """The windows that the running gap is over."""
        return self.number - self.state.since + 1


class BreachHistory:
    """What is known of each window, by its start, and what follows from it.

    The test by labels and the one without them see window after window; where evidence comes late for a window, both
    begin anew, which is cheap.
    """

    def __init__(
        self,
        known: Mapping[int, WindowEvidence | None],
        *,
        judged_by: str,
        budget_pct: float,
        false_alarm_rate: float,
        confidence: float,
        breaches: Iterable[int] = (),
    ) -> None:
        """Take up what is known.

        known: the evidence of the windows judged so far; None where a window could not be judged. breaches: the starts
        of windows after which a breach was found to begin.
        """
        self._known = dict(known)
        self._judged_by, self._budget = judged_by, budget_pct / 100
        self._rate, self._confidence = false_alarm_rate, confidence
        self._breaches = set(breaches)
        self._seen: list[int] = []
        self._states: list[tuple[BudgetState, BudgetState]] = []
        self._tests = self._new_tests()

    def add(self, start: int, evidence: WindowEvidence | None) -> None:
        """What is known of a window now."""
        if start in self._known and start in self._seen:
            self._seen, self._states, self._tests = [], [], self._new_tests()
        self._known[start] = evidence

    def add_breach(self, start: int) -> None:
        """A breach was found to begin after that window."""
        self._breaches.add(start)

    def after(self, start: int) -> HistoryAt:
        """How both tests stand after a window."""
        order = [k for k in sorted(self._known) if k <= start]
        if order[: len(self._seen)] != self._seen[: len(order)]:
            self._seen, self._states, self._tests = [], [], self._new_tests()
        for k in order[len(self._seen) :]:
            evidence = self._known[k] or _NOTHING
            by_labels, by_kl = self._tests
            self._states.append(
                (
                    by_labels.after(evidence.of(self._judged_by), is_known_breach=k in self._breaches),
                    by_kl.after(evidence.of("kl")),
                )
            )
            self._seen.append(k)
        state, kl_state = self._states[len(order) - 1]
        breach_start = None if state.breach_at is None else sorted(self._known)[state.breach_at]
        return HistoryAt(state, kl_state, len(order) - 1, breach_start)

    def _new_tests(self) -> tuple[BudgetTest, BudgetTest]:
        first, second = (
            BudgetTest(budget=self._budget, false_alarm_rate=self._rate, confidence=self._confidence) for _ in range(2)
        )
        return first, second
