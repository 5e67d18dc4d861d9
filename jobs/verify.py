"""A verification as a job: python jobs/verify.py CONFIG --plan PLAN [--set KEY=VALUE]... prints its JSON document."""

import argparse
import sys

from lowprec.config import load_config
from lowprec.console import EXIT_CODES, json_document, print_document, report_error
from lowprec.errors import LowprecError
from lowprec.search import verify_plan


def main() -> int:
    """Parse, load, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    try:
        outcome = verify_plan(load_config(options.config, tuple(options.overrides)), options.plan)
    except LowprecError as error:
        return report_error(error, command="verify", as_json=True, debug=False)
    print_document(json_document("verify", outcome.to_dict()))
    return EXIT_CODES[outcome.verdict]


if __name__ == "__main__":
    sys.exit(main())
