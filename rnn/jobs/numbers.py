"""Encoder and decoder on a language that can be made exactly right: English numbers."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import EncoderDecoder
from .training import Example, Job, Model, Settings, main_of

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = [*ONES, *TENS, "hundred", "thousand", "and"]
DIGITS = 6  # of the longest number
LIMIT = 10**DIGITS


def in_words(n: int) -> list[str]:
    """0 <= n < 1,000,000 in British English, with an "and" before what is below a hundred."""
    if not 0 <= n < LIMIT:
        raise ValueError(f"n must lie in [0, {LIMIT}), got {n}")
    if n < 20:
        return [ONES[n]]
    if n < 100:
        return [TENS[n // 10 - 2], *(in_words(n % 10) if n % 10 else [])]
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = n % size
    tail = [*(["and"] if rest < 100 else []), *in_words(rest)] if rest else []
    return [*in_words(n // size), name, *tail]


def word_by_word(words: list[str]) -> str:
    """What a dictionary makes of them: "three" is 3, "thirty" is 3 as in 34, "hundred" nothing."""
    digits = {word: str(n) for n, word in enumerate(ONES)}
    digits |= {word: str(n + 2) for n, word in enumerate(TENS)}
    return "".join(digits.get(word, "") for word in words)


def batch_of(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words (T, B), digits (T', B), and the lengths of both, (B,) each; symbol 0 ends digits."""
    ids = {word: i for i, word in enumerate(WORDS)}
    words = [torch.tensor([ids[w] for w in in_words(n)]) for n in numbers.tolist()]
    digits = [torch.tensor([int(d) + 1 for d in str(n)]) for n in numbers.tolist()]
    x, y = (nn.utils.rnn.pad_sequence(rows) for rows in (words, digits))
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (words, digits)]
    return x, y, lengths[0], lengths[1]


def in_digits(symbols: Tensor) -> list[str]:
    """Symbols (T, B), each digit plus one, as text."""
    return ["".join(str(i - 1) for i in row if i) for row in symbols.t().tolist()]


class WordsToDigits(Job):
    """Encoder-decoder: a number in words, read word by word -> the same in digits."""

    name = "encoder-decoder"
    title = "Held-out numbers: the probability of each digit as the network writes it"
    scored = "numbers never seen in training that come out right to the last digit"
    defaults = Settings(steps=2500, hidden_size=192)
    rate, batch = 2e-3, 64
    trained = 20000

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        # As many numbers of each length: drawn evenly, nine of ten would have six digits.
        generator = torch.Generator().manual_seed(0)
        length = torch.randint(1, DIGITS + 1, (2 * self.trained,), generator=generator)
        share = torch.rand(len(length), dtype=torch.float64, generator=generator)
        numbers = (share * 10.0**length).long()
        self.numbers = numbers[: self.trained]
        new = numbers[self.trained :][~torch.isin(numbers[self.trained :], self.numbers)]
        self.heldout = new.unique()[torch.randperm(len(new.unique()), generator=generator)[:1000]]

    def batch_of(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(self.device) for x in batch_of(numbers))

    def model(self, settings: Settings) -> EncoderDecoder:
        layers = settings.layers()
        return EncoderDecoder(len(WORDS), outputs=11, embedding=64, bidirectional=True, **layers)

    def loss(self, model: Model) -> Tensor:
        x, y, x_lengths, y_lengths = self.batch_of(
            self.numbers[torch.randint(self.trained, (self.batch,))]
        )
        return model.loss(x, y, x_lengths, y_lengths)

    def score(self, model: Model) -> float:
        x, _, lengths, _ = self.batch_of(self.heldout)
        said = in_digits(model.generate(x, lengths, max_length=DIGITS + 1, beam=4).symbols)
        return sum(a == str(b) for a, b in zip(said, self.heldout.tolist())) / len(said)

    def baselines(self) -> dict[str, float]:
        right = [word_by_word(in_words(n)) == str(n) for n in self.heldout.tolist()]
        return {"dictionary, word by word": sum(right) / len(right)}

    @torch.no_grad()
    def draw(self, model: Model, figure: Figure) -> None:
        hard = [n for n in self.heldout.tolist() if "0" in str(n) and n > 9999][:6]
        x, _, lengths, _ = self.batch_of(torch.tensor(hard))
        said = model.generate(x, lengths, max_length=DIGITS + 1, beam=4)
        p = model(x, said.symbols, lengths, said.lengths).softmax(2).cpu()
        for ax, b, n in zip(figure.subplots(2, 3).flat, range(6), hard):
            steps = int(said.lengths[b]) + 1
            ax.imshow(p[:steps, b].t().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            ax.set(yticks=range(11), yticklabels=["end", *range(10)])
            wrote = in_digits(said.symbols[:, b : b + 1])[0]
            ax.set_xticks(range(steps), [*wrote, "end"])
            ax.tick_params(labelsize=7)
            words = in_words(n)
            middle = len(words) // 2
            title = " ".join(words[:middle]) + "\n" + " ".join(words[middle:])
            ax.set_title(title, size=7, color="green" if wrote == str(n) else "red")

    def example(self, model: Model) -> Example:
        n = max(self.heldout.tolist(), key=lambda n: len(in_words(n)))
        x, y, _, _ = self.batch_of(torch.tensor([n]))
        return Example((x, y), {"encoder": in_words(n), "decoder.rnn": ["start", *str(n)]})


JOBS = (WordsToDigits,)
main = main_of(*JOBS)
