"""The drift monitor as a Ray job: ray job submit --working-dir jobs -- python monitor.py CONFIG --plan PLAN [OPTION]...

CONFIG and what it names have to lie where the cluster sees them. Options, exit codes and the JSON document on stdout
are those of `lowprec monitor --json`; workers run on the cluster of the job.
"""

import sys

from lowprec.cli.main import main

if __name__ == "__main__":
    main(["monitor", "--json", *sys.argv[1:]])
