"""What long tasks show: bars on a terminal, few plain lines in a log file, and hints about names."""

import io
import re
import sys
import threading
import time

import numpy as np
import pytest

from spt_jax.reports.report import compact_table, comparison_table
from spt_jax.runtime import progress
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.progress import Progress, duration, say
from spt_jax.runtime.waits import silent, spoken
from spt_jax.training.clock import validation_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_in_five_seconds(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "_POLL_SECONDS", 60.0)
    monkeypatch.setattr(progress, "_lines", progress._Lines())
    with Progress("sweep", 3) as trials:
        trials.begin("trials 1 to 2")
        with Progress("training", 40, 10, unit="step") as steps:
            for number in range(30):
                clock[0] += 1.0
                steps.advance(note=f"loss {number}")
        trials.advance(2)
    assert trials.remaining == 15.0  # a third of the time that the first two trials took
    compiled = Progress("training", 4)
    for seconds in (50.0, 2.0):
        clock[0] += seconds
        compiled.advance()
    compiled.close()
    assert compiled.remaining == 4.0  # the first step includes compilation
    lines = capsys.readouterr().err.splitlines()[:7]
    assert lines == [
        "sweep: trials 1 to 2, 1 of 3, after 0 s",
        "sweep: trials 1 to 2, 1 of 3, after 5 s; training: step 15 of 40, loss 4, 25 s left",
        "sweep: trials 1 to 2, 1 of 3, after 10 s; training: step 20 of 40, loss 9, 20 s left",
        "sweep: trials 1 to 2, 1 of 3, after 15 s; training: step 25 of 40, loss 14, 15 s left",
        "sweep: trials 1 to 2, 1 of 3, after 20 s; training: step 30 of 40, loss 19, 10 s left",
        "sweep: trials 1 to 2, 1 of 3, after 25 s; training: step 35 of 40, loss 24, 5 s left",
        "sweep: trials 1 to 2, 1 of 3, after 30 s; training: step 40 of 40, loss 29, 0 s left",
    ]


def test_the_log_of_a_long_run_stays_short(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "_POLL_SECONDS", 60.0)
    monkeypatch.setattr(progress, "_lines", progress._Lines())
    written = []
    for _ in range(2):  # the second task starts from lines in 5 seconds again
        begun, lines = clock[0], []
        with Progress("training", 10_000) as task:
            for _ in range(3600):
                task.begin("epoch 1")
                if clock[0] - begun == 1000.0:
                    say("step 50: validation")
                lines += [(clock[0] - begun, line) for line in capsys.readouterr().err.splitlines()]
                clock[0] += 1.0
        written.append(lines)
        clock[0] += 100.0
    assert written[0] == written[1] and len(written[0]) < 130
    promised = 5.0
    for (before, line), (at, _) in zip(written[0], written[0][1:], strict=False):
        said = re.search(r"; next line in (.*)", line)
        promised = {None: 5.0, "10 s": 10.0, "1:00 min": 60.0}[said and said[1]]
        assert at - before == promised or 1000.0 in (before, at)
        assert promised == 5.0 or before >= 60
    assert promised == 60.0 and (1060.0 in dict(written[0]))


def test_a_long_wait_is_said_again(capsys, monkeypatch):
    monkeypatch.setattr(progress, "line_seconds", lambda elapsed: 0.05)
    monkeypatch.setattr(progress, "_lines", progress._Lines())
    with Progress("training", 2), spoken("compiling", after=0.01):
        time.sleep(0.4)
    with spoken("loading", after=0.01):
        time.sleep(0.3)
    time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines.index("compiling ...") < lines.index("training: 0 of 2, after 0 s; compiling, after 0 s")
    assert [re.sub(r"[\d.]+", "N", line) for line in lines if line.startswith("loading")][-2:] == [
        "loading, after N s",
        "loading: N s",
    ]
    assert len(lines) > 6 and lines[-1].startswith("loading: ") and not progress._lines.open


def test_a_task_without_news_is_not_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "line_seconds", lambda elapsed: 0.0)
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_lines", progress._Lines())
    with Progress("comparing", 2) as task:
        task._closed.wait(0.2)
    assert capsys.readouterr().err.count("comparing: 0 of 2, after 0 s\n") > 3
    Progress("comparing", 2, shown=False).advance()
    assert capsys.readouterr() == ("", "")


def test_waits_can_be_silent(capsys):
    with silent(), spoken("loading", after=0.0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    with spoken("loading", after=0.0):
        time.sleep(0.1)
    assert "loading ..." in capsys.readouterr().err


def test_waits_that_begin_at_once_share_the_bars_of_a_terminal(monkeypatch):
    """The first bars take a while to make, as rich is imported then."""
    make, made, failed = progress._new_bars, [], []

    def slowly():
        time.sleep(0.2)
        made.append(make())
        return made[-1]

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_new_bars", slowly)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with spoken("preparing", after=0.01), spoken("loading", after=0.01):
        time.sleep(0.1)
        with Progress("training", 2) as task:
            task.advance()
    assert len(made) == 1 and not failed and progress._display.bars is None


def test_a_terminal_gets_bars_and_lines_above_them(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Progress("sweep", 3) as trials, Progress("training", 40, unit="step") as steps:
        trials.begin("trial 1")
        steps.advance(4, "loss [0.5]")
        say("step 4: [bold]validated")
        progress._display.bars.refresh()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "\x1b[?25l" not in terminal.getvalue()  # the cursor stays visible
    assert "step 4: [bold]validated\n" in drawn
    assert re.search(r"sweep: trial 1 +\S+ 0/3", drawn) and re.search(r"training +\S+ +4/40 +loss \[0.5\]", drawn)
    assert progress._display.bars is None


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.4, "59 s"), (725.0, "12:05 min"), (12000.0, "3:20 h")]
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected


def test_a_validation_is_one_line():
    classes = [{"accuracy": value, "loss": 1.0} for value in (0.25, 0.75)]
    best = {"accuracy": 0.8, "loss": 0.5}
    one = validation_line(40, classes[1:], best, 20)
    assert one == "step 40: validation accuracy 0.750, loss 1.000 (best 0.800 at step 20)"
    several = validation_line(40, classes, best, 20)
    assert several == "step 40: validation accuracy of 2 trials 0.250 to 0.750 (best 0.800 at step 20)"
    assert (
        validation_line(4, [{"loss": 2.0}], {"loss": 1.5}, 2) == "step 4: validation loss 2.000 (best 1.500 at step 2)"
    )


def test_tables_fit_80_columns():
    interval, prompt = [0.733, 0.83], "hard prompt 'Answer the following question about this passage: {text}'"
    text = {"perplexity": 12.3, "exact_match": 0.1, "token_f1": 0.2, "bleu": 41.7, "rougeL": 0.3}
    asked = {"soft_prompt": {**text, "exact_match_interval": interval}, prompt: text}
    shown = comparison_table({"test": asked})
    assert "0.100 [0.733, 0.830]" in shown and "41.700" in shown
    row = {"name": prompt, "measure": "accuracy", "accuracy": 0.8, "accuracy_interval": interval}
    row |= {"trainable_parameters": 28672, "bytes": 114688, "extra_tokens": 192.7}
    wide = compact_table([row, {**row, "ahead": 0.1, "ahead_interval": interval, "p_mcnemar": 1.2e-30}])
    assert all(cell in wide for cell in ("28,672", "114,688", "192.7", "1e-30", "[0.733, 0.830]"))
    assert max(map(len, [*shown.splitlines(), *wide.splitlines()])) <= 80


def test_a_path_that_does_not_exist_has_a_hint(tmp_path, monkeypatch):
    (tmp_path / "out" / "quickstart" / "prompt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert nearest_path("out/quikstart") == "; did you mean 'out/quickstart'?"
    assert nearest_path("out/quikstart/prompt") == "; did you mean 'out/quickstart/prompt'?"
    assert nearest_path("out/quikstart/adapter") == "; did you mean 'out/quickstart'?"
    assert nearest_path(tmp_path / "oot") == f"; did you mean '{tmp_path / 'out'}'?"
    for path in ("out/quickstart", "out/unlike", "nowhere/out", "x" * 5000, str(np.pi)):
        assert nearest_path(path) == ""
