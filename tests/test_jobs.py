"""The five patterns on real data: the data is what it says, and what is trained beats what needs
no recurrent network; and what `inspect` draws is what is there."""

import contextlib
import io
import itertools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

import rnn
from rnn.__main__ import main
from rnn.jobs import cli, digits, inspection, numbers, training
from rnn.jobs.checkpoint import load_checkpoint
from rnn.jobs.digits import DigitOfRows
from rnn.jobs.numbers import in_words

pytestmark = pytest.mark.usefixtures("one_thread")

JOBS = {job.name: job for job in (*digits.JOBS, *numbers.JOBS)}
each_job = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


@pytest.fixture(scope="module")
def made():
    """Each job, its data loaded once."""
    return {name: job() for name, job in JOBS.items()}


def model_of(job, **settings):
    with contextlib.redirect_stdout(io.StringIO()):
        return training.build(job, replace(job.defaults, **settings))


# What is learned

MARGINS = {  # job: (batches, how far above its baseline the held-out score must end)
    "one-to-one": (1500, 0.02),
    "one-to-many": (1600, 0.01),
    "many-to-one": (800, 0.02),
    "many-to-many": (400, 0.05),
    "encoder-decoder": (600, 0.08),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_short_training_beats_the_baseline(made, name):
    job, (steps, margin) = made[name], MARGINS[name]
    model = model_of(job)
    before = job.score(model)
    losses = training.fit(job, model, steps)
    baseline = next(iter(job.baselines().values()))
    assert len(losses) == steps
    assert before < baseline and job.score(model) >= baseline + margin


@each_job
def test_a_seed_decides_everything(made, job):
    losses = [
        training.fit(job, model_of(job, seed=seed), 3)
        for job, seed in ((made[job.name], 1), (made[job.name], 1), (made[job.name], 2))
    ]
    assert losses[0] == losses[1] != losses[2]


# The digits


def test_what_is_held_out_is_never_drawn(made, monkeypatch):
    monkeypatch.setattr(digits, "jitter", lambda images: images)
    job = made["one-to-one"]
    assert len(job.images) == 1797 and job.trained == 1437
    images, labels = job.heldout()
    assert len(images) == len(labels) == 360
    for _ in range(20):
        drawn, its_labels = job.drawn(4, 25)
        where = (job.images[:, None] == drawn.view(1, -1, 8, 8)).all(-1).all(-1)
        assert where[: job.trained].any(0).all()
        assert torch.equal(job.labels[where.int().argmax(0)], its_labels.flatten())


def test_jitter_moves_an_image_a_little():
    torch.manual_seed(0)
    images = torch.zeros(500, 8, 8)
    images[:, 3:5, 3:5] = 1
    moved = digits.jitter(images)
    assert moved.shape == images.shape and not torch.equal(moved, images)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    mass = moved.sum((1, 2))
    assert mass.min() > 2 and mass.max() < 8  # of 4
    for place in (x, y):
        center = (moved * place).sum((1, 2)) / mass
        assert center.std() > 0.1 and (center - 3.5).abs().max() < 1.0


def test_names_are_spelled_and_read():
    symbols, lengths = digits.spelled(torch.arange(10))
    assert digits.written(symbols) == list(digits.NAMES)
    assert lengths.tolist() == [len(name) for name in digits.NAMES]
    assert all((symbols[:n, i] > 0).all() for i, n in enumerate(lengths))  # 0 ends a name


def test_a_frame_is_labelled_with_the_largest_digit_so_far(made):
    job = made["many-to-many"]
    images, shown, labels, lengths = job.heldout_videos()
    assert images.shape == (job.frames, job.videos, 8, 8)
    for b in range(20):
        assert labels[:, b].tolist() == list(itertools.accumulate(shown[:, b].tolist(), max))
    assert lengths.min() == 1 and lengths.max() == job.frames
    assert job.right(labels).all() and len(job.right(labels)) == lengths.sum()
    assert not job.right(labels + 1).any()


def test_no_label_of_a_single_frame_does_better_than_the_baseline(made):
    """Its share, by counting: P(the largest so far is m | frame t shows d), for the best m."""
    job = made["many-to-many"]
    share = job.labels[: job.trained].bincount(minlength=10) / job.trained
    below = share.cumsum(0)
    shown = job.heldout_videos()[1]
    said = torch.empty_like(shown)
    for t, d in itertools.product(range(job.frames), range(10)):
        p = torch.tensor(
            [0.0] * d
            + [below[d] ** t]
            + [float(below[m] ** t - below[m - 1] ** t) for m in range(d + 1, 10)]
        )
        said[t][shown[t] == d] = int(p.argmax())
    torch.manual_seed(0)
    (baseline,) = job.baselines().values()
    assert baseline == pytest.approx(job.right(said).float().mean().item(), abs=0.02)


# The numbers


def test_numbers_in_words():
    for n, words in {
        0: "zero",
        13: "thirteen",
        40: "forty",
        85: "eighty five",
        100: "one hundred",
        107: "one hundred and seven",
        1000: "one thousand",
        1001: "one thousand and one",
        1100: "one thousand one hundred",
        12345: "twelve thousand three hundred and forty five",
        700010: "seven hundred thousand and ten",
        999999: "nine hundred and ninety nine thousand nine hundred and ninety nine",
    }.items():
        assert " ".join(in_words(n)) == words
    for n in (-1, 10**6):
        with pytest.raises(ValueError, match="must lie in"):
            in_words(n)


def value(words):
    """Words back to a number, by arithmetic."""
    total = part = 0
    for word in words:
        if word == "thousand":
            total, part = part * 1000, 0
        elif word == "hundred":
            part *= 100
        elif word in numbers.ONES:
            part += numbers.ONES.index(word)
        elif word in numbers.TENS:
            part += 10 * (numbers.TENS.index(word) + 2)
    return total + part


def test_words_say_their_number_and_no_other(made):
    some = [*range(0, 10**6, 997), *range(2000)]
    assert [value(in_words(n)) for n in some] == some
    assert len({tuple(in_words(n)) for n in range(20000)}) == 20000


def test_heldout_numbers_are_new_and_of_every_length(made):
    job = made["encoder-decoder"]
    heldout = job.heldout.tolist()
    assert len(set(heldout)) == 1000 and not set(heldout) & set(job.numbers.tolist())
    assert {len(str(n)) for n in heldout} >= {3, 4, 5, 6}
    assert {len(str(n)) for n in job.numbers.tolist()} == {1, 2, 3, 4, 5, 6}


def test_batches_hold_words_and_digits(made):
    x, y, x_lengths, y_lengths = numbers.batch_of(torch.tensor([7, 120, 345678]))
    assert numbers.in_digits(y) == ["7", "120", "345678"] and y_lengths.tolist() == [1, 3, 6]
    for b, n in enumerate((7, 120, 345678)):
        assert [numbers.WORDS[i] for i in x[: x_lengths[b], b]] == in_words(n)


def test_a_dictionary_knows_no_zeros():
    for n, said in {342561: "342561", 12: "12", 30: "3", 100: "1", 1007: "17", 0: "0"}.items():
        assert numbers.word_by_word(in_words(n)) == said


# The command


@each_job
def test_a_run_leaves_a_checkpoint_and_a_picture_that_inspect_reads(job, tmp_path, capsys):
    out, small = tmp_path / "out", ["--steps", "2", "--hidden-size", "9", "--backend", "torch"]
    assert main([job.name, *small, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{job.name}: ") and 'backend="torch" was asked for' in said
    assert "RNN " in said and all(name in said for name in job().baselines())
    files = [cli.CHECKPOINT, training.PICTURE, training.SCORES]
    assert sorted(path.name for path in out.iterdir()) == files
    scores = json.loads((out / training.SCORES).read_text())["scores"]
    assert all(f"{score:.3f}" in said for score in scores.values())
    assert (out / training.PICTURE).read_bytes().startswith(b"\x89PNG")

    assert main(["inspect", str(out / cli.CHECKPOINT)]) == 0
    said = capsys.readouterr().out
    assert "spectral radius" in said
    for file in inspection.DRAWINGS:
        assert (out / file).read_bytes().startswith(b"\x89PNG")


@each_job
def test_a_checkpoint_gives_the_model_back(job, made, tmp_path):
    settings = replace(job.defaults, steps=5, hidden_size=9, cell="rnn_relu")
    training.run(made[job.name], settings, tmp_path)
    path = tmp_path / cli.CHECKPOINT
    checkpoint = load_checkpoint(path, job.name)
    assert len(checkpoint["losses"]) == 5
    model, example = training.restore(job, checkpoint, path)
    again = model_of(made[job.name], steps=5, hidden_size=9, cell="rnn_relu")
    training.fit(made[job.name], again, 5)
    assert torch.equal(model(*example.args), again(*example.args))


def test_an_interrupt_leaves_a_checkpoint(made, tmp_path, monkeypatch, capsys):
    job = DigitOfRows
    loss, called = job.loss, []

    def interrupted(self, model):
        called.append(1)
        if len(called) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model)

    monkeypatch.setattr(job, "loss", interrupted)
    assert main([job.name, "--steps", "50", "--out", str(tmp_path)]) == 130
    path = tmp_path / cli.CHECKPOINT
    assert capsys.readouterr().err.endswith(f"interrupted; the checkpoint is {path}\n")
    assert 3 <= len(load_checkpoint(path, job.name)["losses"]) < 50


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("many-to-one --steps 0", "must be at least 1, got 0"),
        ("many-to-one --cell lstm9", "invalid choice"),
        ("many-to-one --seconds 3", "unrecognized arguments"),
        ("inspect", "required: checkpoint"),
        ("inspect nowhere.pt", "there is no checkpoint nowhere.pt"),
    ],
)
def test_a_bad_command_line_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1
    assert error.startswith(f"python -m rnn {arguments.split()[0]}: ")


# A look inside


def one_layer(cell, weight_hh, T, **options):
    torch.manual_seed(0)
    module = rnn.modules.MODULES[cell](3, len(weight_hh), dtype=torch.float64, **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "weight_hh" in name:
                p.copy_(weight_hh)
    return module, torch.randn(T, 1, 3, dtype=torch.float64)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_activations_are_those_of_the_module(bidirectional):
    H, T, D = 5, 6, 1 + bidirectional
    module, x = one_layer(
        "rnn_tanh", torch.randn(H, H), T, num_layers=2, bidirectional=bidirectional
    )
    layers = inspection.look("m", module, x, "abcdef")
    assert len(layers) == 2 * D
    output, _ = module(x)
    torch.testing.assert_close(layers[-D].output, output[:, 0, :H].detach())
    if bidirectional:
        torch.testing.assert_close(layers[-1].output.flip(0), output[:, 0, H:].detach())
        assert layers[-1].labels == "fedcba" and layers[-1].name == "m, layer 1, backwards"


def test_the_gradient_is_that_of_each_step():
    """Of a linear network (relu, all units on), it shrinks by the factor of W_hh a step."""
    module, x = one_layer("rnn_relu", 0.5 * torch.eye(4, dtype=torch.float64), 7)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.bias_ih_l0.fill_(1.0)
        module.bias_hh_l0.fill_(1.0)
    (layer,) = inspection.look("m", module, x, "abcdefg")
    ratios = layer.gradient[:-1] / layer.gradient[1:]
    torch.testing.assert_close(ratios, torch.full((6,), 0.5, dtype=torch.float64))
    assert float(layer.gradient[-1]) == pytest.approx(2.0, rel=0.3)  # |v| of 4 units


@pytest.mark.parametrize("scale", [0.3, 1.7])
def test_the_radius_is_the_largest_eigenvalue(scale):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # eigenvalues +-i
    module, x = one_layer("rnn_tanh", scale * turn, 3)
    (layer,) = inspection.look("m", module, x, "abc")
    assert layer.radius() == pytest.approx(scale)


def test_inspect_reads_what_it_is_given(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n + 1};\n" for n in range(400)))
    where = ["--out", str(tmp_path / "run"), "--backend", "torch", "--hidden-size", "8"]
    assert main(["--text", str(text), "--seconds", "0.1", *where]) == 0
    path = tmp_path / "run" / cli.CHECKPOINT
    assert main(["inspect", str(path), "--text", "12 and", "--out", str(tmp_path / "look")]) == 0
    assert sorted(p.name for p in (tmp_path / "look").iterdir()) == sorted(inspection.DRAWINGS)
    _, example = inspection.load(path, "12 and\u2603")
    assert example.args[0].shape == (7, 1) and int(example.args[0][-1]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["inspect", str(path), "--text", ""])
    assert "--text is empty" in capsys.readouterr().err


def test_a_long_text_is_a_picture_of_bounded_size(tmp_path, capsys, monkeypatch):
    """Some versions of matplotlib draw no picture of more than 2^16 pixels a side."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n + 1};\n" for n in range(400)))
    where = ["--out", str(tmp_path), "--backend", "torch", "--hidden-size", "4"]
    assert main(["--text", str(text), "--seconds", "0.1", *where]) == 0
    sizes = []
    write = inspection.write_figure

    def spy(path, figure, dpi):
        sizes.append(tuple(figure.get_size_inches()))
        write(path, figure, dpi)

    monkeypatch.setattr(inspection, "write_figure", spy)
    path = str(tmp_path / cli.CHECKPOINT)
    assert main(["inspect", path, "--text", "12 and $3$" * 750]) == 0
    assert " at 999" in capsys.readouterr().out  # of 7,499
    assert sizes[0] == (0.13 * inspection.STEPS_SHOWN, 6.0)
    monkeypatch.setattr(inspection, "LARGEST", 5.0)
    assert main(["inspect", path, "--text", "12 and 13;" * 3]) == 0
    assert len(sizes) == 6 and max(max(size) for size in sizes[3:]) <= 7.0
    assert sizes[3] == (5.0, 5.0) and 80 * inspection.STEPS_SHOWN * 0.13 < 2**16


def test_the_gradient_of_a_long_text_is_followed_back_from_its_end(monkeypatch):
    module, x = one_layer("rnn_tanh", torch.randn(4, 4), 12)
    (whole,) = inspection.look("m", module, x, "abcdefghijkl")
    monkeypatch.setattr(inspection, "REACH", 5)
    (layer,) = inspection.look("m", module, x, "abcdefghijkl")
    assert layer.output.shape == (12, 4) and layer.gradient.shape == (5,)
    torch.testing.assert_close(layer.gradient, whole.gradient[-5:])


def test_text_is_for_the_language_model(tmp_path, made, capsys):
    training.run(made["many-to-one"], replace(DigitOfRows.defaults, steps=1), tmp_path)
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / cli.CHECKPOINT), "--text", "x"])
    assert "--text is for charlm" in capsys.readouterr().err
