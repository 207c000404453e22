"""The command `python -m rnn`: what it leaves behind, and what it refuses."""

import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from commands import ENVIRONMENT, RUN, SMALL, TEXT, refusal

from rnn.__main__ import main
from rnn.jobs import COMMANDS, charlm

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


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
