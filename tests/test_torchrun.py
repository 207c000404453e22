"""The main job in two processes of torchrun: it is the training of one, and ends as that does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, SMALL, TEXT, refusal

from rnn.__main__ import main
from rnn.jobs import charlm, cli
from rnn.jobs.corpus import Corpus
from rnn.jobs.interrupts import Interrupted, Raising, handled_by
from rnn.jobs.language_model import CHUNK, ROWS, Settings, Trainer, make_model
from rnn.jobs.processes import Processes, processes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        sys.platform != "linux" or not torch.distributed.is_available(), reason="reads /proc"
    ),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
FOLDERS = f"{Path(__file__).parent}:{ENVIRONMENT['PYTHONPATH']}"
CASES = [("rnn_tanh", "float64"), ("lstm", "float64"), ("gru", "bfloat16")]


def trained(cell, dtype, team=None):
    """What five steps leave: each step's gradients of the summed loss, before they are clipped,
    and all that a checkpoint holds."""
    torch.manual_seed(team.rank if team else 0)  # the weights are those of the first process
    corpus = Corpus.of(TEXT)
    settings = Settings(cell=cell, hidden_size=16, backend="torch")
    model = make_model(corpus.symbols, settings).to(getattr(torch, dtype))
    trainer, gradients = Trainer(model, corpus.train, team), []
    trainer.position = (len(trainer.inputs) // CHUNK - 2) * CHUNK
    for step in range(5):  # over the end of the text, where one stream is shorter than the others
        trainer.step(rate=1e-3)
        if step == 1:
            trainer.load_state_dict(trainer.state_dict())
        gradients.append([p.grad * trainer.processes.count for p in model.parameters()])
    return gradients, trainer.state_dict()


def all_trained(folder):
    with processes(ROWS) as team:
        for cell, dtype in CASES:
            found = trained(cell, dtype, team)
            torch.save(found, f"{folder}/{cell}-{dtype}-{team.rank}")


def run(*arguments, count=2):
    command = [*TORCHRUN, str(count), *map(str, arguments)]
    environment = {**ENVIRONMENT, "PYTHONPATH": FOLDERS}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder with what two processes found."""
    folder = tmp_path_factory.mktemp("found")
    (folder / "program.py").write_text(f"import test_torchrun as t\nt.all_trained({str(folder)!r})")
    done = run(folder / "program.py")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("cell, dtype", CASES)
def test_it_is_the_training_of_one_process_with_the_whole_batch(found, cell, dtype):
    gradients, alone = trained(cell, dtype)
    (one, saved), (other, same) = (
        torch.load(found / f"{cell}-{dtype}-{rank}") for rank in range(2)
    )
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(other, one, **exactly)
    for name in ("losses", "seconds", "state", "model", "optimizer"):
        torch.testing.assert_close(same[name], saved[name], **exactly)
    if dtype == "float64":
        torch.testing.assert_close(one, gradients)
        for name in ("losses", "state", "model", "optimizer"):
            torch.testing.assert_close(saved[name], alone[name])
    else:
        assert saved["losses"] == pytest.approx(alone["losses"], rel=2**-8)


def test_a_signal_to_one_ends_all_with_a_checkpoint_that_any_number_resumes(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out"
    flags = [*SMALL, "--device", "cpu", "--text", str(tmp_path / "text"), "--out", str(out)]
    command = [*TORCHRUN, "2", "-m", "rnn", *flags, "--seconds", "600"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    error = b""
    while b"characters/s" not in error:
        error += (read := process.stderr.read1())
        assert read, error
    os.kill(second_of(process.pid), signal.SIGTERM)
    output, rest = process.communicate(timeout=60)
    output, error = output.decode(), (error + rest).decode()
    assert output.count("2 processes, 32 of 64 streams each") == 1 and "held-out" not in output
    assert error.count("interrupted; the checkpoint is ") == 1 and "rnn/jobs" not in error, error

    for count in (2, 1):
        saved = torch.load(out / cli.CHECKPOINT)
        assert saved["state"].shape == (2, ROWS, 16)
        resuming = [*flags, "--resume", "--seconds", str(saved["seconds"] + 0.2)]
        if count == 1:
            assert main(resuming) == 0
        else:
            done = run("-m", "rnn", *resuming)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count(f"resumed after {len(saved['losses'])} steps") == 1
            assert done.stdout.count("held-out text, ") == 1
        before, losses = saved["losses"], torch.load(out / cli.CHECKPOINT)["losses"]
        assert losses[: len(before)] == before and len(losses) > len(before)


def test_all_processes_end_at_the_same_step_whenever_the_signal_comes(tmp_path):
    """One that comes just after they agreed to go on, which the others cannot know of, must not
    keep this process from the step that they wait in."""
    (tmp_path / "text").write_text(TEXT)
    settings = Settings(hidden_size=16, backend="torch", text=str(tmp_path / "text"), seconds=600)
    agreed = []

    class Late(Processes):
        def any(self, one):
            agreed.append(super().any(one))
            if agreed == [False]:
                signal.raise_signal(signal.SIGTERM)
            return agreed[-1]

    with handled_by(Raising()), pytest.raises(Interrupted):
        charlm.run(settings, tmp_path / "out", team=Late())
    assert len(torch.load(tmp_path / "out" / cli.CHECKPOINT)["losses"]) == 1


def second_of(parent):
    """The process of rank 1 that this torchrun started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("torchrun has no such child")


def test_a_batch_that_cannot_be_shared_equally(tmp_path, capsys, monkeypatch):
    as_torchrun = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "TORCHELASTIC_RUN_ID": 1}
    for name, value in as_torchrun.items():
        monkeypatch.setenv(name, str(value))
    says = "64 streams are not divisible by 3 processes: start fewer"
    assert says in refusal(capsys, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
