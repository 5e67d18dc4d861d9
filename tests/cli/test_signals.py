"""Asked to end, a command ends: with the code of who asked, and also where the first asking gets lost."""

import signal
import subprocess
import sys

import pytest

from lowprec.evaluation.workers.ray.connect import _own_termination

# A command that loses the first interrupt, as a callback of a library does, and takes its time to clean up after the
# second one.
COMMAND = """
import sys, time
import lowprec.cli.doctor
from lowprec.cli.main import main

def look(*_args, **_kwargs):
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    except BaseException:
        pass
    try:
        time.sleep(60)
    finally:
        time.sleep(2.5)
        print("clean", file=sys.stderr, flush=True)

lowprec.cli.doctor.examine = look
main(["doctor"])
"""


@pytest.mark.parametrize(
    "number, code, said", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_an_interrupt_that_a_library_swallowed_comes_again_and_leaves_cleaning_up_alone(number, code, said):
    process = subprocess.Popen([sys.executable, "-c", COMMAND], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=50)  # left alone, the command sleeps for longer
    assert process.returncode == code and err.split() == ["clean", said], err


# A command that uses Ray, whose threads crash the process when Python is taken down, and that loses the first interrupt
# inside a callback, as those around a fork are.
RAY_COMMAND = """
import atexit, os, signal, sys, time, types
import lowprec.cli.doctor
from lowprec.cli.main import main

class Crashes:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGSEGV)

class Swallows:
    def __del__(self):
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)

def look(*_args, **_kwargs):
    sys.modules["ray"], sys.crashes = types.ModuleType("ray"), Crashes()
    atexit.register(print, "shut down", file=sys.stderr)
    print("output")
    Swallows()
    time.sleep(60)

lowprec.cli.doctor.examine = look
main(["doctor"])
"""


@pytest.mark.parametrize(
    "number, code, said", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_an_interrupted_command_that_used_ray_ends_with_its_code_and_no_traceback(number, code, said):
    command = [sys.executable, "-c", RAY_COMMAND]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "ready\n")
    assert list(lines) == ["output\n"]  # of a command only the document is on stdout
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.split()) == (code, [said, "shut", "down"]), err


def test_asked_to_end_while_ray_begins_it_ends_as_asked_at_any_other_time():
    """Ray's own handler, which it has until it has begun, ends the process with the number of the signal."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with _own_termination():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with pytest.raises(SystemExit), _own_termination():
            sys.exit(3)
    finally:
        signal.signal(signal.SIGTERM, before)
