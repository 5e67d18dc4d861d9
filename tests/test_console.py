"""What progress says away from a terminal."""

import pytest

from lowprec import console


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Bars().shown() as bars:
        bars.stage("trials", 2000)
        for now in (10, 29, 40, 41, 69, 75):
            clock[0] = now
            bars.advance(250)
    assert capsys.readouterr().err == "trials: 750 of 2,000\ntrials: 1,500 of 2,000\n"
