"""Train one net on handwritten digits in three ways, and compare.

The net is a residual net for scikit-learn's digits (8 x 8 pixels, 1437 images to train, 360 to test). It is trained

  - by backpropagation;
  - by layer-wise gradient decoupling: every training image has hidden values z of its own, stored from one visit to the
    next, and all layers learn at once, each from its own input and its own target;
  - by the same with multipliers lambda, which are stored too, and which make the layers agree.

The loss of the output layer is softmax-with-infogain: its matrix H says how similar two digits are, so that an answer
that looks like the right digit costs less than one that does not.

It prints a table, and draws the learning curves and, for every hidden layer, how far its stored values are from what
the layer below computes.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

import lgd_kernels as lgd
from lgd_kernels.decoupled import Backpropagation, Mode, StoredValues, residual_net
from lgd_kernels.reference import ACTIVATIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH_SIZE = 128
LEARNING_RATE = 3e-2  # Adam, falling to 0 along a cosine; large because the weights are N(0, 1) times explicit scales
OF_A_SHALLOW_NET = {"rho": 0.05, "steps": 8, "visits": 1}  # hidden values follow faster; a deep net would oscillate
WAYS: dict[str, Mode] = {
    "backpropagation": Backpropagation(),
    "decoupled, z": StoredValues(multipliers=False, **OF_A_SHALLOW_NET),
    "decoupled, z and lambda": StoredValues(**OF_A_SHALLOW_NET),
}

SIMILARITIES = {
    "distance": lambda distance: lgd.Infogain.from_distance(distance, beta=8.0),
    "identity": lambda distance: lgd.Infogain.identity(10),
    "label_smoothing": lambda distance: lgd.Infogain.label_smoothing(0.1, 10),
}
COLORS = ("#444444", "#0072b2", "#d55e00")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images as rows of standardized pixels, and how different two digits look."""

    x: Tensor  # (1437, 64)
    labels: Tensor  # (1437,)
    test_x: Tensor  # (360, 64)
    test_labels: Tensor  # (360,)
    distance: Tensor  # (10, 10): between the mean images of two digits; 1 for the average pair


def load(device: str) -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels.astype("float32"), labels, test_size=360, random_state=0, stratify=labels)
    x, test_x, labels, test_labels = (torch.as_tensor(part, device=device) for part in parts)
    x, test_x = (x - x.mean()) / x.std(), (test_x - x.mean()) / x.std()
    means = torch.stack([x[labels == digit].mean(0) for digit in range(10)])
    distance = torch.cdist(means, means)
    return Digits(x, labels, test_x, test_labels, distance / (distance.sum() / 90))


# ---------------------------------------------------------------------------------------------------------------------
# A net and what its images keep
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """A net, a way to train it, and the hidden values and multipliers of every training image where it keeps them."""

    def __init__(self, mode: Mode, net: lgd.DecoupledNetwork, digits: Digits):
        self.mode, self.net, self.digits = mode, net, digits
        self.z = torch.stack(net.hidden_values(digits.x)) if mode.keeps_values else None  # (depth, images, width)
        self.multiplier = torch.zeros_like(self.z) if mode.keeps_multipliers else None
        self.start_epoch(0)
        if mode.keeps_values:
            mode.burn_in_(net, *self.batch(slice(None)), self.numbers)

    def batch(self, rows: slice) -> tuple[Tensor, Tensor, list[Tensor] | None, list[Tensor] | None]:
        """(x, labels, z, multiplier) of some images; z and multiplier are what is kept, not a copy."""
        kept = [None if values is None else list(values[:, rows]) for values in (self.z, self.multiplier)]
        return self.digits.x[rows], self.digits.labels[rows], *kept

    def start_epoch(self, epoch: int) -> None:
        """Fix the numbers of this epoch, from some of the images."""
        self.numbers = self.mode.start_epoch(self.net, epoch, *self.batch(slice(256)))
        self.squared_residual = self.squared_z = 0.0

    def visit(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        x, labels = self.digits.x[rows], self.digits.labels[rows]
        copies = [None if values is None else values[:, rows] for values in (self.z, self.multiplier)]
        z, multiplier = (None if values is None else list(values) for values in copies)
        for _ in range(self.mode.visits):
            visit = self.mode.visit_(self.net, x, labels, z, multiplier, optimizer, self.numbers)
        for kept, moved in zip((self.z, self.multiplier), copies, strict=True):
            if kept is not None:
                kept[:, rows] = moved
        self.squared_residual += visit.residual_norm.square()
        self.squared_z += visit.value_norm.square()

    def residual(self) -> Tensor:
        """(depth,): root mean square of e_t over that of z_t, at the end of this epoch's visits."""
        return (self.squared_residual / self.squared_z).sqrt().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one way of training did; lists have one entry per epoch."""

    name: str
    accuracy: list[float] = field(default_factory=list)  # on the test images, in percent
    seconds: list[float] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)  # (depth,) each; of stored hidden values only
    cost_of_mistake: float = 0.0  # mean distance between answer and label, over the wrong test answers at the end


def train(name: str, trainer: Trainer, digits: Digits, epochs: int, seed: int) -> Run:
    """Epochs of minibatches with Adam; the order of the images depends on the seed only."""
    run, generator = Run(name), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trainer.net.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    progress = tqdm(range(epochs), desc=f"{name:24}", unit="epoch")
    for epoch in progress:
        start = time.perf_counter()
        trainer.start_epoch(epoch)
        for rows in torch.randperm(len(digits.x), generator=generator).to(digits.x.device).split(BATCH_SIZE):
            trainer.visit(rows, optimizer)
        schedule.step()
        run.seconds.append(time.perf_counter() - start)
        if trainer.mode.keeps_values:
            run.residual.append(trainer.residual())
        evaluate(run, trainer.net, digits)
        progress.set_postfix_str(f"test accuracy {run.accuracy[-1]:.1f} %")
    return run


@torch.no_grad()
def evaluate(run: Run, net: lgd.DecoupledNetwork, digits: Digits) -> None:
    answers = net(digits.test_x).argmax(1)
    costs = digits.distance[digits.test_labels, answers][answers != digits.test_labels]
    run.accuracy.append(100 * (1 - len(costs) / len(answers)))
    run.cost_of_mistake = float(costs.mean()) if len(costs) else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> str:
    lines = [
        f"{'':24}{'test':>10}{'mean cost of':>15}{'time per':>11}{'worst hidden':>15}",
        f"{'':24}{'accuracy':>10}{'a mistake':>15}{'epoch':>11}{'residual':>15}",
    ]
    for run in runs:
        seconds = sorted(run.seconds)[len(run.seconds) // 2]
        worst = f"{100 * run.residual[-1].max():13.1f} %" if run.residual else f"{'-':>15}"
        lines.append(
            f"{run.name:24}{run.accuracy[-1]:8.1f} %{run.cost_of_mistake:15.2f}{1000 * seconds:8.0f} ms{worst}"
        )
    lines += [
        "",
        "mean cost of a mistake: distance between the mean images of answer and label; 1 is the average pair of digits",
        "time per epoch: median; worst hidden residual: rms of z - (what the layer below computes), relative to z",
    ]
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Learning curves, and the residual of every hidden layer over the epochs."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharex=True)
    epochs = range(1, len(runs[0].accuracy) + 1)
    for run, color in zip(runs, COLORS, strict=True):
        axes[0].plot(epochs, run.accuracy, color=color, linewidth=1.8, label=f"{run.name}: {run.accuracy[-1]:.1f} %")
    axes[0].set(title="Learning curves", xlabel="epoch", ylabel="test accuracy (%)")
    axes[0].legend(loc="lower right", frameon=False)

    decoupled = [run for run in runs if run.residual]
    depth, highest = len(decoupled[0].residual[0]), max(float(r.max()) for run in decoupled for r in run.residual)
    layers = matplotlib.colormaps["viridis_r"].resampled(depth)
    for run, ax in zip(decoupled, axes[1:], strict=True):
        for t, residual in enumerate(torch.stack(run.residual).T * 100):
            ax.plot(epochs, residual, color=layers(t), linewidth=1.8)
        ax.set(title=f"Hidden residuals: {run.name}", xlabel="epoch", ylim=(0, 105 * highest))
    axes[1].set_ylabel("rms of e / rms of z (%)")
    of_layers = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0.5, depth + 0.5), layers)
    ticks = range(1, depth + 1, -(-depth // 8))
    figure.colorbar(of_layers, ax=axes[2], ticks=ticks, label="hidden layer (1 is next to the image)")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def at_least(smallest: int):
    """An argument type: a whole number from `smallest` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    return parse


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--depth",
        type=at_least(2),
        default=4,
        metavar="N",
        help="number of hidden layers, 2 or more (default: %(default)s)",
    )
    add("--width", type=at_least(1), default=64, metavar="N", help="units of a hidden layer (default: %(default)s)")
    add("--activation", choices=ACTIVATIONS, default="relu", help="default: %(default)s")
    add(
        "--epochs",
        type=at_least(1),
        default=50,
        metavar="N",
        help="passes over the training images (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights and order of images (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add(
        "--H",
        choices=SIMILARITIES,
        default="distance",
        help="how similar the digits are: by the distance of their mean images, not at all (cross entropy), or all "
        "alike (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("out/train_digits.png"),
        metavar="PNG",
        help="where to draw (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Run]:
    args = arguments(argv)
    torch.set_num_threads(1)  # at these sizes more of them spend their time waiting for each other
    digits = load(args.device)
    H = SIMILARITIES[args.H](digits.distance)

    torch.manual_seed(args.seed)
    net = lgd.DecoupledNetwork(residual_net(64, args.width, args.depth, 10, args.activation), H=H).to(args.device)
    runs = []
    for name, mode in WAYS.items():
        trainer = Trainer(mode, copy.deepcopy(net), digits)
        runs.append(train(name, trainer, digits, args.epochs, args.seed))
    plot(runs, args.output)
    print(f"\n{args.depth} hidden layers of {args.width} {args.activation}, H: {args.H}\n\n{table(runs)}\n")
    print(f"drawn in {args.output}")
    return runs


if __name__ == "__main__":
    main()
