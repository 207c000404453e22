"""The command `python -m rnn`: what it leaves behind, and what it refuses."""

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_charlm import TEXT

import rnn
from rnn.__main__ import main
from rnn.jobs import COMMANDS, charlm, cli

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--hidden-size", "16", "--backend", "torch"]
RUN = [sys.executable, "-m", "rnn", *SMALL]
WITHOUT = """
import runpy, sys
absent = sys.argv.pop(1)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
runpy.run_module("rnn", run_name="__main__")
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(rnn.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The checkpoint of a run of one step, as bytes."""
    folder = tmp_path_factory.mktemp("one-step")
    (folder / "text.txt").write_text(TEXT)
    settings = charlm.Settings(
        hidden_size=16, backend="torch", device="cpu", seconds=1e-9, text=str(folder / "text.txt")
    )
    charlm.run(settings, folder)
    return (folder / cli.CHECKPOINT).read_bytes()


@pytest.fixture
def checkpoint(one_step, tmp_path):
    path = tmp_path / cli.CHECKPOINT
    path.write_bytes(one_step)
    return path


def refusal(capsys, *arguments):
    """The one line that a command ends with, at exit status 2."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, arguments)])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("python -m rnn: ") and line.count("\n") == 1, line
    return line


# The command


def test_a_run_says_what_runs_and_leaves_a_checkpoint_and_a_curve(tmp_path, text_file):
    done = subprocess.run(
        [*RUN, "--text", text_file, "--seconds", "1"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'layer 1: torch: backend="torch" was asked for' in done.stdout
    assert re.search(r"\d\.\d{3} bits per character, [\d,]+ characters/s", done.stderr)
    counted = re.findall(r"order (\d) +(\d\.\d{3})", done.stdout)
    assert [int(order) for order, _ in counted] == [0, 1, 2, 3]
    assert 0 < float(re.search(r"RNN +(\d\.\d{3})", done.stdout).group(1)) < 4
    assert "a sample of" in done.stdout
    out = tmp_path / "runs" / "charlm"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "loss.png"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_help_gives_every_flag_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    flags = "cell hidden-size num-layers dtype backend device seconds seed text out".split()
    flags += "resume save-every overwrite".split()
    help = capsys.readouterr().out
    for flag in flags:
        assert f"--{flag} " in help or f"--{flag}\n" in help
    assert help.count("(default:") == len(flags)


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path, text_file):
    out = tmp_path / "out"
    command = [*RUN, "--text", text_file, "--out", out]
    process = subprocess.Popen(
        [*command, "--seconds", "60"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    error = b""
    while b"characters/s" not in error:
        error += (read := process.stderr.read1())
        assert read, error
    process.send_signal(signal.SIGINT)
    error += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.decode().splitlines()[-1] == f"interrupted; the checkpoint is {out}/checkpoint.pt"

    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(saved["losses"]) >= 1
    done = subprocess.run(
        [*command, "--resume", "--seconds", str(saved["seconds"] + 0.2)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed after {len(saved['losses'])} steps" in done.stdout
    resumed = torch.load(out / "checkpoint.pt", weights_only=True)
    assert resumed["losses"][: len(saved["losses"])] == saved["losses"]
    assert len(resumed["losses"]) > len(saved["losses"])


def test_an_interrupt_before_the_training_says_that_there_is_no_checkpoint(
    tmp_path, monkeypatch, capsys
):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(charlm, "read_text", interrupt)
    assert main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; there is no checkpoint yet\n"


# Resuming


def test_resume_takes_the_flags_left_out_from_the_checkpoint(checkpoint, capsys):
    assert main(["--resume", "--out", str(checkpoint.parent)]) == 0
    assert "model: 2 layers of 16, float32" in capsys.readouterr().out


# What it refuses


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        (b"", "has 0 characters"),
        (b"abc\n" * 10, "has 40 characters, 1000 are needed"),
        (b"\xff\xfa\x00" * 1000, "can't decode"),
    ],
    ids=["missing", "empty", "short", "not-utf-8"],
)
def test_a_text_that_cannot_be_used(tmp_path, capsys, content, says):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    assert says in refusal(capsys, "--text", path, "--out", out)
    assert not out.exists()


def test_a_text_that_is_a_folder(tmp_path, capsys):
    assert "directory" in refusal(capsys, "--text", tmp_path, "--out", tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_text_that_may_not_be_read(text_file, tmp_path, capsys):
    text_file.chmod(0)
    assert "Permission" in refusal(capsys, "--text", text_file, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--hidden-size 0", "must be at least 1, got 0"),
        ("--hidden-size 2.5", "invalid whole number value"),
        ("--num-layers -1", "must be at least 1, got -1"),
        ("--seed -1", "must be at least 0, got -1"),
        ("--seconds 0", "must be above 0 and finite, got 0"),
        ("--seconds -1", "must be above 0 and finite, got -1"),
        ("--seconds nan", "must be above 0 and finite, got nan"),
        ("--seconds inf", "must be above 0 and finite, got inf"),
        ("--save-every 0", "must be above 0 and finite, got 0"),
        ("--cell lstm9", "invalid choice"),
        ("--resume --overwrite", "--resume goes on from the checkpoint that --overwrite replaces"),
        ("--dtype int8", "invalid choice"),
        ("--backend cudnn", "invalid choice"),
        ("--nonsense", "unrecognized arguments"),
    ],
)
def test_a_bad_argument(tmp_path, capsys, arguments, says):
    out = tmp_path / "out"
    assert says in refusal(capsys, *arguments.split(), "--out", out)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(text_file, tmp_path, capsys):
    line = refusal(capsys, "--device", "cuda", "--text", text_file, "--out", tmp_path / "out")
    assert "finds no GPU" in line


def test_a_backend_that_cannot_run(text_file, tmp_path, capsys, monkeypatch):
    def cannot(module, input):
        raise RuntimeError('backend="triton" cannot run here: no GPU\nmore')

    monkeypatch.setattr(charlm, "explain", cannot)
    assert "no GPU\n" in refusal(capsys, "--text", text_file, "--out", tmp_path / "out")


def test_a_folder_that_cannot_be_written(text_file, capsys):
    line = refusal(capsys, *SMALL, "--device", "cpu", "--text", text_file, "--out", text_file)
    assert "cannot write to" in line


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--cell rnn_relu", "another shape: --cell rnn_tanh, not rnn_relu"),
        ("--hidden-size 32", "another shape: --hidden-size 16, not 32"),
        ("--num-layers 3", "another shape: --num-layers 2, not 3"),
        ("--dtype float64", "another shape: --dtype float32, not float64"),
        ("--seed 5", "another shape: --seed 0, not 5"),
    ],
)
def test_resuming_with_another_shape(checkpoint, capsys, arguments, says):
    before = checkpoint.read_bytes()
    line = refusal(capsys, "--resume", *arguments.split(), "--out", checkpoint.parent)
    assert says in line and checkpoint.read_bytes() == before


def test_resuming_with_another_text(checkpoint, text_file, capsys):
    before = checkpoint.read_bytes()
    text_file.write_text(TEXT + "!")
    line = refusal(capsys, "--resume", "--text", text_file, "--out", checkpoint.parent)
    assert "the text is not the one" in line and checkpoint.read_bytes() == before


def test_resuming_from_nothing(tmp_path, capsys):
    assert "there is no checkpoint" in refusal(capsys, "--resume", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flipped(data):
    """One byte of a weight is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"hello" * 99, lambda data: data[: len(data) // 2], flipped],
    ids=["empty", "garbage", "truncated", "one-byte"],
)
def test_resuming_from_a_damaged_checkpoint(checkpoint, capsys, damage):
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    assert "cannot read the checkpoint" in refusal(capsys, "--resume", "--out", checkpoint.parent)
    assert checkpoint.read_bytes() == damaged


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [1, 2]], ids=["dict", "list"])
def test_resuming_from_another_programs_checkpoint(checkpoint, capsys, content):
    torch.save(content, checkpoint)
    line = refusal(capsys, "--resume", "--out", checkpoint.parent)
    assert "is no checkpoint of charlm" in line


@pytest.mark.parametrize(
    "module, command",
    [("tqdm", "charlm"), ("matplotlib", "charlm"), ("sklearn", "many-to-one"), ("tqdm", "inspect")],
)
def test_without_the_demo_extra_it_says_what_to_install(module, command):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    package = {"sklearn": "scikit-learn"}.get(module, module)
    install = "pip install tqdm matplotlib scikit-learn"
    assert done.stderr == f"python -m rnn needs {package}: {install}\n"


def test_the_list_names_every_command_and_a_module_that_runs_it(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = "charlm one-to-one one-to-many many-to-one many-to-many encoder-decoder sample inspect"
    assert [line.split()[3] for line in lines] == names.split() == list(COMMANDS)
    for command in COMMANDS.values():
        assert callable(import_module(f"rnn.jobs.{command.module}").main)


def test_a_command_that_is_none(capsys):
    assert main(["many-to-few"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m rnn: no 'many-to-few', but charlm, one-to-one, ")
    assert error.count("\n") == 1
