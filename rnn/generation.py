"""Writing a sequence symbol by symbol: greedy, by sampling, or by beam search; one loop for all."""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Tensor | tuple[Tensor, ...]  # of a recurrent module: each (L * D, B, H)

# (conditions (N, S), the symbols before (N,) or None at the first step, the state or None)
# -> logits (N, V) and the new state
Step = Callable[[Tensor, Tensor | None, State | None], tuple[Tensor, State]]


class Generated(NamedTuple):
    """What a model wrote. T is the longest length, and at most max_length."""

    symbols: Tensor  # (T, B) int64; from each end on, the end symbol
    lengths: Tensor  # (B,) int64; the end symbol is not counted
    scores: Tensor  # (B,) log-probability in nats, with that of the end symbol where it was written


def map_state(f: Callable[[Tensor], Tensor], state: State) -> State:
    """f of the state's tensor, or of each of its tensors."""
    return f(state) if isinstance(state, Tensor) else tuple(f(x) for x in state)


def rows_of(state: State, rows: Tensor) -> State:
    """The state of these rows of the batch."""
    return map_state(lambda x: x.index_select(1, rows), state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, in which dropout does nothing; give each of its modules its own
    mode back at the end, after an exception too."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_options(max_length: Any, beam: Any, temperature: Any) -> None:
    """Refuse options that generate cannot take: see its Raises."""
    for name, value in (("max_length", max_length), ("beam", beam)):
        try:
            whole = operator.index(value)  # an int of any library
        except TypeError:
            whole = None
        if whole is None or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if whole < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not 0 <= float(temperature) < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if beam > 1 and float(temperature) > 0:
        raise ValueError(f"beam search draws nothing: got {beam=} and {temperature=}")


def best_continuations(total: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scores (B, K, V) of all continuations of K beams, the beams and the symbols, (B, K)
    each, of the K to go on with.

    The first is the best of beam 0, which so stays the greedy sequence, and no result is worse
    than that one: a plain beam search may drop it. The others are the best of all the rest.
    """
    _, K, V = total.shape
    greedy = total[:, 0].argmax(1, keepdim=True)
    rest = total.flatten(1).scatter(1, greedy, -math.inf).topk(K - 1, 1).indices
    chosen = torch.cat((greedy, rest), 1)
    return chosen // V, chosen % V


def draw(
    log_p: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """From log-probabilities (B, 1, V), beam 0 and a symbol drawn at this temperature, (B, 1)."""
    # Relative to the largest: so small temperatures lose all of the others, and not this one.
    relative = log_p[:, 0] - log_p[:, 0].amax(1, keepdim=True)
    symbol = torch.multinomial((relative / temperature).softmax(1), 1, generator=generator)
    return torch.zeros_like(symbol), symbol


@torch.no_grad()
def generate(
    next_symbol: Step,
    conditions: Tensor,  # (B, S)
    *,
    end: int,
    max_length: int,
    beam: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Generated:
    """Write a sequence for each row, until its end symbol or max_length symbols.

    The caller puts the model in eval mode (`evaluating`).

    Args:
        next_symbol: one step of the model.
        conditions: what the model is given at each step, beside the symbol before.
        end: the symbol that ends a sequence.
        max_length: symbols at most, the end symbol not counted.
        beam: width of the beam search for the sequence of the highest score (Graves, Sequence
            transduction with recurrent neural networks, 2012); 1 takes the most probable symbol
            at each step (greedy). No width does worse than greedy.
        temperature: above 0, draw each symbol from softmax(logits / temperature) instead.
        generator: of the draws, on the device of the conditions; torch's own if None.

    Raises:
        TypeError: max_length or beam is not an int, or temperature is not a number.
        ValueError: max_length or beam is below 1, the temperature is negative or not finite, a
            beam wider than 1 comes with a temperature, or the model's logits are NaN.
    """
    check_options(max_length, beam, temperature)
    B, K, device = len(conditions), beam, conditions.device
    conditions = conditions.repeat_interleave(K, 0)
    first_rows = K * torch.arange(B, device=device)[:, None]
    written = torch.empty(0, B * K, dtype=torch.int64, device=device)
    ended = torch.zeros(B, K, dtype=torch.bool, device=device)
    # The beams of a row start alike: only the first may be continued.
    dtype = torch.promote_types(conditions.dtype, torch.float32)
    score = torch.full((B, K), -math.inf, dtype=dtype, device=device)
    score[:, 0] = 0
    state: State | None = None
    # A score can only fall: a row is done when its best beam has ended.
    while len(written) < max_length and not ended.gather(1, score.argmax(1, True)).all():
        logits, state = next_symbol(conditions, written[-1] if len(written) else None, state)
        log_p = logits.to(dtype).log_softmax(1).view(B, K, -1)
        # A row that has ended goes on with the end symbol, at no cost.
        log_p = log_p.masked_fill(ended.unsqueeze(2), -math.inf)
        log_p[..., end].masked_fill_(ended, 0)
        if log_p.isnan().any():
            raise ValueError(
                f"the model's logits give no probabilities at step {len(written)}: they hold NaN "
                "or +inf, or nothing but -inf. Are its weights finite?"
            )
        total = score.unsqueeze(2) + log_p
        if temperature > 0:
            parent, symbol = draw(log_p, temperature, generator)
        else:
            parent, symbol = best_continuations(total)
        score = total.flatten(1).gather(1, parent * total.size(2) + symbol)
        rows = (first_rows + parent).flatten()
        state = rows_of(state, rows)
        written = torch.cat((written[:, rows], symbol.view(1, -1)))
        ended = ended.gather(1, parent) | (symbol == end)
    best = score.argmax(1, True)
    symbols = written[:, (first_rows + best).flatten()]
    lengths = (symbols != end).sum(0)
    longest = int(lengths.max()) if B else 0
    return Generated(symbols[:longest], lengths, score.gather(1, best).squeeze(1))
