"""The whole demo from nothing, as `make demo` runs it after set-up. Prints one JSON object as its last line."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lowprec = Path(sys.executable).with_name("lowprec")
        began = time.perf_counter()
        done = subprocess.run([lowprec, "demo", "--root", folder, "--json"], stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
        document = json.loads(done.stdout)
    assert done.returncode == 0 and document["verdict"] == "certified", document["verdict"]
    assert document["confirm"]["gap_upper_pct"] <= document["budget_pct"]
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "verdict": document["verdict"],
                "bytes_ratio": round(document["bytes_ratio"], 4),
                "budget_pct": document["budget_pct"],
                "gap_pct": document["confirm"]["gap_pct"],
                "gap_upper_pct": document["confirm"]["gap_upper_pct"],
                "num_examples": document["confirm"]["num_examples"],
                "num_trials": document["num_trials"],
            }
        )
    )


if __name__ == "__main__":
    main()
