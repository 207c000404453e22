"""Small models of the five patterns, and what they are given."""

import pytest
import torch

I, H, V = 5, 7, 6  # input features, hidden units, symbols or labels
T, B = 6, 4
LENGTHS = torch.tensor([6, 0, 3, 1])
FORMS = {  # how a model reads and how deep it is
    "plain": {},
    "relu": {"cell": "rnn_relu"},
    "lstm": {"cell": "lstm"},
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
