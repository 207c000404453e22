"""PyTorch's own module inputs and error inputs, of torch.testing, given to ours and to torch.nn's.

Run by tests/test_pytorch.py in a process of its own: the import changes global switches."""

import re

import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import rnn

COUNT = 0


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in flat(part)]


def check_results(info, ours, dtype):
    global COUNT
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        theirs = info.module_cls(*made.args, **made.kwargs, dtype=dtype)
        mine = ours(*made.args, **made.kwargs, dtype=dtype)
        mine.load_state_dict(theirs.state_dict())
        results = []
        for module in (mine, theirs):
            output = flat(module(*given.args, **given.kwargs))
            loss = sum(y.square().sum() for y in output)
            leaves = [*flat(given.args), *module.parameters()]
            results.append([*output, *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
        reference = flat(sample.reference_fn(mine, *given.args))
        for a, b in zip(reference, flat(mine(*given.args)), strict=True):
            torch.testing.assert_close(a, b)
        COUNT += 1


def check_errors(info, ours, dtype):
    global COUNT
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    for sample in samples:
        made = sample.module_error_input.constructor_input
        given = sample.module_error_input.forward_input
        error = None
        try:
            module = ours(*made.args, **made.kwargs)
            if sample.error_on != ModuleErrorEnum.CONSTRUCTION_ERROR:
                module(*given.args, **given.kwargs)
        except Exception as raised:
            error = raised
        assert type(error) is sample.error_type, (made, error)
        assert re.search(sample.error_regex, str(error)), (sample.error_regex, str(error))
        COUNT += 1


for info in module_db:
    ours = {torch.nn.RNN: rnn.RNN, torch.nn.GRU: rnn.GRU, torch.nn.LSTM: rnn.LSTM}.get(
        info.module_cls
    )
    if ours is not None:
        for dtype in (torch.float64, torch.float32):
            check_results(info, ours, dtype)
            check_errors(info, ours, dtype)
assert COUNT > 100
print(COUNT)
