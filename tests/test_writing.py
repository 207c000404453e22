"""What the patterns write: greedy, drawn or searched for by a beam."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from pattern_models import LENGTHS, B, I, T, V, each_form, each_one_way, inputs, make, symbols

import rnn
from rnn.generation import best_continuations


def score(model, x, row, length, max_length):
    """Log-probability of a row's symbols, by teacher forcing, with its end if it has one."""
    log_p = model(x, row[:length, None])[:, 0].log_softmax(-1)
    total = sum(log_p[t, y] for t, y in enumerate(row[:length]))
    return total + log_p[length, model.end] if length < max_length else total


def greedy(model, x, max_length):
    """One row, written by reading the whole beginning again before each symbol."""
    row = torch.empty(0, dtype=torch.int64)
    while len(row) < max_length:
        symbol = model(x, row[:, None])[-1, 0].argmax()
        if symbol == model.end:
            break
        row = torch.cat((row, symbol[None]))
    return row


SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
@each_one_way
def test_greedy_takes_the_most_probable_symbol_until_the_end(form, seed):
    model, x = make(rnn.OneToMany, form, seed, scale=3), inputs(form, 9)
    got = model.generate(x, max_length=7)
    assert len(got.symbols) == got.lengths.max() <= 7
    for b in range(9):
        want = greedy(model, x[b : b + 1], 7)
        n = int(got.lengths[b])
        assert got.symbols[:n, b].tolist() == want.tolist()
        assert (got.symbols[n:, b] == model.end).all()
        torch.testing.assert_close(got.scores[b], score(model, x[b : b + 1], want, n, 7))


def test_the_seeds_write_sequences_that_end_and_that_do_not():
    lengths = torch.cat(
        [make(rnn.OneToMany, {}, s, 3).generate(inputs({}, 9), max_length=7).lengths for s in SEEDS]
    )
    assert (lengths == 7).any() and (lengths < 7).any() and lengths.unique().numel() > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_as_wide_as_all_sequences_finds_the_best_of_them(seed):
    model, x, longest = make(rnn.OneToMany, {}, seed, scale=2), inputs({}, 3), 3
    got = model.generate(x, max_length=longest, beam=V**longest)
    for b in range(3):
        found = []
        for n in range(longest + 1):
            rows = torch.cartesian_prod(*[torch.arange(1, V)] * n).view(-1, n) if n else None
            rows = torch.empty(1, 0, dtype=torch.int64) if rows is None else rows
            log_p = model(x[b].expand(len(rows), I), rows.t()).log_softmax(-1)
            steps = F.pad(rows.t(), (0, 0, 0, 1), value=model.end)[:longest]
            scores = log_p[: len(steps)].gather(2, steps[..., None]).sum((0, 2))
            found += list(zip(scores.tolist(), rows.tolist()))
        assert len(found) == sum(5**n for n in range(longest + 1))
        best = max(found)
        assert float(got.scores[b]) == pytest.approx(best[0])
        assert got.symbols[: got.lengths[b], b].tolist() == best[1]


@pytest.mark.parametrize("beam", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_a_beam_does_no_worse_than_greedy_and_its_score_is_its_own(cell, seed, beam):
    form = {"num_layers": 2, "cell": cell}
    model, x = make(rnn.OneToMany, form, seed, scale=3), inputs({}, 30)
    one, got = model.generate(x, max_length=8), model.generate(x, max_length=8, beam=beam)
    assert (got.scores >= one.scores - 1e-12).all()
    if beam == 1:
        assert torch.equal(got.symbols, one.symbols)
    for b in range(30):
        n = int(got.lengths[b])
        row = got.symbols[:n, b]
        torch.testing.assert_close(got.scores[b], score(model, x[b : b + 1], row, n, 8))


def test_a_wide_beam_finds_better_ones():
    model, x = make(rnn.OneToMany, {}, 1, scale=3), inputs({}, 30)
    one, wide = (model.generate(x, max_length=8, beam=k).scores for k in (1, 8))
    assert (wide > one + 1e-6).any()


@pytest.mark.parametrize("K", [1, 2, 5])
def test_beams_go_on_with_the_greedy_one_and_the_best_of_all_others(K):
    total = torch.randn(20, K, V, generator=torch.Generator().manual_seed(0))
    parents, chosen = best_continuations(total)
    for b in range(20):
        pairs = list(zip(parents[b].tolist(), chosen[b].tolist()))
        assert pairs[0] == (0, int(total[b, 0].argmax()))
        others = [(k, v) for k in range(K) for v in range(V) if (k, v) != pairs[0]]
        best = sorted(others, key=lambda at: float(total[b][at]), reverse=True)
        assert pairs[1:] == best[: K - 1]


@pytest.mark.parametrize("beam", [1, 4])
@each_form
def test_batched_is_one_by_one(form, beam):
    model, x = make(rnn.EncoderDecoder, form, scale=3), inputs(form, T, B)
    got = model.generate(x, LENGTHS, max_length=5, beam=beam)
    for b, n in enumerate(LENGTHS.tolist()):
        if n == 0:
            continue
        alone = model.generate(x[:n, b : b + 1], max_length=5, beam=beam)
        assert torch.equal(alone.symbols[:, 0], got.symbols[: len(alone.symbols), b])
        assert alone.lengths[0] == got.lengths[b]
        torch.testing.assert_close(alone.scores[0], got.scores[b])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_have_the_frequencies_of_the_model(temperature):
    model, x = make(rnn.OneToMany, {}, scale=3), inputs({}, 1)
    generator = torch.Generator().manual_seed(0)
    n = 20000
    got = model.generate(x.expand(n, I), max_length=2, temperature=temperature, generator=generator)
    want = (model(x, symbols(0, 1))[0, 0] / temperature).softmax(0)
    drawn = F.pad(got.symbols, (0, 0, 0, 2 - len(got.symbols)))
    counts = drawn[0].bincount(minlength=V) / n
    assert ((counts - want).abs() < 5 * (want * (1 - want) / n).sqrt() + 1e-9).all()
    assert not drawn[1][drawn[0] == model.end].any()
    first = int(want[1:].argmax()) + 1
    want = (model(x, torch.tensor([[first]]))[1, 0] / temperature).softmax(0)
    second = drawn[1][drawn[0] == first]
    counts = second.bincount(minlength=V) / len(second)
    assert ((counts - want).abs() < 5 * (want * (1 - want) / len(second)).sqrt() + 1e-9).all()


def test_a_generator_decides_the_draws_and_cold_draws_are_greedy():
    model, x = make(rnn.OneToMany, {}, scale=3), inputs({}, 50)

    def draws(seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(x, max_length=5, temperature=temperature, generator=generator)

    assert torch.equal(draws(0).symbols, draws(0).symbols)
    assert draws(0).symbols.tolist() != draws(1).symbols.tolist()
    for temperature in (1e-4, 1e-30):
        assert torch.equal(draws(0, temperature).symbols, model.generate(x, max_length=5).symbols)


@pytest.mark.parametrize("end", [0, 3])
@pytest.mark.parametrize("how", [{}, {"beam": 3}, {"temperature": 1.0}], ids=str)
def test_the_end_symbol_ends_and_is_not_written(how, end):
    model = make(rnn.OneToMany, {"end": end}, scale=3)
    got = model.generate(inputs({}, 40), max_length=20, **how)
    behind = torch.arange(len(got.symbols))[:, None] >= got.lengths
    assert torch.equal(got.symbols == end, behind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_write_and_learn(dtype):
    model = make(rnn.EncoderDecoder, {"embedding": 3}).to(dtype)
    x = inputs({"embedding": 3}, T, B)
    loss = model.loss(x, symbols(3, B), LENGTHS)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    got = model.generate(x, LENGTHS, max_length=4, beam=3)
    assert got.scores.dtype == torch.float32 and got.scores.isfinite().all()


def test_an_empty_batch_writes_nothing():
    got = make(rnn.OneToMany, {}).generate(inputs({}, 0), max_length=4)
    assert [tuple(x.shape) for x in got] == [(0, 0), (0,), (0,)]


@pytest.mark.parametrize("pattern", [rnn.OneToMany, rnn.EncoderDecoder])
@pytest.mark.parametrize("how", [{}, {"beam": 3}], ids=str)
def test_dropout_does_nothing_where_a_model_writes(pattern, how):
    model = make(pattern, {"num_layers": 3, "dropout": 0.5}, scale=3)
    x = inputs({}, B) if pattern is rnn.OneToMany else inputs({}, T, B)
    got = [model.generate(x, max_length=5, **how) for _ in range(3)]
    want = model.eval().generate(x, max_length=5, **how)
    assert all(torch.equal(one.symbols, want.symbols) for one in got)
    assert all(torch.equal(one.scores, want.scores) for one in got)


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_is_in_its_own_mode_after_writing(fails):
    model = make(rnn.EncoderDecoder, {})
    model.decoder.symbols.eval()  # as where some layers are frozen
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    with contextlib.nullcontext() if not fails else pytest.raises(ValueError):
        model.generate(inputs({}, T, B), max_length=0 if fails else 3)
    assert {name: module.training for name, module in model.named_modules()} == before


class Says(torch.nn.Module):
    """A read-out that has the given logits at each step in turn."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = iter(logits)

    def forward(self, h):
        return torch.tensor(next(self.logits)).double().expand(len(h), -1)


INF = math.inf


@pytest.mark.parametrize("how", [{}, {"beam": 3}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize(
    "bad",
    [
        [math.nan] * V,
        [0.0, 0.0, math.nan, 0.0, 0.0, 0.0],
        [0.0, 0.0, INF, 0.0, 0.0, 0.0],
        [-INF] * V,
    ],
    ids=["nan", "one-nan", "inf", "no-symbol"],
)
def test_a_model_that_gives_no_probabilities_writes_nothing(how, bad):
    model = make(rnn.OneToMany, {})
    model.readout = Says([-9.0] + [0.0] * (V - 1), bad)
    with pytest.raises(ValueError, match="no probabilities at step 1"):
        model.generate(inputs({}, B), max_length=4, **how)


@pytest.mark.parametrize("how", [{}, {"beam": 3}, {"temperature": 1.0}], ids=str)
def test_a_symbol_may_be_made_impossible(how):
    model = make(rnn.OneToMany, {})
    model.readout = Says(*[[-INF, 0.0, -INF, 0.0, -INF, -INF]] * 4)
    got = model.generate(inputs({}, B), max_length=4, **how)
    assert got.symbols.unique().tolist() in ([1], [1, 3]) and got.scores.isfinite().all()
