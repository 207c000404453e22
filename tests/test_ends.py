"""How a command ends: interrupted, terminated, hung up, or with nobody left who reads it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import ENVIRONMENT, RUN, SMALL, TEXT

import rnn
from rnn.__main__ import main
from rnn.jobs import charlm, cli, interrupts
from rnn.jobs.digits import DigitOfRows
from rnn.jobs.interrupts import SIGNALS, interrupts_held
from rnn.jobs.language_model import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture
def flags(tmp_path):
    """Of a run of the language model that nobody waits for to end."""
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out"
    return ["--text", str(tmp_path / "text"), "--out", str(out), "--seconds", "600", *SMALL]


def signals_at_step(monkeypatch, where, name, numbers):
    """Send signals to this process in the third call of a method."""
    method, calls = getattr(where, name), []

    def sends(*args):
        calls.append(1)
        for number in numbers if len(calls) == 3 else ():
            os.kill(os.getpid(), number)
        return method(*args)

    monkeypatch.setattr(where, name, sends)


@each_signal
def test_a_signal_ends_the_training_with_a_checkpoint(flags, tmp_path, monkeypatch, capsys, number):
    signals_at_step(monkeypatch, Trainer, "step", [number])
    before = signal.getsignal(number)
    assert main(flags) == 128 + number and signal.getsignal(number) is before
    path = tmp_path / "out" / cli.CHECKPOINT
    assert capsys.readouterr().err.endswith(f"\ninterrupted; the checkpoint is {path}\n")
    assert len(torch.load(path)["losses"]) == 3
    assert os.listdir(tmp_path / "out") == [cli.CHECKPOINT]


@each_signal
def test_a_signal_ends_a_pattern_with_a_checkpoint(tmp_path, monkeypatch, capsys, number):
    signals_at_step(monkeypatch, DigitOfRows, "loss", [number])
    assert main(["many-to-one", "--steps", "50", "--out", str(tmp_path)]) == 128 + number
    path = tmp_path / cli.CHECKPOINT
    assert capsys.readouterr().err.endswith(f"\ninterrupted; the checkpoint is {path}\n")
    assert len(torch.load(path)["losses"]) == 3


def test_five_signals_in_a_row_are_one(flags, tmp_path, monkeypatch, capsys):
    signals_at_step(monkeypatch, Trainer, "step", [signal.SIGINT] * 5)
    save, raised = torch.save, []

    def interrupted_save(*args):
        if raised:  # the save at the end
            os.kill(os.getpid(), signal.SIGINT)
        raised.append(1)
        save(*args)

    monkeypatch.setattr(torch, "save", interrupted_save)
    assert main(flags) == 130 and len(raised) == 2
    error = capsys.readouterr().err
    assert error.count("interrupted") == 1 and error.endswith(f"{cli.CHECKPOINT}\n")
    assert len(torch.load(tmp_path / "out" / cli.CHECKPOINT)["losses"]) == 3


@each_signal
def test_an_end_before_or_after_the_training_is_one_line(flags, monkeypatch, capsys, number):
    def ends(*_, **__):
        for _ in range(3):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(charlm, "read_text", ends)
    assert main(flags) == 128 + number
    assert capsys.readouterr().err == "interrupted; there is no checkpoint yet\n"
    monkeypatch.undo()
    monkeypatch.setattr(charlm, "evaluate", ends)
    assert main([*flags, "--seconds", "1e-9"]) == 128 + number
    assert capsys.readouterr().err.endswith(
        f"interrupted; the checkpoint is {flags[3]}/checkpoint.pt\n"
    )
    monkeypatch.setattr(charlm, "read_text", ends)
    assert main(flags) == 128 + number
    assert capsys.readouterr().err.endswith("checkpoint.pt, as it was before this run\n")


def test_a_signal_that_got_lost_can_be_sent_again(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    handler = interrupts.Raising()
    with pytest.raises(interrupts.Interrupted):
        handler(signal.SIGINT, None)
    now[0] += 0.5
    handler(signal.SIGINT, None)  # of the same row
    now[0] += 0.6
    with pytest.raises(interrupts.Interrupted):
        handler(signal.SIGINT, None)
    handler.done, now[0] = True, 99.0
    handler(signal.SIGINT, None)


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with interrupts_held() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupted.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_again_and_again_in_a_process(flags, tmp_path):
    process = subprocess.Popen(
        [*RUN, *flags], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    error = b""
    while b"characters/s" not in error:
        error += (read := process.stderr.read1())
        assert read, error
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    error += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and b"Traceback" not in error
    assert error.decode().splitlines()[-1].startswith("interrupted; the checkpoint is ")

    saved = torch.load(tmp_path / "out" / cli.CHECKPOINT)
    flags[flags.index("600")] = str(saved["seconds"] + 0.2)
    done = subprocess.run(
        [*RUN, *flags, "--resume"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed after {len(saved['losses'])} steps" in done.stdout
    resumed = torch.load(tmp_path / "out" / cli.CHECKPOINT)
    assert resumed["losses"][: len(saved["losses"])] == saved["losses"]
    assert len(resumed["losses"]) > len(saved["losses"])


def test_kill_9_loses_little(flags, tmp_path):
    process = subprocess.Popen([*RUN, *flags, "--save-every", "0.2"], env=ENVIRONMENT)
    path, deadline = tmp_path / "out" / cli.CHECKPOINT, time.monotonic() + 120
    while not path.exists() or len(torch.load(path)["losses"]) < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert main(["--resume", "--out", str(tmp_path / "out"), "--seconds", "1e-9"]) == 0


IMPORTING = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
sys.argv = ["-m", *sys.argv[1:]]  # as it is while Python looks for the module of -m
import runpy, rnn
runpy.run_module("rnn", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["torch.nn", "matplotlib.figure"])
def test_ctrl_c_while_it_imports_is_silent(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(module=module)],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_elsewhere_is_left_to_the_program():
    code = (
        "import signal, rnn; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == "True\n"
    assert rnn._start.end is not signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize(
    "command, status",
    [
        ("| true", 141),
        ("2>&1 | true", 141),
        ("> /dev/full", 2),
        ("2> /dev/full", 0),
        (">&- 2>&-", 0),
    ],
    ids=["pipe", "pipe-2", "full", "full-2", "closed"],
)
def test_nobody_reads_it(flags, tmp_path, command, status):
    flags[flags.index("600")] = "0.3"
    script = f'set -o pipefail; "$@" {command}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *RUN, *flags],
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr + done.stdout and "Exception" not in done.stderr
    assert len(torch.load(tmp_path / "out" / cli.CHECKPOINT)["losses"]) >= 1
    if status == 2:
        assert done.stderr.splitlines()[-1].startswith("python -m rnn: [Errno 28] No space left")


def test_a_broken_pipe_of_the_progress_does_not_end_the_training(monkeypatch, flags):
    class Gone:
        encoding = "utf-8"

        def write(self, text=""):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    assert main([*flags, "--seconds", "0.2"]) == 0
