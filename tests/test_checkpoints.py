"""Resuming from a checkpoint, and all checkpoints that cannot be read: each is one line."""

import os
import pickle

import pytest
import torch
from commands import TEXT, refusal

from rnn.__main__ import main
from rnn.jobs import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# Reading


def test_resume_takes_the_flags_left_out_from_the_checkpoint(path, capsys):
    assert main(["--resume", "--out", str(path.parent)]) == 0
    assert "model: 2 layers of 16, float32" in capsys.readouterr().out


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
def test_resuming_with_another_shape(path, capsys, arguments, says):
    before = path.read_bytes()
    line = refusal(capsys, "--resume", *arguments.split(), "--out", path.parent)
    assert says in line and path.read_bytes() == before


def test_resuming_with_another_text(path, text_file, capsys):
    before = path.read_bytes()
    text_file.write_text(TEXT + "!")
    line = refusal(capsys, "--resume", "--text", text_file, "--out", path.parent)
    assert "the text is not the one" in line and path.read_bytes() == before


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
def test_resuming_from_a_damaged_checkpoint(path, capsys, damage):
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert "cannot read the checkpoint" in refusal(capsys, "--resume", "--out", path.parent)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, [1, 2]], ids=["dict", "list"])
def test_resuming_from_another_programs_checkpoint(path, capsys, content):
    torch.save(content, path)
    line = refusal(capsys, "--resume", "--out", path.parent)
    assert "is no checkpoint of charlm" in line


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


NAN = float("nan")


def put(value, *keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return change


def drop(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return change


def adam(name, value):
    def change(checkpoint):
        first = checkpoint["optimizer"]["state"][0]
        first[name] = value(first[name])

    return change


W = "rnn.weight_hh_l0"
DAMAGED = {  # what is wrong: (the change, a part of the line)
    "newer": (put("fused-rnn charlm 2", "format"), "version 1"),
    "format-missing": (drop("format"), "is no checkpoint of charlm"),
    "format-number": (put(1, "format"), "is no checkpoint of charlm"),
    "other-job": (put("fused-rnn poems 1", "format"), "is no checkpoint of charlm"),
    "settings-missing": (drop("settings"), "it has no 'settings'"),
    "settings-list": (put([], "settings"), "its 'settings' is of type list, not dict"),
    "setting-missing": (drop("settings", "hidden_size"), "it has no setting 'hidden_size'"),
    "setting-unknown": (put(1, "settings", "layers"), "does not know: 'layers'"),
    "setting-key": (put(1, "settings", 3), "does not know: 3"),
    "setting-text": (put("16", "settings", "hidden_size"), "hidden_size cannot be '16'"),
    "setting-float": (put(16.0, "settings", "hidden_size"), "hidden_size cannot be 16.0"),
    "setting-bool": (put(True, "settings", "num_layers"), "num_layers cannot be True"),
    "setting-zero": (put(0, "settings", "num_layers"), "num_layers cannot be 0"),
    "setting-nan": (put(NAN, "settings", "seconds"), "seconds cannot be nan"),
    "setting-none": (put(None, "settings", "seed"), "seed cannot be None"),
    "setting-tensor": (put(torch.zeros(2), "settings", "seed"), "seed cannot be tensor"),
    "setting-dtype": (put("int8", "settings", "dtype"), "dtype is 'int8', not one of"),
    "setting-cell": (put("cell9", "settings", "cell"), "cell is 'cell9', not one of"),
    "setting-layers": (put(10**9, "settings", "num_layers"), "too few for a model with cell"),
    "setting-huge": (put(2**40, "settings", "hidden_size"), "cannot read the checkpoint"),
    "setting-other": (
        put(17, "settings", "hidden_size"),
        "does not fit a model with cell rnn_tanh",
    ),
    "weight-missing": (drop("model", W), f"it lacks the weight {W} of a model with cell rnn_tanh"),
    "weight-more": (put(torch.zeros(2), "model", "w"), "it has a weight 'w', unknown to"),
    "weight-nan": (lambda c: c["model"][W][0].fill_(NAN), f"{W} is not finite"),
    "weight-inf": (lambda c: c["model"][W][0].fill_(-float("inf")), f"{W} is not finite"),
    "weight-shape": (lambda c: c["model"].update({W: c["model"][W][1:]}), f"{W} does not fit"),
    "weight-dtype": (lambda c: c["model"].update({W: c["model"][W].long()}), f"{W} does not fit"),
    "weight-text": (put("zero", "model", W), f"{W} does not fit"),
    "weights-list": (put([], "model"), "its 'model' is of type list, not dict"),
    "losses-missing": (drop("losses"), "it has no 'losses'"),
    "losses-none": (put([], "losses"), "its 'losses' are not those of a training"),
    "losses-nan": (put([1.0, NAN], "losses"), "its 'losses' are not those of a training"),
    "losses-text": (put(["1"], "losses"), "its 'losses' are not those of a training"),
    "characters-missing": (drop("characters"), "it has no 'characters'"),
    "characters-bytes": (put(b"ab", "characters"), "its 'characters' is of type bytes, not str"),
    "characters-twice": (put("aa", "characters"), "its 'characters' are not all different"),
    "characters-few": (put("ab", "characters"), "does not fit"),
    "digest-missing": (drop("digest"), "it has no 'digest'"),
    "state-missing": (drop("state"), "it has no 'state'"),
    "rng-missing": (drop("rng"), "it has no 'rng'"),
    "rng-list": (put([1], "rng"), "its 'rng' is of type list, not Tensor"),
    "optimizer-missing": (drop("optimizer"), "it has no 'optimizer'"),
    "position-bool": (put(True, "position"), "its 'position' is of type bool, not int"),
    "seconds-text": (put("1", "seconds"), "its 'seconds' is of type str, not float"),
}
DAMAGED_TRAINING = {  # what a resumed run needs, and a look inside does not
    "optimizer-empty": (put({}, "optimizer"), "its 'optimizer' has no state"),
    "optimizer-weight": (drop("optimizer", "state", 0), "its 'optimizer' has no state"),
    "optimizer-list": (put([], "optimizer", "state"), "its 'optimizer' has no state"),
    "optimizer-sgd": (put({}, "optimizer", "state", 0), "is not the state of Adam"),
    "optimizer-shape": (adam("exp_avg", lambda x: x[1:]), "its 'optimizer' does not fit"),
    "optimizer-nan": (adam("exp_avg", lambda x: x * NAN), "its 'optimizer' does not fit"),
    "optimizer-step": (adam("step", lambda x: x - 9), "its 'optimizer' holds what cannot be"),
    "optimizer-sign": (adam("exp_avg_sq", lambda x: x - 1), "its 'optimizer' holds what cannot be"),
    "state-shape": (lambda c: c.update(state=c["state"][:1]), "its 'state' does not fit"),
    "state-nan": (lambda c: c["state"].fill_(NAN), "its 'state' does not fit"),
    "state-tuple": (lambda c: c.update(state=(c["state"],) * 2), "its 'state' does not fit"),
    "state-text": (put("zero", "state"), "its 'state' does not fit"),
    "rng-short": (lambda c: c.update(rng=c["rng"][1:]), "its 'rng' is no state of a generator"),
    "rng-float": (lambda c: c.update(rng=c["rng"].float()), "its 'rng' is no state"),
    "position-negative": (put(-1, "position"), "cannot be"),
    "seconds-nan": (put(NAN, "seconds"), "cannot be"),
    "characters-other": (lambda c: c.update(characters=c["characters"][::-1]), "those of the text"),
}


def refused(path, capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([*map(str, command)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("change, says", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("command", ["resume", "inspect", "sample"])
def test_a_checkpoint_that_is_not_whole(path, capsys, command, change, says):
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)
    before = path.read_bytes()
    command = ["--resume", "--out", path.parent] if command == "resume" else [command, path]
    line = refused(path, capsys, command)
    if "no checkpoint of" not in says:
        assert says in line
    assert str(path) in line and path.read_bytes() == before


@pytest.mark.parametrize("change, says", DAMAGED_TRAINING.values(), ids=DAMAGED_TRAINING)
def test_a_training_that_cannot_go_on(path, capsys, change, says):
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)
    before = path.read_bytes()
    assert says in refused(path, capsys, ["--resume", "--out", path.parent])
    assert path.read_bytes() == before


def test_a_setting_that_is_newer_than_the_checkpoint_is_what_was_done_before(path, capsys):
    saved = torch.load(path)
    assert saved["settings"].pop("cell") == "rnn_tanh" and saved["settings"].pop("save_every")
    torch.save(saved, path)
    assert main(["--resume", "--out", str(path.parent)]) == 0
    assert "cell: rnn_tanh" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, says",
    [
        DAMAGED[name]
        for name in (
            "newer",
            "settings-missing",
            "setting-cell",
            "setting-layers",
            "weight-nan",
            "weights-list",
            "losses-nan",
        )
    ],
)
def test_a_pattern_that_is_not_whole(tmp_path, capsys, change, says):
    flags = ["--steps", "1", "--hidden-size", "8", "--out", str(tmp_path)]
    assert main(["many-to-one", *flags]) == 0
    saved = torch.load(path := tmp_path / cli.CHECKPOINT)
    change(saved)
    torch.save(saved, path)
    capsys.readouterr()
    assert says in refused(path, capsys, ["inspect", path])


@pytest.mark.parametrize("command", ["resume", "inspect", "sample"])
def test_code_in_a_checkpoint_is_not_run(path, capsys, command):
    ran = path.parent / "ran"
    saved = torch.load(path) | {"more": Code(f"touch {ran}")}
    torch.save(saved, path)
    command = ["--resume", "--out", path.parent] if command == "resume" else [command, path]
    assert "which could run code" in refused(path, capsys, command)
    path.write_bytes(pickle.dumps(Code(f"touch {ran}")))
    assert "cannot read the checkpoint" in refused(path, capsys, command)
    assert not ran.exists()


def test_whatever_the_unpickler_raises_is_one_line(path, capsys, monkeypatch):
    for error in (KeyError("x"), AttributeError("a\nb"), AssertionError(), MemoryError()):

        def load(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", load)
        assert "cannot read the checkpoint" in refused(path, capsys, ["inspect", path])
