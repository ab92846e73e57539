"""SIGINT and SIGTERM end our programs in one line with 130 or 143, from the first moment and inside of compilations."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.jobs import ROOT

# The module alone, without the imports of the package, in a program that hangs in C as a compilation does.
PROGRAM = """
import ctypes, importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("signals", {module!r})
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals.install()
hang = lambda: (print("ready", flush=True), ctypes.CDLL(None).sleep(600))
{body}
"""
HELD = """
with signals.held() as caught, signals.advising("Go on with --resume"):
    print("ready", flush=True)
    while not caught: time.sleep(0.01)
    hang()
"""
FORKED = """
read, write = os.pipe()
child = os.fork()
if not child:
    os.write(write, b"!")
    time.sleep(60)
os.read(read, 1)
os.kill(child, 15)
assert os.waitpid(child, 0)[1] == 15  # the child has no handlers of ours, and its signal does not end the parent
hang()
"""


def ended(body: str, *numbers: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program that gets each signal once it has said that it is ready."""
    program = PROGRAM.format(module=str(ROOT / "spt_jax" / "runtime" / "signals.py"), body=textwrap.dedent(body))
    line = [sys.executable, "-c", program]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(line, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for number in numbers:
                assert process.stdout.readline() == "ready\n"
                process.send_signal(number)
            said = process.communicate(timeout=60)  # it would sleep for ten minutes
        finally:
            process.kill()
    return process.returncode, *said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_a_program_that_hangs_in_c(number: signal.Signals):
    assert ended("hang()", number) == (128 + number, "", f"stopped by {number.name}\n")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_does_not_wait_for_the_step(first: signal.Signals):
    assert ended(HELD, first, signal.SIGINT) == (130, "", "stopped by SIGINT. Go on with --resume\n")


PRINTED = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [2])
print("an answer"), os.write(1, b"ready\\n")  # the signal may come to another thread at once
signal.pthread_sigmask(signal.SIG_UNBLOCK, [2])
while True: time.sleep(1)
"""


def test_what_was_printed_is_written_out():
    assert ended(PRINTED, signal.SIGINT) == (130, "an answer\n", "stopped by SIGINT\n")


def test_sigterm_is_taken_back_from_a_handler_in_c():
    body = "ctypes.CDLL(None).signal(15, ctypes.c_void_p(1))  # ignored, without Python's knowledge\n"
    assert ended(body + "signals.reclaim()\nhang()", signal.SIGTERM)[0] == 143


def test_a_forked_child_dies_alone():
    assert ended(FORKED, signal.SIGTERM)[0] == 143


CONSOLE_SCRIPT = "import sys\nfrom spt_jax.commands.program import main\nsys.exit(main())\n"


@pytest.mark.parametrize("program", [["train.py"], ["-m", "spt_jax"], ["spt-jax"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports(program: list[str], number: signal.Signals, tmp_path: Path):
    """The imports take seconds; the handlers are there after some hundredths."""
    words = ["configs/quickstart.py", "--dry-run"] if program == ["train.py"] else ["serve", "--base", "starter"]
    if program == ["spt-jax"]:  # as pip writes it for the entry point
        (tmp_path / "spt-jax").write_text(CONSOLE_SCRIPT)
        program = [str(tmp_path / "spt-jax")]
    line = [sys.executable, "-X", "importtime", *program, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for said in process.stderr:
            if said.rstrip().endswith("spt_jax.runtime.signals"):
                break
        process.send_signal(number)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert rest.endswith(f"stopped by {number.name}\n") and "Traceback" not in rest


def test_a_library_keeps_its_users_handlers():
    """Imported by another program, the package leaves signals alone."""
    # A shell starts programs in the background with SIGINT ignored.
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
