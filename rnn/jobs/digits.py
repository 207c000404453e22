"""Four patterns on the 1,797 hand-written digits, 8 x 8 pixels, that scikit-learn carries.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998. The
last fifth is held out, in the order of the file: most of it by other hands than the rest, which
makes it harder than a fifth drawn at random. Training images are turned, sheared, sized and moved
a little at random.
"""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from .. import ManyToMany, ManyToOne, OneToMany, OneToOne
from .training import Example, Job, Model, Settings, grid, main_of

SIDE = 8  # pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " " + "".join(sorted(set("".join(NAMES))))  # symbol 0 ends a name
TURN, SHEAR, SIZE, SHIFT = 0.25, 0.3, 0.15, 0.125  # radians; shares of the image's size


def jitter(images: Tensor) -> Tensor:
    """(N, 8, 8): each turned, sheared, sized and moved at random, each by a little."""
    N = len(images)
    turn, shear, size, x, y = (2 * torch.rand(5, N) - 1) * torch.tensor(
        [[TURN], [SHEAR], [SIZE], [SHIFT], [SHIFT]]
    )
    c, s = (1 + size) * turn.cos(), turn.sin()
    maps = torch.stack((c, shear - s, x, s, c, y), 1).view(N, 2, 3).to(images.device)
    places = F.affine_grid(maps, [N, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), places, align_corners=False).squeeze(1)


def spelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The names of digits (B,) as symbols (T, B), and their lengths (B,)."""
    names = [NAMES[digit] for digit in labels.tolist()]
    rows = [torch.tensor([LETTERS.index(letter) for letter in name]) for name in names]
    lengths = torch.tensor([len(name) for name in names])
    return nn.utils.rnn.pad_sequence(rows).to(labels.device), lengths.to(labels.device)


def written(symbols: Tensor) -> list[str]:
    """Symbols (T, B) as words."""
    return ["".join(LETTERS[i] for i in row).rstrip() for row in symbols.t().tolist()]


class Digits(Job):
    """The images and their labels, the first `trained` of them to learn from."""

    scored = "images named right"

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        data = load_digits()
        self.images = torch.tensor(data.images, dtype=torch.float32, device=device) / 16
        self.labels = torch.tensor(data.target, device=device)
        self.trained = len(self.labels) * 4 // 5

    def drawn(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Training images (*shape, 8, 8), jittered, and their labels (*shape)."""
        i = torch.randint(self.trained, shape, device="cpu").to(self.device)
        images = jitter(self.images[i].view(-1, SIDE, SIDE))
        return images.view(*shape, SIDE, SIDE), self.labels[i]

    def heldout(self) -> tuple[Tensor, Tensor]:
        return self.images[self.trained :], self.labels[self.trained :]

    def baselines(self) -> dict[str, float]:
        pixels, labels = self.images.flatten(1).cpu().numpy(), self.labels.cpu().numpy()
        n = self.trained
        return {
            name: float(model.fit(pixels[:n], labels[:n]).score(pixels[n:], labels[n:]))
            for name, model in (
                ("linear classifier", LogisticRegression(max_iter=1000)),
                ("nearest training image", KNeighborsClassifier(1)),
            )
        }


class DigitOfImage(Digits):
    """One to one: an image of a digit, all at once -> which digit it is."""

    name = "one-to-one"
    title = "The held-out images that the network is least sure of (true -> what it says)"
    defaults = Settings(steps=6000, cell="rnn_relu", hidden_size=256)

    def model(self, settings: Settings) -> OneToOne:
        return OneToOne(SIDE * SIDE, outputs=10, **settings.layers())

    def loss(self, model: Model) -> Tensor:
        images, labels = self.drawn(self.batch)
        return model.loss(images.flatten(1), labels)

    @torch.no_grad()
    def probabilities(self, model: Model) -> Tensor:
        return model(self.heldout()[0].flatten(1)).softmax(1)

    def score(self, model: Model) -> float:
        right = self.probabilities(model).argmax(1) == self.heldout()[1]
        return right.float().mean().item()

    def draw(self, model: Model, figure: Figure) -> None:
        (images, labels), p = self.heldout(), self.probabilities(model)
        for ax, i in zip(grid(figure, 3, 8), p.amax(1).argsort().tolist()):
            said, true = int(p[i].argmax()), int(labels[i])
            ax.imshow(images[i].cpu().numpy(), cmap="gray_r")
            color = "green" if said == true else "red"
            ax.set_title(f"{true} -> {said}, {float(p[i, said]):.2f}", size=8, color=color)

    def example(self, model: Model) -> Example:
        images, labels = self.heldout()
        return Example((images[:1].flatten(1),), {"rnn": [str(int(labels[0]))]})


class NameOfImage(Digits):
    """One to many: an image of a digit -> its name, spelled letter by letter: a caption."""

    name = "one-to-many"
    title = "Held-out images and the names that the network spells, its mistakes first"
    defaults = Settings(steps=4000, hidden_size=192)

    def model(self, settings: Settings) -> OneToMany:
        return OneToMany(SIDE * SIDE, outputs=len(LETTERS), **settings.layers())

    def loss(self, model: Model) -> Tensor:
        images, labels = self.drawn(self.batch)
        return model.loss(images.flatten(1), *spelled(labels))

    def names(self, model: Model) -> list[str]:
        """What the model writes below the held-out images; at most one letter too many."""
        longest = max(map(len, NAMES)) + 1
        return written(model.generate(self.heldout()[0].flatten(1), max_length=longest).symbols)

    def score(self, model: Model) -> float:
        labels = self.heldout()[1].tolist()
        return sum(a == NAMES[b] for a, b in zip(self.names(model), labels)) / len(labels)

    def draw(self, model: Model, figure: Figure) -> None:
        images, labels = self.heldout()
        names = self.names(model)
        right = [name == NAMES[label] for name, label in zip(names, labels.tolist())]
        shown = sorted(range(len(names)), key=lambda i: right[i])[:8] + list(range(16))
        for ax, i in zip(grid(figure, 3, 8), shown):
            ax.imshow(images[i].cpu().numpy(), cmap="gray_r")
            ax.set_title(names[i] or "(nothing)", size=9, color="green" if right[i] else "red")

    def example(self, model: Model) -> Example:
        images, labels = self.heldout()
        i = int((labels == 3).nonzero()[0])  # the longest name
        targets, _ = spelled(labels[i : i + 1])
        steps = ["image", *NAMES[int(labels[i])]]
        return Example((images[i : i + 1].flatten(1), targets), {"rnn": steps})


class DigitOfRows(Digits):
    """Many to one: the rows of an image arrive one by one -> which digit it is."""

    name = "many-to-one"
    title = "What the network believes as the rows of held-out images arrive, from the top"
    defaults = Settings(steps=5000)

    def model(self, settings: Settings) -> ManyToOne:
        return ManyToOne(SIDE, outputs=10, **settings.layers())

    def loss(self, model: Model) -> Tensor:
        images, labels = self.drawn(self.batch)
        return model.loss(images.transpose(0, 1), labels)

    @torch.no_grad()
    def probabilities(self, model: Model, images: Tensor, rows: int = SIDE) -> Tensor:
        """(B, 10), after so many rows."""
        return model(images[:, :rows].transpose(0, 1)).softmax(1)

    def score(self, model: Model) -> float:
        images, labels = self.heldout()
        return (self.probabilities(model, images).argmax(1) == labels).float().mean().item()

    def draw(self, model: Model, figure: Figure) -> None:
        images, labels = self.heldout()
        shown = [int((labels == digit).nonzero()[0]) for digit in range(10)]
        p = torch.stack(
            [self.probabilities(model, images[shown], rows) for rows in range(1, SIDE + 1)], 1
        )
        axes = grid(figure, 4, 5)
        for k in range(10):
            upper, lower = axes[k // 5 * 10 + k % 5], axes[k // 5 * 10 + 5 + k % 5]
            upper.imshow(images[shown[k]].cpu().numpy(), cmap="gray_r")
            lower.imshow(p[k].cpu().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            lower.set_xticks(range(10))
            lower.tick_params(labelsize=6)
            if k % 5 == 0:
                lower.set_ylabel("row")

    def example(self, model: Model) -> Example:
        rows = self.heldout()[0][:1].transpose(0, 1)
        return Example((rows,), {"rnn": [f"row {t + 1}" for t in range(SIDE)]})


class LargestSoFar(Digits):
    """Many to many: a video of digits, one a frame -> at each frame, the largest one so far."""

    name = "many-to-many"
    title = "A held-out video: below each frame the largest digit so far, as the network says it"
    scored = "frames labelled right"
    defaults = Settings(steps=3000, cell="rnn_relu", num_layers=2)
    rate, batch = 2e-3, 64
    frames = 16  # of the longest video
    videos = 500  # held out

    def model(self, settings: Settings) -> ManyToMany:
        return ManyToMany(SIDE * SIDE, outputs=10, **settings.layers())

    def loss(self, model: Model) -> Tensor:
        images, labels = self.drawn(self.frames, self.batch)
        lengths = torch.randint(1, self.frames + 1, (self.batch,), device="cpu")
        return model.loss(images.flatten(2), labels.cummax(0).values, lengths.to(self.device))

    def heldout_videos(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (T, B, 8, 8), their digits (T, B), the labels (T, B) and lengths (B,)."""
        images, digits = self.heldout()
        generator = torch.Generator().manual_seed(0)
        shape = (self.frames, self.videos)
        i = torch.randint(len(digits), shape, generator=generator).to(self.device)
        lengths = torch.randint(1, self.frames + 1, shape[1:], generator=generator)
        return images[i], digits[i], digits[i].cummax(0).values, lengths.to(self.device)

    def right(self, said: Tensor) -> Tensor:
        """Of labels (T, B) said of the held-out videos, which are right, before the ends."""
        _, _, labels, lengths = self.heldout_videos()
        shown = torch.arange(self.frames, device=self.device)[:, None] < lengths
        return (said == labels)[shown]

    @torch.no_grad()
    def said(self, model: Model) -> Tensor:
        images, _, _, lengths = self.heldout_videos()
        return model(images.flatten(2), lengths).argmax(2)

    def score(self, model: Model) -> float:
        return self.right(self.said(model)).float().mean().item()

    def baselines(self) -> dict[str, float]:
        """What one frame can tell, read without error: the likeliest label, given the frame's
        number and its digit."""
        digits = self.labels[torch.randint(self.trained, (self.frames, 20000)).to(self.device)]
        counts = torch.zeros(self.frames, 10, 10, device=self.device)  # (frame, digit, label)
        frame = torch.arange(self.frames, device=self.device)[:, None].expand_as(digits)
        one = torch.ones(digits.shape, device=self.device)
        counts.index_put_((frame, digits, digits.cummax(0).values), one, accumulate=True)
        said = counts.argmax(2).gather(1, self.heldout_videos()[1])
        return {"one frame, read perfectly": self.right(said).float().mean().item()}

    def draw(self, model: Model, figure: Figure) -> None:
        images, _, labels, lengths = self.heldout_videos()
        said = self.said(model)
        longest = lengths.argsort(descending=True)[:3].tolist()
        figure.set_size_inches(9, 3.2)
        axes = grid(figure, 3, self.frames)
        for row, b in enumerate(longest):
            for t in range(self.frames):
                ax = axes[row * self.frames + t]
                ax.imshow(images[t, b].cpu().numpy(), cmap="gray_r")
                color = "green" if said[t, b] == labels[t, b] else "red"
                ax.set_xlabel(str(int(said[t, b])), color=color, size=14)

    def example(self, model: Model) -> Example:
        images, digits, _, lengths = self.heldout_videos()
        b = int(lengths.argmax())
        steps = [str(digit) for digit in digits[:, b].tolist()]
        return Example((images[:, b : b + 1].flatten(2),), {"rnn": steps})


JOBS = (DigitOfImage, NameOfImage, DigitOfRows, LargestSoFar)
main = main_of(*JOBS)
