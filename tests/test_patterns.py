"""The five sequence patterns: what comes out, what is learned from, what is written."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import rnn
from rnn.generation import best_continuations
from rnn.patterns import IGNORED, cross_entropy

I, H, V = 5, 7, 6  # input features, hidden units, symbols or labels
T, B = 6, 4
LENGTHS = torch.tensor([6, 0, 3, 1])
CELLS = ("rnn_tanh", "rnn_relu")
FORMS = {  # how a model reads and how deep it is
    "plain": {},
    "relu": {"cell": "rnn_relu"},
    "symbols": {"embedding": 3},
    "deep": {"num_layers": 3},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
}
ONE_WAY = {name: form for name, form in FORMS.items() if name != "bidirectional"}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_one_way = pytest.mark.parametrize("form", ONE_WAY.values(), ids=ONE_WAY)


def make(pattern, form, seed=0, scale=1.0, **more):
    """A model in float64, in which what should be equal is; scale makes its choices decided."""
    torch.manual_seed(seed)
    model = pattern(I, H, V, dtype=torch.float64, **form, **more)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def inputs(form, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if "embedding" in form:
        return torch.randint(I, shape, generator=generator)
    return torch.randn(*shape, I, dtype=torch.float64, generator=generator)


def symbols(*shape, low=1, seed=2):
    """Targets: symbol 0 ends a sequence and is in none."""
    return torch.randint(low, V, shape, generator=torch.Generator().manual_seed(seed))


def elman(model, module, x):
    """The outputs of a one-directional module on x (T, B, I), by the equation, step by step."""
    f = torch.relu if module.nonlinearity == "relu" else torch.tanh
    for layer in range(module.num_layers):
        w_ih, w_hh, b_ih, b_hh = module.all_weights[layer]
        h, steps = x.new_zeros(x.size(1), H), []
        for x_t in x:
            h = f(x_t @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh)
            steps.append(h)
        x = torch.stack(steps)
    return x


def mean_nats(logits, labels):
    """Cross-entropy by its definition, over label tuples (index of logits, label)."""
    return -sum(logits[at].log_softmax(-1)[label] for at, label in labels) / len(labels)


# Each pattern is its drawing


@each_one_way
def test_one_to_one_is_a_plain_network(form):
    model, x = make(rnn.OneToOne, form), inputs(form, B)
    want = elman(model, model.rnn, model.embedding(x)[None])[0] @ model.readout.weight.t()
    torch.testing.assert_close(model(x), want)


@each_one_way
def test_many_to_one_reads_out_the_last_state(form):
    model, x = make(rnn.ManyToOne, form), inputs(form, T, B)
    want = elman(model, model.rnn, model.embedding(x))[-1] @ model.readout.weight.t()
    torch.testing.assert_close(model(x), want)


@each_one_way
def test_many_to_many_reads_out_each_state(form):
    model, x = make(rnn.ManyToMany, form), inputs(form, T, B)
    want = elman(model, model.rnn, model.embedding(x)) @ model.readout.weight.t()
    torch.testing.assert_close(model(x), want)


@each_one_way
def test_one_to_many_writes_from_its_condition_and_the_symbol_before(form):
    model, x, targets = make(rnn.OneToMany, form), inputs(form, B), symbols(T, B)
    c = model.condition(model.embedding(x))
    steps = torch.stack([c, *(c + model.symbols(y) for y in targets)])
    want = elman(model, model.rnn, steps) @ model.readout.weight.t()
    assert want.shape == (T + 1, B, V)
    torch.testing.assert_close(model(x, targets), want)


@each_form
def test_encoder_decoder_is_many_to_one_then_one_to_many(form):
    model, x, targets = make(rnn.EncoderDecoder, form), inputs(form, T, B), symbols(3, B)
    last = model.encode(x)
    if not model.encoder.bidirectional:
        torch.testing.assert_close(last, elman(model, model.encoder, model.embedding(x))[-1])
    assert last.shape == (B, model.encoder.directions * H)
    assert torch.equal(model(x, targets), model.decoder(last, targets))
    assert torch.equal(model.loss(x, targets), model.decoder.loss(last, targets))


@pytest.mark.parametrize("pattern", [rnn.ManyToOne, rnn.EncoderDecoder])
def test_both_directions_end_where_they_should(pattern):
    """A bidirectional model reads the last state of each direction, not both at one step."""
    form = FORMS["bidirectional"]
    model, x = make(pattern, form), inputs(form, T, B)
    module = model.rnn if pattern is rnn.ManyToOne else model.encoder
    output, _ = module(x)
    want = torch.cat((output[-1, :, :H], output[0, :, H:]), 1)
    got = model.encode(x) if pattern is rnn.EncoderDecoder else model(x)
    weight = torch.eye(2 * H) if pattern is rnn.EncoderDecoder else model.readout.weight
    torch.testing.assert_close(got, want @ weight.double().t())


# Lengths


@each_form
def test_many_to_one_and_many_to_many_heed_the_lengths(form):
    x = inputs(form, T, B)
    one, many = make(rnn.ManyToOne, form), make(rnn.ManyToMany, form)
    labels, label = symbols(T, B, low=0), symbols(B, low=0)
    got_one, got_many = one(x, LENGTHS), many(x, LENGTHS)
    pairs = []
    for b, n in enumerate(LENGTHS.tolist()):
        alone = x[:n, b : b + 1]
        torch.testing.assert_close(got_one[b], one(alone)[0] if n else torch.zeros(V).double())
        if n:
            torch.testing.assert_close(got_many[:n, b], many(alone)[:, 0])
        assert not got_many[n:, b].any()
        pairs += [((t, b), int(labels[t, b])) for t in range(n)]
    torch.testing.assert_close(many.loss(x, labels, LENGTHS), mean_nats(got_many, pairs))
    want = mean_nats(got_one, [(b, int(label[b])) for b in range(B)])
    torch.testing.assert_close(one.loss(x, label, LENGTHS), want)


@each_one_way
def test_one_to_many_learns_its_targets_and_their_ends_and_nothing_behind(form):
    model, x, targets = make(rnn.OneToMany, form), inputs(form, B), symbols(T, B)
    padded = targets.masked_fill(torch.arange(T)[:, None] >= LENGTHS, IGNORED)
    pairs, rows = [], []
    for b, n in enumerate(LENGTHS.tolist()):
        rows.append(model(x[b : b + 1], targets[:n, b : b + 1])[:, 0])
        torch.testing.assert_close(model(x, padded, LENGTHS)[: n + 1, b], rows[b])
        pairs += [((b, t), int(targets[t, b])) for t in range(n)] + [((b, n), 0)]
    logits = {at: rows[at[0]][at[1]] for at, _ in pairs}
    want = mean_nats(logits, pairs)
    torch.testing.assert_close(model.loss(x, padded, LENGTHS), want)
    grown = model.loss(x, torch.cat((padded, padded)), LENGTHS)  # more padding
    torch.testing.assert_close(grown, want)


@each_form
def test_encoder_decoder_heeds_the_lengths_of_both(form):
    model, x, targets = make(rnn.EncoderDecoder, form), inputs(form, T, B), symbols(3, B)
    ends = torch.tensor([3, 2, 0, 1])
    want = model(x, targets, LENGTHS, ends)
    poisoned = x.clone()
    poisoned[torch.arange(T)[:, None] >= LENGTHS] = 0
    torch.testing.assert_close(model(poisoned, targets, LENGTHS, ends), want)
    for b, (n, m) in enumerate(zip(LENGTHS.tolist(), ends.tolist())):
        if n:
            alone = model(x[:n, b : b + 1], targets[:m, b : b + 1])
            torch.testing.assert_close(want[: m + 1, b], alone[:, 0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("pattern", [rnn.ManyToOne, rnn.ManyToMany, rnn.EncoderDecoder])
def test_every_weight_learns(pattern, cell):
    model = make(pattern, {"cell": cell, "embedding": 3, "num_layers": 2})
    x = inputs({"embedding": 3}, T, B)
    labels = symbols(B) if pattern is rnn.ManyToOne else symbols(T, B)
    model.loss(x, labels, LENGTHS).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.any(), name


def test_a_loss_is_the_mean_over_the_labels_that_count():
    logits, labels = torch.randn(5, 3, V), symbols(5, 3, low=0)
    labels[1:3, 0] = labels[4] = IGNORED
    pairs = [(tuple(at), int(labels[tuple(at)])) for at in (labels != IGNORED).nonzero().tolist()]
    torch.testing.assert_close(cross_entropy(logits, labels), mean_nats(logits, pairs))


NOTHING = {  # where nothing is to be predicted
    "labels": (rnn.ManyToMany, lambda m, x: m.loss(x, torch.full((T, B), IGNORED))),
    "lengths": (rnn.ManyToMany, lambda m, x: m.loss(x, symbols(T, B), torch.zeros(B).long())),
    "label": (rnn.ManyToOne, lambda m, x: m.loss(x, torch.full((B,), IGNORED))),
    "step": (rnn.OneToOne, lambda m, x: m.loss(x[0], torch.full((B,), IGNORED))),
    "no-rows": (rnn.OneToOne, lambda m, x: m.loss(x[0, :0], symbols(0))),
}


@pytest.mark.parametrize("form", [FORMS["symbols"], FORMS["deep"]], ids=["symbols", "deep"])
@pytest.mark.parametrize("pattern, loss_of", NOTHING.values(), ids=NOTHING)
def test_the_loss_of_nothing_is_zero_and_so_are_its_gradients(pattern, loss_of, form):
    model = make(pattern, form)
    loss = loss_of(model, inputs(form, T, B))
    loss.backward()
    assert loss.item() == 0
    for name, weight in model.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


# Streaming


@pytest.mark.parametrize("pieces", [[1] * T, [2, 4], [6]], ids=str)
@each_one_way
def test_a_stream_in_pieces_is_the_whole(form, pieces):
    model, x = make(rnn.ManyToMany, form), inputs(form, T, B)
    state, logits = None, []
    for piece in x.split(pieces):
        got, state = model.stream(piece, state)
        logits.append(got)
    torch.testing.assert_close(torch.cat(logits), model(x))


def test_a_bidirectional_model_cannot_stream():
    with pytest.raises(ValueError, match="cannot stream"):
        make(rnn.ManyToMany, FORMS["bidirectional"]).stream(inputs({}, T, B))


# Writing


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
def test_a_beam_does_no_worse_than_greedy_and_its_score_is_its_own(seed, beam):
    model, x = make(rnn.OneToMany, {"num_layers": 2}, seed, scale=3), inputs({}, 30)
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


# On the kernels


@pytest.mark.parametrize("pattern", [rnn.ManyToOne, rnn.ManyToMany, rnn.EncoderDecoder])
def test_the_kernels_give_the_same(pattern):
    """Losses, every gradient and what is written, in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    form = {"embedding": 3, "bidirectional": True, "cell": "rnn_tanh"}
    labels = symbols(B) if pattern is rnn.ManyToOne else symbols(T, B)
    x, results = inputs(form, T, B), []
    for backend, dtype, where in (("torch", "float64", "cpu"), ("triton", "float32", device)):
        model = make(pattern, {**form, "backend": backend}).to(where, getattr(torch, dtype))
        loss = model.loss(x.to(where), labels.to(where), LENGTHS)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), *gradients])
        if pattern is rnn.EncoderDecoder:
            got = model.generate(x.to(where), LENGTHS, max_length=3, beam=2)
            results[-1] += [got.symbols, got.scores]
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.cpu().double(), want.double(), rtol=1e-3, atol=1e-3)


# Any cell, LSTM's among them


class Pair(rnn.RNN):
    """A cell whose state is a tuple of two, as LSTM's will be: h, and how often it stepped."""

    def forward(self, input, hx=None, *, lengths=None):
        h, c = (None, 0) if hx is None else hx
        output, h_n = super().forward(input, h, lengths=lengths)
        return output, (h_n, c + torch.full_like(h_n, float(len(input))))


def test_a_cell_whose_state_is_a_tuple(monkeypatch):
    monkeypatch.setitem(rnn.modules.MODULES, "pair", Pair)
    x = inputs({}, T, B)
    for pattern in (rnn.ManyToOne, rnn.ManyToMany):
        assert torch.equal(make(pattern, {"cell": "pair"})(x), make(pattern, {})(x))
    got, want = (
        make(rnn.EncoderDecoder, form, scale=3).generate(x, max_length=5, beam=3)
        for form in ({"cell": "pair"}, {})
    )
    assert torch.equal(got.symbols, want.symbols)
    _, state = make(rnn.ManyToMany, {"cell": "pair"}).stream(x)
    assert (state[1] == T).all()


# What is refused


MANY, WRITER = (rnn.ManyToMany, rnn.OneToMany)


@pytest.mark.parametrize(
    "pattern", [getattr(rnn, name) for name in rnn.__all__ if name[0] in "OME"]
)
@pytest.mark.parametrize(
    "options, says",
    [
        ({"cell": "elman"}, "cell must be one of"),
        ({"batch_first": True}, "batch_first is not supported"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
    ids=["cell", "batch_first", "backend"],
)
def test_constructors_refuse(pattern, options, says):
    with pytest.raises(ValueError, match=says):
        pattern(I, H, V, **options)


@pytest.mark.parametrize("pattern", [rnn.OneToMany, rnn.EncoderDecoder])
def test_an_end_that_is_no_symbol(pattern):
    with pytest.raises(ValueError, match=r"end must lie in \[0, 6\), got 6"):
        pattern(I, H, V, end=V)


def test_a_writer_has_no_second_direction():
    with pytest.raises(ValueError, match="bidirectional"):
        rnn.OneToMany(I, H, V, bidirectional=True)


REFUSED = {
    "labels": (ValueError, "labels must be", lambda m, w: m.loss(inputs({}, T, B), symbols(T, 1))),
    "targets-rows": (RuntimeError, "targets must be", lambda m, w: w(inputs({}, B), symbols(T, 3))),
    "targets-dim": (RuntimeError, "targets must be", lambda m, w: w(inputs({}, B), symbols(B))),
    "lengths-range": (
        ValueError,
        r"lie in \[0, 6\], got values from 0 to 7",
        lambda m, w: w.loss(inputs({}, B), symbols(T, B), torch.tensor([7, 0, 1, 2])),
    ),
    "lengths-shape": (
        ValueError,
        "lengths must have shape",
        lambda m, w: w(inputs({}, B), symbols(T, B), LENGTHS[:2]),
    ),
    "lengths-dtype": (
        TypeError,
        "int32 or int64",
        lambda m, w: m(inputs({}, T, B), LENGTHS.double()),
    ),
    "no-steps": (RuntimeError, "larger than 0", lambda m, w: m(inputs({}, 0, B))),
    "input-size": (RuntimeError, "must be equal", lambda m, w: m(inputs({}, T, B)[..., :3])),
    "dtype": (ValueError, "dtype", lambda m, w: m(inputs({}, T, B).float())),
    **{
        f"{name}-{value}": (
            TypeError,
            f"{name} must be an int, got ",
            lambda m, w, name=name, value=value: w.generate(
                inputs({}, B), **{"max_length": 2, name: value}
            ),
        )
        for name in ("max_length", "beam")
        for value in (2.5, 2.0, math.inf, math.nan, True, "2", None)
    },
    **{
        f"temperature-{value}": (
            TypeError,
            "temperature must be a number, got ",
            lambda m, w, value=value: w.generate(inputs({}, B), max_length=2, temperature=value),
        )
        for value in ("1", None, True, 1j)
    },
    "max-length": (ValueError, "at least 1", lambda m, w: w.generate(inputs({}, B), max_length=0)),
    "beam": (
        ValueError,
        "at least 1",
        lambda m, w: w.generate(inputs({}, B), max_length=2, beam=0),
    ),
    "temperature": (
        ValueError,
        "finite and at least 0",
        lambda m, w: w.generate(inputs({}, B), max_length=2, temperature=-1.0),
    ),
    "temperature-inf": (
        ValueError,
        "finite and at least 0",
        lambda m, w: w.generate(inputs({}, B), max_length=2, temperature=math.inf),
    ),
    "temperature-nan": (
        ValueError,
        "finite and at least 0",
        lambda m, w: w.generate(inputs({}, B), max_length=2, temperature=math.nan),
    ),
    "beam-and-temperature": (
        ValueError,
        "draws nothing",
        lambda m, w: w.generate(inputs({}, B), max_length=2, beam=2, temperature=1.0),
    ),
}


@pytest.mark.parametrize("error, says, call", REFUSED.values(), ids=REFUSED)
def test_calls_refuse(error, says, call):
    with pytest.raises(error, match=says):
        call(make(rnn.ManyToMany, {}), make(rnn.OneToMany, {}))
