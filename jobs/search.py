"""A search as a job: python jobs/search.py CONFIG [--resume RUN] [--set KEY=VALUE]... prints its JSON document."""

import argparse
import sys

from lowprec.config import load_config
from lowprec.console import EXIT_CODES, json_document, print_document, report_error
from lowprec.errors import LowprecError
from lowprec.search import run_search


def main() -> int:
    """Parse, load, search, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--resume")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    try:
        outcome = run_search(load_config(options.config, tuple(options.overrides)), resume=options.resume)
    except LowprecError as error:
        return report_error(error, command="search", as_json=True, debug=False)
    print_document(json_document("search", outcome.to_dict()))
    return EXIT_CODES[outcome.verdict]


if __name__ == "__main__":
    sys.exit(main())
