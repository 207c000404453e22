"""The character language model: how it learns, what it reports and saves."""

import math
import os
import signal

import pytest
import torch
from commands import TEXT

from rnn.jobs import charlm
from rnn.jobs.checkpoint import format_of, load_checkpoint
from rnn.jobs.corpus import Corpus
from rnn.jobs.interrupts import interrupts_held
from rnn.jobs.language_model import (
    CHUNK,
    ROWS,
    Settings,
    Trainer,
    evaluate,
    learning_rate,
    make_model,
    sample,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Settings(hidden_size=16, backend="torch")


@pytest.fixture
def corpus():
    return Corpus.of(TEXT)


def trainer(corpus, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Trainer(make_model(corpus.symbols, SMALL).to(dtype), corpus.train)


def with_memory(trainer):
    """Each unit latches, so that what was read a chunk ago still shows: new weights forget."""
    for name, weight in trainer.model.named_parameters():
        if "weight_hh" in name:
            torch.nn.init.eye_(weight).data.mul_(3)
    return trainer


def steps(trainer, count, of):
    for step in range(len(trainer.losses), len(trainer.losses) + count):
        trainer.step(learning_rate(step / of))
    return trainer


# How it learns


def test_the_state_is_carried_from_chunk_to_chunk(corpus):
    trained = with_memory(trainer(corpus))
    trained.step(rate=0.0)
    trained.step(rate=0.0)
    _, state = trained.model.stream(trained.inputs[: 2 * CHUNK].long())
    torch.testing.assert_close(trained.state, state.detach())
    assert not trained.state.requires_grad


def test_at_the_end_of_the_text_it_starts_again_from_a_zero_state(corpus):
    trained = with_memory(trainer(corpus))
    chunks = math.ceil(len(trained.inputs) / CHUNK)
    for _ in range(chunks + 1):
        trained.step(rate=0.0)
    assert trained.losses[-1] == pytest.approx(trained.losses[0])
    _, state = trained.model.stream(trained.inputs[:CHUNK].long())
    torch.testing.assert_close(trained.state, state.detach())


def test_the_learning_rate_ends_at_zero():
    rates = [learning_rate(step / 1000) for step in range(1001)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == 0 and peak < 100


@pytest.mark.parametrize("dtype", charlm.DTYPES)
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
    written = sample(one.model, corpus.characters, 50)
    torch.manual_seed(3)
    assert written == sample(same.model, corpus.characters, 50)


def test_it_goes_on_with_as_many_threads_as_were_faster(corpus, monkeypatch):
    for slow, fast in ((3, 1), (1, 3)):
        trained, used = trainer(corpus), [3]
        monkeypatch.setattr(torch, "get_num_threads", lambda used=used: used[-1])
        monkeypatch.setattr(torch, "set_num_threads", used.append)
        step = trained.step

        def slower(rate, trained=trained, used=used, step=step, slow=slow):
            before = trained.seconds
            step(rate)
            trained.seconds = before + (2.0 if used[-1] == slow else 1.0)

        monkeypatch.setattr(trained, "step", slower)
        charlm.choose_threads(trained, rate=1e-3, ended=lambda: False)
        assert used == [3, 3, 1, fast] and len(trained.losses) == 2 * (1 + charlm.TRIAL)


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
            logits, _ = model.stream(stretch[:-1])
            chosen = logits.log_softmax(-1).gather(-1, stretch[1:].unsqueeze(-1))
            bits -= chosen.sum().item() / math.log(2)
    assert evaluate(model, corpus) == pytest.approx(bits / len(corpus.heldout), rel=1e-4)


def test_an_untaught_readout_costs_the_bits_of_its_symbols(corpus):
    model = trainer(corpus).model
    torch.nn.init.zeros_(model.readout.weight)
    assert evaluate(model, corpus) == pytest.approx(math.log2(corpus.symbols))


def test_an_interrupt_waits_for_the_end_of_the_step(corpus):
    trained = trainer(corpus)

    def spent():
        if len(trained.losses) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.5

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_held() as interrupted:
        charlm.train(trained, spent, interrupted.is_set)
    assert interrupted.is_set() and signal.getsignal(signal.SIGINT) is before
    assert len(trained.losses) in (2, 3) and trained.position == len(trained.losses) * CHUNK


# Checkpoints


@pytest.mark.parametrize("dtype", charlm.DTYPES)
def test_a_resumed_run_is_the_run_that_was_never_stopped(corpus, tmp_path, dtype):
    dtype, path = getattr(torch, dtype), tmp_path / "checkpoint.pt"
    whole = steps(trainer(corpus, dtype), 8, of=8)

    saved = steps(trainer(corpus, dtype), 4, of=8).state_dict()
    torch.save({"format": format_of("charlm"), "settings": {}, **saved}, path)
    resumed = trainer(corpus, dtype, seed=1)
    resumed.load_state_dict(load_checkpoint(path, "charlm"))
    steps(resumed, 4, of=8)

    assert resumed.losses == whole.losses
    for name, weight in whole.masters.items():
        assert torch.equal(resumed.masters[name], weight), name
    for weight, resumed_weight in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(resumed_weight, weight)


def test_the_generator_goes_on_too(corpus):
    trained = steps(trainer(corpus), 1, of=1)
    saved = trained.state_dict()
    drawn = torch.rand(3)
    trained.load_state_dict(saved)
    assert torch.equal(torch.rand(3), drawn)
