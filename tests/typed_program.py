"""A program for type checkers, which is not run. They accept it: each wrong use is ignored by name,
and an ignored error that is none is an error. .ci/package runs mypy on the installed wheel;
pyright takes it too."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import rnn

x, lengths = torch.randn(6, 3, 5), torch.tensor([6, 0, 2])
packed = pack_sequence([torch.randn(6, 5), torch.randn(2, 5)])
gru, lstm = rnn.GRU(5, 7, num_layers=2), rnn.LSTM(5, 7, backend="torch")

assert_type(gru(x), tuple[Tensor, Tensor])
assert_type(gru.forward(packed), tuple[PackedSequence, Tensor])
assert_type(rnn.RNN(5, 7)(x, torch.zeros(1, 3, 7), lengths=lengths), tuple[Tensor, Tensor])
assert_type(lstm(x, lengths=lengths), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(lstm(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
_, state = lstm(x)
lstm(x, state)
assert_type(rnn.explain(lstm, x), str)
assert_type(rnn.convert(nn.Sequential(gru), to="torch")[0].why_not, str)

rnn.RNN(5, 7, backend="cuda")  # type: ignore[arg-type]
rnn.LSTM(5, 7, backend="cuda")  # type: ignore[arg-type]
rnn.convert(gru, to="jax")  # type: ignore[arg-type]
lstm(x, x)  # type: ignore[call-overload]
lstm.forward(x, x)  # type: ignore[call-overload]
gru(packed, lengths=lengths)  # type: ignore[call-overload]
gru([x])  # type: ignore[call-overload]
rnn.GRU(5, 7, layers=2)  # type: ignore[call-arg]
rnn.LSTM("5", 7)  # type: ignore[arg-type]
