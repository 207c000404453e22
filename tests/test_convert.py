"""rnn.convert: a model of torch.nn's modules becomes one of this library's, and back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import CELLS, KINDS, H, I, assert_same, each_cell, everything, problem

import rnn

CONFIGS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False, "batch_first": True},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def theirs(cell, **config):
    kind, _, told = KINDS[cell]
    torch.manual_seed(0)
    return kind(I, H, **told, **config)


class Net(nn.Module):
    """A model with a recurrent module at some depth."""

    def __init__(self, recurrent):
        super().__init__()
        self.inside = nn.ModuleDict({"rnn": recurrent})
        self.out = nn.Linear(H, 2)

    def forward(self, x):
        return self.out(self.inside["rnn"](x)[0])


@each_cell
@each_config
def test_results_gradients_and_way_back(cell, config):
    module = theirs(cell, **config).double()
    x, hx = problem(module)
    expected, keys = everything(module, x, hx), list(module.state_dict())
    parameters = [*module.parameters()]
    attributes = set(vars(module))
    assert [str(line) for line in rnn.convert(module, backend="torch")] == [
        f"the model itself: torch.nn.{module.__class__.__name__} -> rnn.{KINDS[cell][1].__name__}"
    ]
    assert type(module) is KINDS[cell][1] and module.backend == "torch"
    assert_same(everything(module, x, hx), expected)
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert_same(everything(copied, x, hx), expected)
    (line,) = rnn.convert(module, to="torch")
    assert not line.why_not and type(module) is KINDS[cell][0]
    assert set(vars(module)) == attributes
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert_same(everything(module, x, hx), expected)


@each_cell
def test_the_optimizer_goes_on(cell):
    """Three steps of Adam, the model converted after the first and back after the second."""
    results = []
    for changes in ([], ["rnn", "torch"]):
        torch.manual_seed(0)
        model = Net(theirs(cell)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        x = torch.randn(6, 3, I, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for step in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            for to in changes[step : step + 1]:
                assert not any(line.why_not for line in rnn.convert(model, to=to))
        assert len(optimizer.state) == len([*model.parameters()])
        results.append({n: p.detach() for n, p in model.named_parameters()})
    assert_same(results[1], results[0])


def test_hooks_modes_and_frozen_parameters_stay():
    module = theirs("lstm").eval()
    module.weight_hh_l0.requires_grad_(False)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre"))
    module.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    module.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    module.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    model = Net(module)
    rnn.convert(model)
    model(torch.randn(6, 3, I, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())
    assert calls == [
        *("pre", "forward", "backward pre", "backward"),
        *("state_dict pre", "state_dict", "load pre", "load"),
    ]
    assert type(module) is rnn.LSTM and not module.training
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None


class Mask(nn.Module):
    def forward(self, weight):
        return weight.tril()


COMPUTED = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Mask()),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
}


@each_cell
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights(cell, compute):
    module = theirs(cell).double()
    compute(module)
    x, hx = problem(module)
    expected, name = everything(module, x, hx), type(module).__name__
    (line,) = rnn.convert(module)
    assert not line.why_not and isinstance(module, KINDS[cell][1])
    assert type(module).__name__ == name
    assert_same(everything(module, x, hx), expected)
    rnn.convert(module, to="torch")
    assert isinstance(module, KINDS[cell][0])
    assert_same(everything(module, x, hx), expected)


def test_a_parametrization_can_be_removed_after():
    module = theirs("gru")
    parametrize.register_parametrization(module, "weight_hh_l0", Mask())
    rnn.convert(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is rnn.GRU and not module.weight_hh_l0.triu(1).any()


def test_each_copy_of_a_parametrized_module_alone():
    """parametrize's class is shared by a module and its deep copies."""
    module = theirs("gru")
    parametrize.register_parametrization(module, "weight_hh_l0", Mask())
    other = copy.deepcopy(module)
    rnn.convert(module)
    assert isinstance(other, nn.GRU) and isinstance(module, rnn.GRU)
    assert_same(module(torch.ones(6, 3, I)), other(torch.ones(6, 3, I)))


def test_a_module_in_several_places_stays_one():
    shared = theirs("gru")
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    assert str(rnn.convert(model)) == "a: torch.nn.GRU -> rnn.GRU"
    assert model["a"] is model["b"][0] is shared and type(shared) is rnn.GRU


def test_each_module_has_its_line():
    class Custom(nn.LSTM):
        pass

    replaced = theirs("gru")
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            **{cell: theirs(cell) for cell in CELLS},
            "custom": Custom(I, H),
            "replaced": replaced,
            "ours": rnn.GRU(I, H, backend="torch"),
            "scripted": torch.jit.script(theirs("lstm")),
            "projected": nn.LSTM(I, H, proj_size=2),
            "linear": nn.Linear(I, H),
        }
    )
    parametrize.register_parametrization(model["custom"], "weight_hh_l0", Mask())
    custom = f"{__name__}.{Custom.__qualname__}"
    assert str(rnn.convert(model)).splitlines() == [
        "rnn_tanh: torch.nn.RNN -> rnn.RNN",
        "rnn_relu: torch.nn.RNN -> rnn.RNN",
        "gru: torch.nn.GRU -> rnn.GRU",
        "lstm: torch.nn.LSTM -> rnn.LSTM",
        f"custom: {custom}, not converted: a subclass may do something else",
        "replaced: torch.nn.GRU, not converted: its forward was replaced by another function",
        "ours: rnn.GRU, not converted: it is one already",
        "scripted: torch.jit LSTM, not converted: torch.jit has compiled it; convert the model "
        "before",
        "projected: torch.nn.LSTM -> rnn.LSTM",
    ]
    assert isinstance(model["custom"], Custom) and type(replaced) is nn.GRU
    assert model["ours"].backend == "torch" and isinstance(
        model["scripted"], torch.jit.ScriptModule
    )
    assert [line.path for line in rnn.convert(model, to="torch") if not line.why_not] == [
        *(*CELLS, "ours", "projected"),
    ]


def test_a_model_without_recurrent_modules():
    found = rnn.convert(nn.Linear(I, H))
    assert not found and str(found) == "no recurrent module"


def test_misuse():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        rnn.convert({})
    with pytest.raises(ValueError, match=r"to must be one of .*, got 'jax'"):
        rnn.convert(theirs("gru"), to="jax")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"):
        rnn.convert(theirs("gru"), backend="cuda")
