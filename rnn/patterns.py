"""The five sequence patterns, as models: a recurrent module of any cell and depth between an input
and the read-out y_t = W_hy h_t.

    OneToOne        one input, one output, one step: a plain network
    OneToMany       one input gives a sequence that the model writes: captioning
    ManyToOne       a sequence gives one label: sentiment
    EncoderDecoder  the model reads a sequence, then writes another one: translation
    ManyToMany      an output at each step: labelling every video frame

Sequences are time-major, (T, B, ...), as by default in torch.nn.RNN. In the drawings time runs
from left to right, `->` is W_hh, an input goes up through W_ih, and a state goes up through W_hy.

Arguments that all constructors share:
    cell: "rnn_tanh", "rnn_relu", "gru", "lstm", a name of rnn.gallery, such as "mgu", or a Cell,
        such as rnn.cell makes.
    embedding: None if the inputs are vectors of input_size features. A width if they are symbols,
        int64 in [0, input_size): each is then embedded into a vector of that width.
    num_layers, bidirectional, dropout, bias, backend, device, dtype: as in rnn.RNN.

`loss` is a mean over what is to be predicted. Where nothing is, it is 0, with zero gradients.
`OneToMany` and `EncoderDecoder` have `generate`, which runs the model in eval mode and leaves each
of its modules in the mode that it was in.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cells import Cell
from .functional import check_lengths
from .generation import Generated, State, evaluating, generate
from .loss import IGNORED, cross_entropy
from .modules import module_of
from .recurrent import RecurrentBase
from .rows import active_steps


def recurrent(
    cell: str | Cell, input_size: int, hidden_size: int, options: dict[str, Any]
) -> RecurrentBase:
    if options.get("batch_first"):
        raise ValueError("the patterns take (T, B, ...): batch_first is not supported")
    return module_of(cell)(input_size, hidden_size, **options)


def placement(options: dict[str, Any]) -> dict[str, Any]:
    """Those options of a recurrent module that the other layers take too."""
    return {name: options[name] for name in ("device", "dtype") if name in options}


def input_layer(input_size: int, embedding: int | None, options: dict[str, Any]) -> nn.Module:
    if embedding is None:
        return nn.Identity()
    return nn.Embedding(input_size, embedding, **placement(options))


def final_hidden(state: State, directions: int) -> Tensor:
    """h of the last layer after each row's last step, (B, D * H): both directions side by side."""
    h_n = state if isinstance(state, Tensor) else state[0]
    return torch.cat(h_n[-directions:].unbind(0), 1)


class Pattern(nn.Module):
    """The parts of a pattern with one recurrent module: input, recurrence, read-out."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        outputs: int,
        *,
        cell: str | Cell = "rnn_tanh",
        embedding: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = input_layer(input_size, embedding, options)
        self.rnn = recurrent(cell, embedding or input_size, hidden_size, options)
        width = self.rnn.directions * hidden_size
        self.readout = nn.Linear(width, outputs, bias=False, **placement(options))


class OneToOne(Pattern):
    """One input, one output, one step from a zero state: a plain network, y = W_hy h_1.

    y
    ^
    h
    ^
    x

    Args:
        input_size, hidden_size, outputs: features of x, hidden units, classes.
        cell, embedding, and the options of rnn.RNN: see rnn.patterns.

    Example:
        >>> model = rnn.OneToOne(5, hidden_size=16, outputs=3, cell="gru")
        >>> x, labels = torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
        >>> model(x).shape
        torch.Size([4, 3])
        >>> model.loss(x, labels).backward()
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, input_size), or symbols (B,) -> logits (B, outputs)."""
        output, _ = self.rnn(self.embedding(x).unsqueeze(0))
        return self.readout(output[0])

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of labels (B,), in nats."""
        return cross_entropy(self(x), labels)


class ManyToOne(Pattern):
    """A sequence gives one label, y = W_hy h_T: sentiment. A bidirectional model reads the last
    state of each direction.

                y
                ^
    h --> h --> h
    ^     ^     ^
    x1    x2    x3

    Args:
        input_size, hidden_size, outputs: features of x (or symbols), hidden units, classes.
        cell, embedding, and the options of rnn.RNN: see rnn.patterns.

    Example:
        >>> model = rnn.ManyToOne(500, hidden_size=16, outputs=2, embedding=8, bidirectional=True)
        >>> words, lengths = torch.randint(500, (12, 4)), torch.tensor([12, 3, 0, 7])
        >>> model(words, lengths).shape
        torch.Size([4, 2])
        >>> model.loss(words, torch.tensor([0, 1, 1, 0]), lengths).backward()
    """

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (T, B, input_size), or symbols (T, B) -> logits (B, outputs).

        lengths (B,): row b ends after lengths[b] steps. A row of length 0 has logits 0.
        """
        _, state = self.rnn(self.embedding(x), lengths=lengths)
        return self.readout(final_hidden(state, self.rnn.directions))

    def loss(self, x: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of labels (B,), in nats."""
        return cross_entropy(self(x, lengths), labels)


class ManyToMany(Pattern):
    """An output at each step, y_t = W_hy h_t: a label for every video frame. In a bidirectional
    model it depends on the whole sequence. Otherwise it depends on the steps so far, and the
    sequence may come in pieces (`stream`).

        y1    y2    y3
        ^     ^     ^
        h --> h --> h
        ^     ^     ^
        x1    x2    x3

    Args:
        input_size, hidden_size, outputs: features of x (or symbols), hidden units, classes.
        cell, embedding, and the options of rnn.RNN: see rnn.patterns.

    Example:
        >>> model = rnn.ManyToMany(64, hidden_size=32, outputs=10, cell="lstm")
        >>> frames = torch.randn(25, 2, 64)
        >>> model(frames).shape
        torch.Size([25, 2, 10])
        >>> first, state = model.stream(frames[:20])
        >>> rest, state = model.stream(frames[20:], state)
        >>> torch.allclose(torch.cat([first, rest]), model(frames), atol=1e-5)
        True
    """

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (T, B, input_size), or symbols (T, B) -> logits (T, B, outputs).

        lengths (B,): row b ends after lengths[b] steps. Past its end its logits are 0.
        """
        output, _ = self.rnn(self.embedding(x), lengths=lengths)
        return self.readout(output)

    def stream(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits of the next piece of a sequence, one step or many, and the state after it, which
        the next call takes. state: (L, B, H), or a tuple of such for a cell with several states;
        zeros if None.

        Raises ValueError for a bidirectional model, whose outputs need the later steps.
        """
        if self.rnn.bidirectional:
            raise ValueError("a bidirectional model cannot stream: its outputs need later steps")
        output, state = self.rnn(self.embedding(x), state, lengths=lengths)
        return self.readout(output), state

    def loss(self, x: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of labels (T, B) over the steps before the ends, in nats."""
        logits = self(x, lengths)
        if lengths is not None:
            ended = ~active_steps(lengths.to(labels.device), len(labels))
            labels = labels.masked_fill(ended, IGNORED)
        return cross_entropy(logits, labels)


class OneToMany(nn.Module):
    """The model writes a sequence of symbols, conditioned on one input, until the end symbol.

        y1    y2    end
        ^     ^     ^
        h --> h --> h
        ^     ^     ^
        c     c+y1  c+y2        c = W_c x + b, and y the embedding of a symbol

    c is an input of every step, so that the state need not remember it (Cho et al., Learning phrase
    representations using RNN encoder-decoder, 2014, arXiv 1406.1078).

    Args:
        input_size, hidden_size: of the conditioning input x, and of the recurrent module.
        outputs: the number of symbols, the end symbol among them.
        end: the symbol that ends a sequence. This class adds it: targets do not hold it.
        symbol_size: features of c and of an embedded symbol.
        cell, embedding, and the options of rnn.RNN: see rnn.patterns.

    Raises:
        ValueError: `end` is no symbol, or the model is bidirectional.

    Example:
        >>> model = rnn.OneToMany(64, hidden_size=32, outputs=27, cell="gru")
        >>> images, names = torch.randn(2, 64), torch.randint(1, 27, (6, 2))
        >>> model.loss(images, names, lengths=torch.tensor([4, 6])).backward()
        >>> symbols, ends, scores = model.generate(images, max_length=5, beam=3)
        >>> symbols.shape[1], scores.shape  # symbols (T, B), T at most max_length
        (2, torch.Size([2]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        outputs: int,
        *,
        end: int = 0,
        symbol_size: int = 64,
        cell: str | Cell = "rnn_tanh",
        embedding: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= end < outputs:
            raise ValueError(f"end must lie in [0, {outputs}), got {end}")
        if options.get("bidirectional"):
            raise ValueError("a model that writes has no later steps to read: got bidirectional")
        self.end = end
        place = placement(options)
        self.embedding = input_layer(input_size, embedding, options)
        self.condition = nn.Linear(embedding or input_size, symbol_size, **place)
        self.symbols = nn.Embedding(outputs, symbol_size, **place)
        self.rnn = recurrent(cell, symbol_size, hidden_size, options)
        self.readout = nn.Linear(hidden_size, outputs, bias=False, **place)

    def forward(self, x: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Teacher forcing: the logits of each symbol, given the targets before it.

        x (B, input_size), or symbols (B,); targets (T, B), without the end symbol; lengths (B,)
        of the targets, T if None -> logits (T + 1, B, outputs). Step lengths[b] predicts the end
        symbol of row b; the logits past it are 0.
        """
        if targets.dim() != 2 or targets.size(1) != len(x):
            raise RuntimeError(f"targets must be (T, {len(x)}), got {tuple(targets.shape)}")
        T, B = targets.shape
        if lengths is not None:
            check_lengths(lengths, T, B)
            lengths = lengths.to(targets.device)
            targets = targets.masked_fill(~active_steps(lengths, T), self.end)
            lengths = lengths + 1  # the step that writes the end symbol
        before = F.pad(self.symbols(targets), (0, 0, 0, 0, 1, 0))  # nothing before the first step
        output, _ = self.rnn(self.condition(self.embedding(x)) + before, lengths=lengths)
        return self.readout(output)

    def loss(self, x: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the targets and their end symbols, in nats. Takes the arguments
        of forward."""
        logits = self(x, targets, lengths)
        T, B = targets.shape
        ends = targets.new_full((B,), T) if lengths is None else lengths.to(targets.device)
        labels = F.pad(targets, (0, 0, 0, 1), value=self.end)
        labels = labels.masked_fill(~active_steps(ends, T + 1), self.end)
        return cross_entropy(logits, labels.masked_fill(~active_steps(ends + 1, T + 1), IGNORED))

    @torch.no_grad()
    def generate(self, x: Tensor, **how: Any) -> Generated:
        """Write a sequence for each row of x (B, input_size), or symbols (B,).

        how: max_length, beam, temperature and generator, as in rnn.generation.generate, which
        documents them, the result and the errors.
        """
        with evaluating(self):
            return generate(self._next, self.condition(self.embedding(x)), end=self.end, **how)

    def _next(self, c: Tensor, before: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        step = c if before is None else c + self.symbols(before)
        output, state = self.rnn.step(step, state)
        return self.readout(output), state


class EncoderDecoder(nn.Module):
    """The encoder reads a sequence, then the decoder writes another one: many-to-one, then
    one-to-many. The encoder may be bidirectional.

                          y1    y2    end
                          ^     ^     ^
        e --> e --> e     h --> h --> h
        ^     ^     ^     ^     ^     ^
        x1    x2    x3    c     c+y1  c+y2        c of the encoder's last state

    Args:
        input_size: of x; see the top of this file for `embedding`.
        hidden_size, num_layers, dropout, cell: of the encoder and of the decoder.
        outputs, end, symbol_size: of the decoder, a OneToMany.

    Example:
        >>> model = rnn.EncoderDecoder(500, hidden_size=32, outputs=400, embedding=16, cell="lstm")
        >>> words, lengths = torch.randint(500, (9, 2)), torch.tensor([9, 4])
        >>> model.loss(words, torch.randint(1, 400, (7, 2)), lengths).backward()
        >>> model.generate(words, lengths, max_length=8).lengths.shape
        torch.Size([2])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        outputs: int,
        *,
        end: int = 0,
        symbol_size: int = 64,
        cell: str | Cell = "rnn_tanh",
        embedding: int | None = None,
        bidirectional: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = input_layer(input_size, embedding, options)
        encoder = {**options, "bidirectional": bidirectional}
        self.encoder = recurrent(cell, embedding or input_size, hidden_size, encoder)
        self.decoder = OneToMany(
            self.encoder.directions * hidden_size,
            hidden_size,
            outputs,
            end=end,
            symbol_size=symbol_size,
            cell=cell,
            **options,
        )

    def encode(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (T, B, input_size), or symbols (T, B), and lengths (B,) -> last state (B, D * H)."""
        _, state = self.encoder(self.embedding(x), lengths=lengths)
        return final_hidden(state, self.encoder.directions)

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing: x and lengths as in encode, targets and target_lengths as targets and
        lengths in OneToMany.forward -> logits (T + 1, B, outputs) for targets (T, B)."""
        return self.decoder(self.encode(x, lengths), targets, target_lengths)

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the targets and their end symbols, in nats."""
        return self.decoder.loss(self.encode(x, lengths), targets, target_lengths)

    @torch.no_grad()
    def generate(self, x: Tensor, lengths: Tensor | None = None, **how: Any) -> Generated:
        """Read x and write a sequence for each row; how: as in OneToMany.generate."""
        with evaluating(self):
            return self.decoder.generate(self.encode(x, lengths), **how)
