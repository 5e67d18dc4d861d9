"""What progress says away from a terminal."""

import pytest
from rich.table import Table

from lowprec.cli import console


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Bars().shown() as bars:
        bars.stage("trials", 2000)
        for now in (10, 29, 40, 41, 69, 75):
            clock[0] = now
            bars.advance(250)
    assert capsys.readouterr().err == "trials: 750 of 2,000\ntrials: 1,500 of 2,000\n"


def test_names_do_not_become_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    for screen, stream in ((console.stdout, "out"), (console.stderr, "err")):
        screen.print(console.escape("4. layer:b: 8 percent of layer:x:"))
        assert getattr(capsys.readouterr(), stream) == "4. layer:b: 8 percent of layer:x:\n"
    table = Table("unit", title="layer:x:")
    table.add_row("layer:b:")
    console.stdout.print(table)
    said = capsys.readouterr().out
    assert "layer:x:" in said and "layer:b:" in said
