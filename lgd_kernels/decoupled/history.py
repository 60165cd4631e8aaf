"""What training did, epoch by epoch: in lists, as a table, as a CSV file, or in TensorBoard."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.decoupled import files


@dataclass
class History:
    """Lists with an entry for every epoch. What was not measured is NaN."""

    loss: list[float] = field(default_factory=list)  # of the last layer at its stored input: mean over the visits
    energy: list[float] = field(default_factory=list)  # of all layers: mean over the samples
    residual: list[list[float]] = field(default_factory=list)  # of each hidden layer: rms of e over rms of z
    validation_loss: list[float] = field(default_factory=list)  # of the ordinary net: mean over the samples
    validation_accuracy: list[float] = field(default_factory=list)  # share of the labels that it got right
    learning_rate: list[float] = field(default_factory=list)  # of the first group of parameters
    step_size: list[float] = field(default_factory=list)  # of z
    rho: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # training and validation; in the first epoch burn-in too

    def __len__(self) -> int:
        return len(self.loss)

    def append(self, **values: Any) -> None:
        """The values of one epoch, all of them by name."""
        for name, column in vars(self).items():
            column.append(values.pop(name))
        if values:
            raise TypeError(f"values: unknown {', '.join(values)}; expected {', '.join(vars(self))}")

    def row(self, epoch: int) -> dict[str, float]:
        """An epoch's numbers by name; of the residuals the largest."""
        numbers = {name: column[epoch] for name, column in vars(self).items()}
        return numbers | {"residual": max(self.residual[epoch], default=math.nan)}

    def __str__(self) -> str:
        """A table with a line for every epoch."""
        names = [name for name in vars(self) if any(not math.isnan(self.row(i)[name]) for i in range(len(self)))]
        lines = [["epoch", *(name.replace("_", " ") for name in names)]]
        lines += [[str(i), *(f"{self.row(i)[name]:.4g}" for name in names)] for i in range(len(self))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)

    def state_dict(self) -> dict[str, list]:
        return asdict(self)

    def save_csv(self, path: str | os.PathLike) -> None:
        """A line for every epoch, counted from 0. The file is written as a whole, so that no epoch of a run that was
        resumed is there twice."""
        path = Path(path)
        partial = path.with_name(path.name + files.PARTIAL)
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", *vars(self)])
            writer.writeheader()
            writer.writerows({"epoch": epoch} | self.row(epoch) for epoch in range(len(self)))
        os.replace(partial, path)


class EpochSums(NamedTuple):
    """Sums over the visits of an epoch; on the device, so that no visit waits for them."""

    n_samples: Tensor  # ()
    energies: Tensor  # (T,)
    squared_residual: Tensor  # (T-1,)
    squared_value: Tensor  # (T-1,)

    @classmethod
    def zero(cls, n_layers: int, device: torch.device) -> EpochSums:
        sizes = ((), (n_layers,), (n_layers - 1,), (n_layers - 1,))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add_(self, n_samples: int, energies: Tensor, residual_norm: Tensor, value_norm: Tensor) -> None:
        """Those of a visit."""
        self.n_samples.add_(n_samples)
        self.energies.add_(energies)
        self.squared_residual.add_(residual_norm.double().square())
        self.squared_value.add_(value_norm.double().square())

    def means(self) -> dict[str, Any]:
        """The columns of a `History` that follow from them."""
        energies = self.energies / self.n_samples
        residual = (self.squared_residual / self.squared_value).sqrt()
        return {"loss": float(energies[-1]), "energy": float(energies.sum()), "residual": residual.tolist()}
