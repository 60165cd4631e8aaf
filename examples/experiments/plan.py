"""Which experiments there are, as one table, and the runs that they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lgd_kernels.decoupled import Backpropagation, Mode, ReinitializedValues, StoredValues

MODES: dict[str, Mode] = {
    "backpropagation": Backpropagation(),
    "stored": StoredValues(multipliers=False),
    "stored_multipliers": StoredValues(),
    "reinitialized": ReinitializedValues(),
    "one_step": StoredValues(steps=1, visits=1),
}
TITLES = {
    "backpropagation": "backpropagation",
    "stored": "stored z",
    "stored_multipliers": "stored z and multipliers",
    "reinitialized": "re-initialised z",
    "one_step": "stored z and multipliers, 1 step",
}
STORED = ("stored", "stored_multipliers")
WIDTH, BATCH_SIZE = 64, 64


@dataclass(frozen=True)
class Run:
    """What is measured at once, and everything that decides what comes out. Fields that mean nothing are 0."""

    experiment: str
    data: str  # a name in `problems.DATA`
    net: str  # a name in `problems.NETS`
    layers: int  # hidden values + 1
    mode: str  # a name in MODES
    learning_rate: float  # of Adam, at the beginning
    epochs: int
    seed: int  # of the weights and of the order of the samples

    def __str__(self) -> str:
        rate = f", rate {self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.experiment}: {self.layers} layers, {self.mode}{rate}, seed {self.seed}"


@dataclass(frozen=True)
class Experiment:
    """All combinations of these values are runs.

    measure: what is done in a run, a name in `measure.MEASUREMENTS`.
    learning_rates: of several, the best one for each mode counts, by validation samples which are taken from those for
        training; with one there are no such samples.
    deepest: the largest number of layers for modes that would take too long in deeper nets.
    """

    name: str
    measure: str
    layers: tuple[int, ...]
    modes: tuple[str, ...]
    data: tuple[str, ...] = ("digits",)
    nets: tuple[str, ...] = ("residual",)
    learning_rates: tuple[float, ...] = (0.0,)
    epochs: int = 0
    seeds: int = 5
    deepest: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_tuned(self) -> bool:
        return len(self.learning_rates) > 1

    def runs(self, seed: int) -> list[Run]:
        """Those of one seed."""
        axes = (self.data, self.nets, self.layers, self.modes, self.learning_rates)
        return [
            Run(self.name, data, net, layers, mode, rate, self.epochs, seed)
            for data, net, layers, mode, rate in itertools.product(*axes)
            if layers <= self.deepest.get(mode, layers)
        ]


# a rate of 0.01 is large because the weights are N(0, 1) times explicit scales; backpropagation reached as much with it
# as with 0.03 (97.5 and 97.2 % at 32 layers, 5 seeds)
TRAINING = {"measure": "training", "learning_rates": (0.01,), "epochs": 60}
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)

# the short ones first: within a seed, runs are started in this order
EXPERIMENTS = (
    Experiment("gradient", "gradient", (4, 8, 16, 32, 64, 128), ("reinitialized",)),
    Experiment("cost", "cost", (4, 8, 16, 32, 64, 128), ("stored", "stored_multipliers", "one_step", "reinitialized")),
    Experiment("linear", "linear", (4, 8, 16, 32), ("reinitialized",), data=("friedman1",), nets=("linear",)),
    Experiment(
        "depth",
        layers=(4, 8, 16, 32, 64, 128),
        modes=("backpropagation", *STORED, "reinitialized"),
        deepest={"reinitialized": 32},
        **TRAINING,
    ),
    Experiment(
        "other_data",
        layers=(8, 32),
        modes=("backpropagation", *STORED, "reinitialized"),
        data=("breast_cancer", "friedman1"),
        **TRAINING,
    ),
    Experiment(
        "scale",
        layers=(16, 32),
        modes=("backpropagation", *STORED),
        nets=("half_scale", "gain_3"),
        **TRAINING | {"learning_rates": GRID},
    ),
)


def quick(experiment: Experiment) -> Experiment:
    """The same, so small that it says nothing, to see that everything works."""
    return replace(
        experiment,
        layers=(4,),
        modes=tuple(dict.fromkeys((experiment.modes[0], experiment.modes[-1]))),
        data=experiment.data[:1],
        nets=experiment.nets[-1:],
        learning_rates=experiment.learning_rates[-2:],
        epochs=min(experiment.epochs, 1),
        seeds=1,
    )


def runs_of(experiments: tuple[Experiment, ...]) -> list[Run]:
    """All runs, seed by seed, so that those which were made when the time is over are balanced."""
    seeds = range(max((experiment.seeds for experiment in experiments), default=0))
    return [
        run for seed in seeds for experiment in experiments if seed < experiment.seeds for run in experiment.runs(seed)
    ]
