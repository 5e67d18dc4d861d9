"""Pages with numbers are what their scripts compute."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_about_scale_is_what_the_planner_says(tmp_path):
    command = [sys.executable, str(DOCS / "scale.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
