"""bench.tasks: the data follow their definitions, the baselines are right, and who has memory, and
only who has, solves a short length."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from bench import tasks
from bench.tasks import JOBS, NETWORKS, TASKS, Job, Network
from rnn.modules import NAMES

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = Job("adding", 5, "relu, identity", 0, 2000, hidden=32, batch=32, learning_rate=0.01)


def generator(seed=0):
    return Generator().manual_seed(seed)


def test_adding_marks_two_steps_and_wants_the_sum_of_their_numbers():
    x, wanted = tasks.adding_batch(9, 200, generator())
    assert x.shape == (9, 200, 2) and wanted.shape == (200, 1)
    for b in range(200):
        numbers, marks = x[:, b, 0].tolist(), x[:, b, 1].tolist()
        assert sorted(marks) == [0] * 7 + [1] * 2
        assert all(0 <= number < 1 for number in numbers)
        total = sum(number for number, mark in zip(numbers, marks, strict=True) if mark)
        assert wanted[b].item() == pytest.approx(total)
    assert (x[:, :, 1].sum(1) > 0).all()  # no step is left out


@pytest.mark.parametrize("T", [1, 7])
def test_copy_shows_ten_symbols_and_wants_them_after_the_delimiter(T):
    x, wanted = tasks.copy_batch(T, 50, generator())
    assert x.shape == (T + 20, 50, 10) and wanted.shape == (T + 20, 50)
    assert (x.sum(2) == 1).all() and ((x == 0) | (x == 1)).all()
    for b in range(50):
        given = x[:, b].argmax(1).tolist()
        symbols, rest = given[:10], given[10:]
        assert set(symbols) <= set(range(8))
        assert rest == [8] * (T - 1) + [9] + [8] * 10
        assert wanted[:, b].tolist() == [8] * (T + 10) + symbols
    assert set(wanted[-10:].flatten().tolist()) == set(range(8))


def test_who_always_says_1_has_the_baseline_of_adding():
    _, wanted = tasks.adding_batch(20, 100_000, generator())
    squares = (wanted - 1).square()
    standard_error = squares.std().item() / math.sqrt(squares.numel())
    baseline = TASKS["adding"].baseline(20)
    assert baseline == pytest.approx(squares.mean().item(), abs=5 * standard_error)


@pytest.mark.parametrize("T", [1, 100])
def test_who_remembers_nothing_has_the_baseline_of_copy(T):
    _, wanted = tasks.copy_batch(T, 20, generator())
    logits = torch.full((T + 20, 20, 9), -100.0)
    logits[: T + 10, :, 8] = 100  # sure of the blanks
    logits[T + 10 :, :, :8] = 0  # all symbols alike
    loss = tasks.cross_entropy(logits, wanted).item()
    assert loss == pytest.approx(TASKS["copy"].baseline(T), rel=1e-5)
    assert tasks.cross_entropy(F.one_hot(wanted, 9) * 100.0, wanted).item() < 1e-6


def test_relu_with_identity_solves_a_short_length_and_not_by_luck():
    sample = tasks.train(SHORT)
    assert sample["solved_at"] is not None, tasks.verdict(sample)
    (first_step, first_loss), (last_step, last_loss) = sample["losses"][0], sample["losses"][-1]
    assert last_step == sample["solved_at"] > first_step
    assert last_loss < 0.01 < first_loss
    assert "not solved in 200 steps" in tasks.verdict(tasks.train(SHORT._replace(max_steps=200)))


def test_without_memory_the_same_training_solves_nothing(monkeypatch):
    def forget(model):
        tasks.identity(model)
        nn.init.zeros_(model.rnn.weight_hh_l0).requires_grad_(False)

    monkeypatch.setitem(NETWORKS, "forgetful", Network("rnn_relu", forget))
    steps = tasks.train(SHORT)["solved_at"]
    sample = tasks.train(SHORT._replace(network="forgetful", max_steps=steps))
    assert sample["solved_at"] is None
    # Who knows only the last number, marked in 2 cases of 5, has 2/5 of 1/12 and 3/5 of 1/6.
    assert min(loss for _, loss in sample["losses"]) == pytest.approx(2 / 15, rel=0.1)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_said():
    sample = tasks.train(SHORT._replace(learning_rate=1e30))
    assert len(sample["losses"]) == 1
    assert tasks.verdict(sample) == "diverged by step 200"


def test_initial_weights():
    model = tasks.build(SHORT._replace(hidden=100))
    weight_ih, weight_hh, *biases = model.rnn.all_weights[0]
    assert torch.equal(weight_hh, torch.eye(100)) and not any(bias.any() for bias in biases)
    assert weight_ih.std().item() == pytest.approx(0.001, rel=0.3)
    weight_hh = tasks.build(SHORT._replace(network="tanh, orthogonal")).rnn.weight_hh_l0.detach()
    torch.testing.assert_close(weight_hh @ weight_hh.T, torch.eye(32), atol=1e-5, rtol=0)


def test_every_cell_takes_part_and_no_job_comes_twice():
    assert {network.cell for network in NETWORKS.values()} == set(NAMES)
    jobs = [*JOBS, *tasks.jobs_of(tasks.OTHERS)]
    assert {job.network for job in jobs} == set(NETWORKS)
    assert len(set(jobs)) == len(jobs)


def test_a_second_start_does_only_what_lacks_and_writes_the_same_report(tmp_path, monkeypatch):
    first, second = (SHORT._replace(max_steps=n + 2, seed=n) for n in (0, 1))
    train, trained = tasks.train, []
    monkeypatch.setattr(tasks, "train", lambda job: trained.append(job) or train(job))
    monkeypatch.setattr(sys, "argv", ["bench.tasks", "--out", str(tmp_path)])

    def run(*jobs):
        monkeypatch.setattr(tasks, "JOBS", jobs)
        tasks.main()
        return (tmp_path / "tasks.md").read_text()

    run(first)
    report = run(first, second)
    assert run(second, first) == report and trained == [first, second]
    assert "| relu, identity | 0.1667   | seed 0: not solved in 2 steps" in report
