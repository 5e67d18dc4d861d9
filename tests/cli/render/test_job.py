"""What people are shown of a job."""

import pytest

from lowprec.cli.render import render_train


def test_bad_rows_of_a_training_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    quality = {"num_examples": 90, "ne": 0.8, "auc": 0.7, "calibration": 1.0}
    rows = {"num_rows": 90, "num_unlabelled": 3, "num_bad": 7, "out_of_range": {"user": 2}}
    times = {"epochs": 1.0, "best_epoch": 1.0, "seconds": 0.1}
    written = {"checkpoint": "model.safetensors", "checkpoint_sha256": "0" * 64}
    render_train({"train": quality, "validation": quality, **rows, **times, **written})
    told = [line for line in capsys.readouterr().out.splitlines() if "of 100 rows" in line]
    assert told == [
        "train window, of 100 rows: 7 bad rows (kept in quarantine), 3 rows without a label, 2 ids of user out of range"
    ]
