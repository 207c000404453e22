"""The main job, `python -m rnn`: what it reads, learns, reports, leaves behind and refuses."""

import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

import rnn
from rnn import __main__ as cli
from rnn import charlm
from rnn.charlm import CHUNK, IGNORED, ROWS, CharLM, Corpus, Trainer

TEXT = "".join(f"{n} times {n} is {n * n};\n" for n in range(700))
SMALL = ["--hidden-size", "16", "--backend", "torch"]
RUN = [sys.executable, "-m", "rnn", *SMALL]
WITHOUT = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
runpy.run_module("rnn")
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(rnn.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost seconds a step where something else has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def corpus():
    return Corpus.of(TEXT)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The checkpoint of a run of one step, as bytes."""
    folder = tmp_path_factory.mktemp("one-step")
    (folder / "text.txt").write_text(TEXT)
    settings = charlm.Settings(
        hidden_size=16, backend="torch", device="cpu", seconds=1e-9, text=str(folder / "text.txt")
    )
    charlm.run(settings, folder)
    return (folder / charlm.CHECKPOINT).read_bytes()


@pytest.fixture
def checkpoint(one_step, tmp_path):
    path = tmp_path / charlm.CHECKPOINT
    path.write_bytes(one_step)
    return path


def trainer(corpus, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Trainer(CharLM(corpus.symbols, 16, 2, backend="torch").to(dtype), corpus.train)


def with_memory(trainer):
    """Each unit latches, so that what was read a chunk ago still shows: new weights forget."""
    for name, weight in trainer.model.named_parameters():
        if "weight_hh" in name:
            torch.nn.init.eye_(weight).data.mul_(3)
    return trainer


def steps(trainer, count, of):
    for step in range(len(trainer.losses), len(trainer.losses) + count):
        trainer.step(charlm.learning_rate(step / of))
    return trainer


def refusal(capsys, *arguments):
    """The one line that a command ends with, at exit status 2."""
    with pytest.raises(SystemExit) as exit:
        cli.main([*map(str, arguments)])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("python -m rnn: ") and line.count("\n") == 1, line
    return line


# What it reads


def test_the_last_5_percent_are_held_out_and_their_new_characters_are_one_symbol():
    corpus = Corpus.of("ab" * 950 + "é" + "ab" * 49 + "a")
    assert (len(corpus.train), len(corpus.heldout)) == (1900, 100)
    assert corpus.characters == "ab" and corpus.symbols == 3
    assert corpus.train[:4].tolist() == [1, 2, 1, 2]
    assert corpus.heldout[:3].tolist() == [0, 1, 2]


def test_a_character_seen_once_in_training_is_the_other_symbol_too():
    corpus = Corpus.of("ab" * 500 + "é" + "ab" * 500)
    assert corpus.characters == "ab" and corpus.train[1000] == 0


@pytest.mark.parametrize("length", [2, 3, 32, 33, 34, 100])
def test_streams_are_contiguous_and_each_character_is_a_target_once(length):
    text = torch.arange(length)
    inputs, targets = charlm.streams(text, rows=3)
    assert targets.t().flatten()[: length - 1].tolist() == list(range(1, length))
    assert (targets.t().flatten()[length - 1 :] == IGNORED).all()
    assert torch.equal(inputs[targets != IGNORED] + 1, targets[targets != IGNORED])


def test_the_default_text_is_the_standard_library():
    assert Path(os.__file__).read_text(encoding="utf-8") in charlm.read_text(None)


# How it learns


def test_the_state_is_carried_from_chunk_to_chunk(corpus):
    trained = with_memory(trainer(corpus))
    trained.step(rate=0.0)
    trained.step(rate=0.0)
    _, state = trained.model(trained.inputs[: 2 * CHUNK])
    torch.testing.assert_close(trained.state, state.detach())
    assert not trained.state.requires_grad


def test_at_the_end_of_the_text_it_starts_again_from_a_zero_state(corpus):
    trained = with_memory(trainer(corpus))
    chunks = math.ceil(len(trained.inputs) / CHUNK)
    for _ in range(chunks + 1):
        trained.step(rate=0.0)
    assert trained.losses[-1] == pytest.approx(trained.losses[0])
    _, state = trained.model(trained.inputs[:CHUNK])
    torch.testing.assert_close(trained.state, state.detach())


def test_the_learning_rate_ends_at_zero():
    rates = [charlm.learning_rate(step / 1000) for step in range(1001)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == 0 and peak < 100


@pytest.mark.parametrize("dtype", cli.DTYPES)
def test_every_dtype_learns_and_keeps_its_weights_in_that_dtype(corpus, dtype):
    dtype = getattr(torch, dtype)
    trained = steps(trainer(corpus, dtype), 30, of=30)
    assert trained.losses[-1] < trained.losses[0] - 0.3
    assert all(weight.dtype == dtype for weight in trained.model.parameters())


def test_a_seed_and_a_number_of_steps_decide_everything(corpus):
    one, same = (steps(trainer(corpus, seed=1), 5, of=5) for _ in range(2))
    other = steps(trainer(corpus, seed=2), 5, of=5)
    assert one.losses == same.losses != other.losses
    for name, weight in one.masters.items():
        assert torch.equal(weight, same.masters[name]), name
    torch.manual_seed(3)
    written = charlm.sample(one.model, corpus, 50)
    torch.manual_seed(3)
    assert written == charlm.sample(same.model, corpus, 50)


# What it reports


def test_heldout_bits_are_those_of_streams_that_carry_their_state():
    corpus = Corpus.of(TEXT * 25)  # longer than the pieces that the streams are read in
    model = with_memory(trainer(corpus)).model
    symbols = [*corpus.train[-1:].tolist(), *corpus.heldout.tolist()]
    length = math.ceil(len(corpus.heldout) / ROWS)
    assert length > 256
    bits = 0.0
    with torch.no_grad():
        for start in range(0, len(corpus.heldout), length):
            stretch = torch.tensor(symbols[start : start + length + 1]).unsqueeze(1)
            logits, _ = model(stretch[:-1])
            chosen = logits.log_softmax(-1).gather(-1, stretch[1:].unsqueeze(-1))
            bits -= chosen.sum().item() / math.log(2)
    assert charlm.evaluate(model, corpus) == pytest.approx(bits / len(corpus.heldout), rel=1e-4)


def test_an_untaught_readout_costs_the_bits_of_its_symbols(corpus):
    model = trainer(corpus).model
    torch.nn.init.zeros_(model.readout.weight)
    assert charlm.evaluate(model, corpus) == pytest.approx(math.log2(corpus.symbols))


def witten_bell(train, heldout, symbols, order):
    """The count model of one order, with dictionaries: bits per character."""
    count = defaultdict(Counter)
    for n in range(order + 1):
        for i in range(n, len(train)):
            count[train[i - n : i]][train[i]] += 1

    def p(context, c):
        below = 1 / symbols if not context else p(context[1:], c)
        seen = count[context]
        if not seen:
            return below
        return (seen[c] + len(seen) * below) / (seen.total() + len(seen))

    text = train + heldout
    places = range(len(train), len(text))
    return -sum(math.log2(p(text[i - order : i], text[i])) for i in places) / len(heldout)


def test_count_models_agree_with_dictionaries(corpus):
    train, heldout = map(tuple, (corpus.train.tolist(), corpus.heldout.tolist()))
    expected = [witten_bell(train, heldout, corpus.symbols, order) for order in range(4)]
    assert charlm.count_models(corpus) == pytest.approx(expected)


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
        cli.main(["--help"])
    assert exit.value.code == 0
    flags = "hidden-size num-layers dtype backend device seconds seed text out resume".split()
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


def test_an_interrupt_waits_for_the_end_of_the_step(corpus):
    trained = trainer(corpus)

    def spent():
        if len(trained.losses) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.5

    before = signal.getsignal(signal.SIGINT)
    with charlm.interrupts_held() as interrupted:
        charlm.train(trained, spent, interrupted)
    assert interrupted.is_set() and signal.getsignal(signal.SIGINT) is before
    assert len(trained.losses) in (2, 3) and trained.position == len(trained.losses) * CHUNK


def test_an_interrupt_before_the_training_says_that_there_is_no_checkpoint(
    tmp_path, monkeypatch, capsys
):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(charlm, "read_text", interrupt)
    assert cli.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; there is no checkpoint yet\n"


# Checkpoints


@pytest.mark.parametrize("dtype", cli.DTYPES)
def test_a_resumed_run_is_the_run_that_was_never_stopped(corpus, tmp_path, dtype):
    dtype, path = getattr(torch, dtype), tmp_path / "checkpoint.pt"
    whole = steps(trainer(corpus, dtype), 8, of=8)

    charlm.save_checkpoint(
        {"format": charlm.FORMAT, **steps(trainer(corpus, dtype), 4, of=8).state_dict()}, path
    )
    resumed = trainer(corpus, dtype, seed=1)
    resumed.load_state_dict(charlm.load_checkpoint(path))
    steps(resumed, 4, of=8)

    assert resumed.losses == whole.losses
    for name, weight in whole.masters.items():
        assert torch.equal(resumed.masters[name], weight), name
    for weight, resumed_weight in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(resumed_weight, weight)


def test_the_generator_goes_on_too(corpus):
    trained = trainer(corpus)
    saved = trained.state_dict()
    drawn = torch.rand(3)
    trained.load_state_dict(saved)
    assert torch.equal(torch.rand(3), drawn)


def test_a_save_that_fails_leaves_the_old_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def half_a_save(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(OSError, match="disk full"):
        charlm.save_checkpoint({}, checkpoint)
    assert checkpoint.read_bytes() == before


def test_resume_takes_the_flags_left_out_from_the_checkpoint(checkpoint, capsys):
    assert cli.main(["--resume", "--out", str(checkpoint.parent)]) == 0
    assert "model: 2 layers of 16, float32" in capsys.readouterr().out


# What it refuses


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        (b"", "has 0 characters"),
        (b"abc\n" * 10, "has 40 characters, 1000 are needed"),
        (b"\xff\xfe\x00" * 1000, "can't decode"),
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
    assert "is no checkpoint of this job" in line


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_without_the_demo_extra_it_says_what_to_install(package):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"python -m rnn needs {package}: pip install tqdm matplotlib\n"
