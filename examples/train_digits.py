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
from lgd_kernels.decoupled import Batch, ResidualNet, gradient_of_hidden, largest_curvature
from lgd_kernels.reference import ACTIVATIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH_SIZE = 128
LEARNING_RATE = 3e-2  # Adam, falling to 0 along a cosine; large because the weights are N(0, 1) times explicit scales
BURN_IN = 64  # steps of the hidden values before the first weight moves
Z_STEPS = 8  # steps of the hidden values in one visit of a minibatch
RHO = 0.05  # weight of the hidden error; at 1 the hidden values are too slow: 95.4 % instead of 97.8 (5 seeds)
DUAL_STEP = 0.5 * RHO  # step of the multipliers

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
# Two ways to train
# ---------------------------------------------------------------------------------------------------------------------


class Backpropagation:
    """Down the gradient of the mean loss, through all layers in turn."""

    def __init__(self, net: ResidualNet, digits: Digits, H: lgd.Infogain):
        self.net, self.digits, self.H = net, digits, H

    def start_epoch(self) -> None:
        pass

    def visit(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        logits = self.net.logits(self.digits.x[rows])
        lgd.softmax_infogain_loss(logits, self.digits.labels[rows], self.H).backward()
        optimizer.step()

    def residual(self) -> None:
        """Hidden values are what the layers compute: there is none."""


class Decoupled:
    """A few steps of the stored hidden values, then all layers down the gradients of their local energies, at once."""

    def __init__(self, net: ResidualNet, digits: Digits, H: lgd.Infogain, *, multipliers: bool):
        self.net, self.every_row = net, Batch(digits.x, digits.labels, H)
        with torch.no_grad():
            self.z = torch.stack(net.hidden_values(digits.x))  # (depth, images, width)
        self.multiplier = torch.zeros_like(self.z) if multipliers else None
        self.start_epoch()
        for _ in range(BURN_IN):
            self.z -= self.step_size * gradient_of_hidden(net, self.every_row, self.z, self.multiplier, RHO)

    def batch(self, rows: Tensor | slice) -> tuple[Batch, Tensor, Tensor | None]:
        x, labels, H = self.every_row
        multiplier = None if self.multiplier is None else self.multiplier[:, rows]
        return Batch(x[rows], labels[rows], H), self.z[:, rows], multiplier

    def start_epoch(self) -> None:
        """Measure the curvature, on some of the images, for the steps of this epoch."""
        batch, z, multiplier = self.batch(slice(256))
        self.step_size = 1 / largest_curvature(lambda v: gradient_of_hidden(self.net, batch, v, multiplier, RHO), z)
        self.squared_residual = self.squared_z = 0.0

    def visit(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        batch, z, multiplier = self.batch(rows)
        options = {"rho": RHO, "steps": Z_STEPS, "step_size": self.step_size, "dual_step": DUAL_STEP}
        _, e = self.net.visit_(batch, z, multiplier, optimizer, **options)
        self.z[:, rows] = z
        if multiplier is not None:
            self.multiplier[:, rows] = multiplier
        self.squared_residual += e.square().sum((1, 2))
        self.squared_z += z.square().sum((1, 2))

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
    residual: list[Tensor] = field(default_factory=list)  # (depth,) each; of decoupled training only
    cost_of_mistake: float = 0.0  # mean distance between answer and label, over the wrong test answers at the end


def train(name: str, way: Backpropagation | Decoupled, digits: Digits, epochs: int, seed: int) -> Run:
    """Epochs of minibatches with Adam; the order of the images depends on the seed only."""
    run, generator = Run(name), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(way.net.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    progress = tqdm(range(epochs), desc=f"{name:24}", unit="epoch")
    for _ in progress:
        start = time.perf_counter()
        way.start_epoch()
        for rows in torch.randperm(len(digits.x), generator=generator).to(digits.x.device).split(BATCH_SIZE):
            way.visit(rows, optimizer)
        schedule.step()
        run.seconds.append(time.perf_counter() - start)
        if way.residual() is not None:
            run.residual.append(way.residual())
        evaluate(run, way.net, digits)
        progress.set_postfix_str(f"test accuracy {run.accuracy[-1]:.1f} %")
    return run


@torch.no_grad()
def evaluate(run: Run, net: ResidualNet, digits: Digits) -> None:
    answers = net.logits(digits.test_x).argmax(1)
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

    def net() -> ResidualNet:  # three times the same
        generator = torch.Generator().manual_seed(args.seed)
        return ResidualNet(64, args.width, args.depth, 10, args.activation, generator, args.device)

    ways = {
        "backpropagation": Backpropagation(net(), digits, H),
        "decoupled, z": Decoupled(net(), digits, H, multipliers=False),
        "decoupled, z and lambda": Decoupled(net(), digits, H, multipliers=True),
    }
    runs = [train(name, way, digits, args.epochs, args.seed) for name, way in ways.items()]
    plot(runs, args.output)
    print(f"\n{args.depth} hidden layers of {args.width} {args.activation}, H: {args.H}\n\n{table(runs)}\n")
    print(f"drawn in {args.output}")
    return runs


if __name__ == "__main__":
    main()
