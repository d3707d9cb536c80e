"""Requests to stop, in processes of their own: what is not handled kills them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import signal, time
from clipup.train import signals
signals.REPEAT_SECONDS = 1.0
with signals.program_ends_with_the_run():
    with signals.StopRequest() as stop:
        signal.raise_signal(signal.{first})
assert stop.received
time.sleep({pause})
signal.raise_signal(signal.SIGTERM)
print("alive")
"""


@pytest.mark.parametrize(
    ("first", "pause", "code", "output"),
    [
        ("SIGTERM", 0, 0, "alive\n"),
        ("SIGHUP", 0, 0, "alive\n"),
        pytest.param("SIGINT", 0, 0, "alive\n", marks=pytest.mark.slow),
        pytest.param("SIGTERM", 1.1, -signal.SIGTERM, "", marks=pytest.mark.slow),
    ],
)
def test_a_sigterm_that_repeats_the_first_does_not_kill_a_run_that_has_stopped(first, pause, code, output):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM.format(first=first, pause=pause)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, output), done.stderr


IGNORED = """
import signal
from clipup.train import signals
signal.signal(signal.{name}, signal.SIG_IGN)
with signals.StopRequest() as stop:
    signal.raise_signal(signal.{name})
print("received" if stop.received else "went on")
"""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])  # under nohup, and in the background of a script
def test_a_signal_that_is_ignored_stays_ignored(name):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = IGNORED.format(name=name)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "went on\n", done.stderr


TALKS = """
import os, signal, sys, threading, time
from clipup.train import signals
reader, writer = os.pipe()
kept = os.dup(1)
{before}
with signals.StopRequest() as stop:
    signal.raise_signal(signal.SIGHUP)
    {after}
    for stream in (1, 2):
        os.write(stream, b"said ")
os.write(kept, b"received" if stop.received else b"lost")
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "os.dup2(writer, 2); os.close(writer); threading.Timer(0.02, lambda: os.close(reader)).start()",
            "",
            "said received",
        ),
        ("os.dup2(writer, 2); os.close(writer)", "time.sleep(0.2); os.close(reader); time.sleep(0.2)", "said received"),
        ("", "", "said received"),
        ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))", "", "said received"),
        (
            "def full(thread): raise RuntimeError\nthreading.Thread.start = full\n"
            "os.dup2(writer, 2); os.close(writer); os.close(reader)",
            "",
            "said received",
        ),
    ],
    ids=["a pipe whose reader ends with it", "ends later", "a file", "no free descriptor", "no free thread"],
)
def test_a_hang_up_is_received_whoever_reads_the_output(tmp_path, before, after, said):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = TALKS.format(before=before, after=after)
    with out.open("w") as file:
        done = subprocess.run([sys.executable, "-c", program], env=environment, stdout=file, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == said


UNREAD = """
import os, signal, sys, time
from clipup.train import signals
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
kept = os.dup(1)
{before}
with signals.StopRequest():
    {within}
os.write(kept, b"went on")
"""
LOST = "import threading\n    [thread.join() for thread in threading.enumerate() if thread.name == 'clipup output']"


@pytest.mark.parametrize(
    ("before", "within"),
    [
        ("pass", "time.sleep(0.2)"),
        ("r, w = os.pipe(); os.dup2(w, 1); os.dup2(w, 2); os.close(w); os.close(r)", LOST),
    ],
    ids=["nothing to watch", "both streams lost"],
)
def test_a_program_that_a_lost_pipe_would_end_goes_on(tmp_path, before, within):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = UNREAD.format(before=before, within=within)
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        done = subprocess.run([sys.executable, "-c", program], env=environment, stdout=out, stderr=err)
    assert done.returncode == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text() == "went on"


OFTEN = """
import os, signal, threading
from clipup.train import signals
for _ in range(3):
    with signals.StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
print(threading.active_count(), len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_hang_ups_leave_no_thread_and_no_descriptor_behind():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    none, many = (
        subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True).stdout.split()
        for text in (OFTEN.replace("range(3)", "()"), OFTEN)
    )
    assert none == many and none[0] == "1"


FORKS = """
import os, time
from clipup.train import signals
with signals.StopRequest():
    if not os.fork():
        time.sleep(60)
print("left")
"""


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_run_from_ending():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "-c", FORKS], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert run.wait(30) == 0
    finally:
        os.killpg(run.pid, signal.SIGKILL)


READS_NO_LONGER = """
import logging, os, pty, sys, time
from clipup.progress import Progress
from clipup.train import signals
logging.basicConfig(filename=sys.argv[1], format="%(message)s")
reader, writer = {open}()
os.dup2(writer, 2); os.close(writer)
with signals.StopRequest(enabled={watched}) as stop, Progress("steps", "steps", 3, line_at_once=True) as shown:
    shown.update()
    os.close(reader)
    time.sleep({pause})
    shown.write("an evaluation")
    shown.update(2)
print("went on")
"""


@pytest.mark.parametrize("open_", ["os.pipe", "pty.openpty"])
@pytest.mark.parametrize(("watched", "pause"), [(True, 0.2), (False, 0)], ids=["later", "at the same moment"])
def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, open_, watched, pause):
    """A pager that is left, tee under nohup, a terminal that closes without a signal."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = READS_NO_LONGER.format(open=open_, watched=watched, pause=pause)
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    said = "nobody reads stderr any more; the run continues without it\n" if watched else ""
    assert (tmp_path / "log").read_text() == said
