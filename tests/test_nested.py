"""Nested tensors of layout torch.jagged: each sequence runs as it does alone in torch.nn."""

import pytest
import torch
from twins import (
    DEEP,
    IEEE,
    assert_same,
    each_cell,
    each_run,
    everything,
    problem,
    row_by_row,
    twins,
)

import rnn

pytestmark = IEEE
LENGTHS = torch.tensor([2, 6, 0, 3])


def nested(x, holes=False):
    """(B, T, I) as a nested tensor whose values are cut out of x, so that x gets their gradient."""
    if holes:
        return torch.nested.narrow(x, 1, torch.zeros(4, dtype=torch.int64), LENGTHS, torch.jagged)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)))
    values = torch.cat([row[:n] for row, n in zip(x, LENGTHS)])
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def padded(output):
    """The same, past each end zero."""
    rows = (torch.cat((y, y.new_zeros(6 - len(y), y.size(1)))) for y in output.unbind())
    return torch.stack([*rows])


@each_run
@each_cell
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("config", [{}, DEEP], ids=["one", "deep"])
def test_each_sequence_is_as_alone(cell, run, config, holes):
    backend, dtype = run
    theirs, ours = twins(cell, backend=backend, dtype=dtype, batch_first=True, **config)
    x, hx = problem(theirs, B=4)

    def call(module, x, hx):
        output, state = module(nested(x, holes), hx)
        return padded(output), state

    found = everything(ours, x, hx, call)
    assert_same(found, everything(theirs, x, hx, lambda *args: row_by_row(*args, LENGTHS)))


def test_output_has_the_offsets_of_the_input():
    _, ours = twins("lstm", batch_first=True)
    for holes in (False, True):
        given = nested(problem(ours, B=4)[0], holes)
        output, _ = ours(given)
        assert output.is_nested and output.offsets() is given.offsets()
        assert output.shape[:2] == given.shape[:2]  # so the two can be added


def test_all_of_them_empty():
    _, ours = twins("gru", batch_first=True)
    hx = torch.randn(1, 2, 7)
    empty = torch.nested.nested_tensor([torch.zeros(0, 5)] * 2, layout=torch.jagged)
    output, h_n = ours(empty, hx)
    assert output.values().shape == (0, 7) and torch.equal(h_n, hx)


def test_compiled():
    _, ours = twins("lstm", batch_first=True)
    given = nested(problem(ours, B=4)[0])
    assert_same(padded(torch.compile(ours)(given)[0]), padded(ours(given)[0]))


def test_explain():
    _, ours = twins("gru", batch_first=True)
    assert rnn.explain(ours, nested(problem(ours, B=4)[0])).startswith("layer 0: torch: ")


def test_refused():
    _, ours = twins("lstm", batch_first=True)
    given = nested(problem(ours, B=4)[0])
    with pytest.raises(ValueError, match="has its own lengths"):
        ours(given, lengths=LENGTHS)
    with pytest.raises(ValueError, match="has its own lengths"):
        ours(given, resets=torch.zeros(4, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be \(B, j, I\) of layout torch.jagged.*lengths="):
        ours(given.transpose(1, 2))
    with pytest.raises(ValueError, match=r"got torch.strided.*PackedSequence"):
        ours(torch.nested.nested_tensor([torch.zeros(3, 5)]))
    with pytest.raises(ValueError, match="needs a module with batch_first=True"):
        twins("lstm")[1](given)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        ours(torch.nested.nested_tensor([torch.zeros(3, 6)], layout=torch.jagged))
