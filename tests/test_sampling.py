"""`python -m rnn sample`, and every command with a cell that has gates or several states."""

import math
import re
import subprocess

import pytest
import torch
from commands import ENVIRONMENT, RUN, SMALL, TEXT, refusal

from rnn.__main__ import main
from rnn.cells import CELLS
from rnn.jobs import charlm, cli, inspection
from rnn.jobs.checkpoint import load_checkpoint
from rnn.jobs.cli import JobError
from rnn.jobs.corpus import Corpus
from rnn.jobs.language_model import Settings, make_model, sample, symbols_of
from rnn.modules import cell_named, module_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").write_text(TEXT)
    settings = Settings(
        hidden_size=16, backend="torch", device="cpu", seconds=0.5, text=str(folder / "text")
    )
    charlm.run(settings, folder)
    return folder / cli.CHECKPOINT


def sampled(capsys, *arguments):
    assert main(["sample", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_seed_decides_what_is_written(trained, capsys):
    one, same, other = (
        sampled(capsys, trained, "--length", 80, "--seed", seed) for seed in (1, 1, 2)
    )
    assert one == same != other and len(one) == 81
    assert set(one) <= set(TEXT) | {"\ufffd"}


def test_it_goes_on_from_its_start(trained, capsys):
    for start in ("3 times 4 is ", "9"):
        got = sampled(capsys, trained, "--start", start, "--length", 30)
        assert got.startswith(start) and len(got) == len(start) + 31
    model, characters = charlm.restore(load_checkpoint(trained, "charlm"), trained)
    greedy = sampled(capsys, trained, "--start", "3 times 4", "--length", 20, "--temperature", 0)
    text = "3 times 4"
    for _ in range(20):  # read from the beginning for each character
        best = int(model(symbols_of(text, characters).unsqueeze(1))[-1, 0].argmax())
        text += ("\ufffd" + characters)[best]
    assert greedy == text + "\n"


def test_cold_samples_are_greedy_and_hot_ones_are_even():
    corpus = Corpus.of(TEXT)
    torch.manual_seed(0)
    model = make_model(corpus.symbols, Settings(hidden_size=16, backend="torch"))
    greedy = sample(model, corpus.characters, 40, "7 ", 0.0)
    assert greedy == sample(model, corpus.characters, 40, "7 ", 1e-30)
    hot = sample(model, corpus.characters, 4000, "7 ", 1e9)
    count = {c: hot.count(c) for c in "\ufffd" + corpus.characters}
    even = 4000 / corpus.symbols
    assert all(abs(n - even) < 5 * math.sqrt(even) for n in count.values())


def test_logits_that_are_not_finite_are_one_line():
    corpus = Corpus.of(TEXT)
    model = make_model(corpus.symbols, Settings(hidden_size=16, backend="torch"))
    torch.nn.init.constant_(model.readout.weight, math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(JobError, match="logits are not finite"):
            sample(model, corpus.characters, 3, "7", temperature)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--start", "3 times \u2603"], "does not hold '\u2603' twice"),
        (["--start", ""], "--start is empty"),
        (["--temperature", "-1"], "must be at least 0 and finite, got -1"),
        (["--temperature", "nan"], "must be at least 0 and finite, got nan"),
        (["--temperature", "inf"], "must be at least 0 and finite, got inf"),
        (["--length", "0"], "must be at least 1, got 0"),
        (["--length", "2.5"], "invalid whole number value"),
        (["--seed", "-1"], "must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_sampled(trained, capsys, arguments, says):
    with pytest.raises(SystemExit) as exit:
        main(["sample", str(trained), *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1


def test_a_pattern_writes_no_text(tmp_path, capsys):
    flags = ["--steps", "1", "--hidden-size", "8", "--out", str(tmp_path)]
    assert main(["many-to-one", *flags]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / cli.CHECKPOINT)])
    assert "is no checkpoint of charlm" in capsys.readouterr().err


def test_a_finished_run_trains_no_more(trained, capsys):
    steps, before = len(torch.load(trained)["losses"]), trained.read_bytes()
    for _ in range(2):
        assert main(["--resume", "--out", str(trained.parent)]) == 0
        said = capsys.readouterr().out
        assert "nothing to train: its 0.5 s are spent; --seconds gives it more" in said
        assert f"resumed after {steps} steps" in said and trained.read_bytes() == before


def test_a_training_that_diverges_keeps_its_last_checkpoint(tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    rate = charlm.learning_rate
    monkeypatch.setattr(
        charlm, "learning_rate", lambda spent: rate(spent) if spent < 0.05 else math.inf
    )
    flags = ["--text", tmp_path / "text", "--out", tmp_path, "--seconds", "9", *SMALL]
    with pytest.raises(SystemExit) as exit:
        main([*map(str, flags)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "the training diverged: at step" in last
    model, characters = charlm.restore(
        load_checkpoint(path := tmp_path / cli.CHECKPOINT, "charlm"), path
    )
    assert sample(model, characters, 5)


# Cells with gates


with_gates = pytest.mark.parametrize("cell", [c.name for c in CELLS.values() if c.gates > 1])


@with_gates
def test_a_language_model_of_any_cell(cell, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    flags = ["--text", tmp_path / "text", "--out", tmp_path, "--hidden-size", 12, "--cell", cell]
    assert main([*map(str, flags), "--seconds", "0.5"]) == 0
    path = tmp_path / cli.CHECKPOINT
    steps = len(torch.load(path)["losses"])
    assert main(["--resume", "--out", str(tmp_path), "--seconds", "0.7"]) == 0
    saved = torch.load(path)
    assert len(saved["losses"]) > steps and saved["settings"]["cell"] == cell
    assert sum(saved["losses"][-5:]) < sum(saved["losses"][:5])
    assert isinstance(saved["state"], tuple) == (CELLS[cell].states > 1)
    said = capsys.readouterr().out
    assert f"cell: {cell}\n" in said
    assert len(sampled(capsys, path, "--length", 20)) == 21

    assert main(["inspect", str(path), "--text", "3 times 4"]) == 0
    names = {"gru": "rzn", "lstm": "ifgo"}.get(cell, range(CELLS[cell].gates))
    radii = r", ".join(rf"{name} \d\.\d\d" for name in names)
    assert re.search(rf"layer 1: spectral radius {radii}; gradient", capsys.readouterr().out)
    line = refusal(capsys, "--resume", "--cell", "rnn_tanh", "--out", tmp_path)
    assert f"another shape: --cell {cell}, not rnn_tanh" in line


@with_gates
def test_a_cell_that_does_not_fit_its_weights(cell, trained, tmp_path, capsys):
    saved = torch.load(trained)
    saved["settings"]["cell"] = cell
    torch.save(saved, path := tmp_path / cli.CHECKPOINT)
    for command in (["--resume", "--out", tmp_path], ["inspect", path], ["sample", path]):
        with pytest.raises(SystemExit):
            main([*map(str, command)])
        assert f"does not fit a model with cell {cell}" in capsys.readouterr().err


@with_gates
def test_a_pattern_of_any_cell(cell, tmp_path, capsys):
    flags = ["--steps", "2", "--hidden-size", "8", "--out", str(tmp_path), "--cell", cell]
    assert main(["many-to-one", *flags]) == 0
    assert main(["inspect", str(tmp_path / cli.CHECKPOINT)]) == 0
    assert "spectral radius" in capsys.readouterr().out


def test_commands_take_a_cell_of_the_gallery(tmp_path, gallery):
    """And so does a process that has not derived it yet."""
    path, flags = tmp_path / cli.CHECKPOINT, ["--hidden-size", "8", "--out", str(tmp_path)]
    (tmp_path / "text").write_text(TEXT)
    text = ["--text", str(tmp_path / "text"), "--seconds", "0.1"]
    assert main([*flags, *text, "--cell", "slstm"]) == 0
    assert main(["sample", str(path), "--length", "9"]) == 0
    assert main(["many-to-one", *flags, "--cell", "peephole_lstm", "--steps", "2"]) == 0
    inspect = [*RUN[:3], "inspect", str(path)]
    done = subprocess.run(inspect, capture_output=True, text=True, env=ENVIRONMENT)
    assert re.search(r"spectral radius 0 \d\.\d\d, 1 ", done.stdout), done.stderr


@pytest.mark.parametrize("cell", ["gru", "lstm", "peephole_lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_inspect_shows_h_of_a_cell_with_gates(cell, bidirectional, gallery):
    T, H, D = 6, 5, 1 + bidirectional
    torch.manual_seed(0)
    module = module_of(cell)(3, H, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(T, 1, 3, dtype=torch.float64)
    layers = inspection.look("m", module, x, "abcdef")
    output, _ = module(x)
    torch.testing.assert_close(layers[-D].output, output[:, 0, :H].detach())
    if bidirectional:
        torch.testing.assert_close(layers[-1].output.flip(0), output[:, 0, H:].detach())
    for d, layer in enumerate(layers[-D:]):
        weight_hh = getattr(module, "weight_hh_l1" + "_reverse" * d).detach()
        radii = [torch.linalg.eigvals(w).abs().max().item() for w in weight_hh.split(H)]
        assert list(layer.radii().values()) == pytest.approx(radii)
        assert len(radii) == cell_named(cell).gates and layer.gradient.shape == (T,)
