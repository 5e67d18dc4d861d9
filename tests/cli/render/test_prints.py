"""What commands print for people, from documents of theirs (shortened). UPDATE_PRINTS=1 writes what they print now."""

import json
import os
from pathlib import Path

import pytest

from lowprec.cli import render
from lowprec.cli.console import stdout

HERE = Path(__file__).parent
DOCUMENTS = sorted((HERE / "documents").glob("*.json"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_document_is_printed_as_before(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    content = json.loads(path.read_text())
    monkeypatch.setattr(stdout, "_width", 200)
    getattr(render, content["render"])(content["document"])
    printed = "".join(line.rstrip() + "\n" for line in capsys.readouterr().out.splitlines())
    expected = HERE / "prints" / f"{path.stem}.txt"
    if os.environ.get("UPDATE_PRINTS") == "1":
        expected.write_text(printed)
    assert printed == expected.read_text()


def test_every_print_has_its_document() -> None:
    assert {path.stem for path in DOCUMENTS} == {path.stem for path in (HERE / "prints").glob("*.txt")}
