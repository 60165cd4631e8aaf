"""Ways to train a DecoupledNetwork on a minibatch: what is kept of a sample from one visit to the next, and how.

    mode                            z                                   multipliers
    StoredValues()                  stored with the sample              stored with the sample
    StoredValues(multipliers=False) stored with the sample              none
    ReinitializedValues()           of the net fed forward, each visit  from 0, each visit
    Backpropagation()               none                                none

All have the same methods. An epoch begins with `start_epoch`, which gives the numbers that are fixed in it; every
minibatch is trained on by `visit_`, called `visits` times in a row. A mode holds options alone, so that it may be
shared; what changes is in the net, the optimizer, z, multiplier and `EpochNumbers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lgd_kernels.arguments import check_at_least, check_bool, check_int, check_not_negative
from lgd_kernels.decoupled.network import DecoupledNetwork, Visit

Schedule = float | Callable[[int], float]  # a number, or the one of every epoch, which count from 0
Values = list[Tensor] | None


class EpochNumbers(NamedTuple):
    """What `DecoupledNetwork.visit_` is called with throughout an epoch."""

    rho: float = 0.0
    dual_step: float = 0.0
    step_size: float = 0.0


class Mode(ABC):
    """What every way to train offers. z and multiplier are lists as in `DecoupledNetwork`, moved in place where the
    mode keeps them, and None where it does not."""

    keeps_values = False  # whether z is stored with the samples
    keeps_multipliers = False  # whether multipliers are stored with the samples
    visits = 1  # of a minibatch in a row

    @abstractmethod
    def start_epoch(
        self, net: DecoupledNetwork, epoch: int, x: Tensor, target: Tensor, z: Values, multiplier: Values
    ) -> EpochNumbers:
        """The numbers of this epoch; its step size is 1 / (the largest curvature for these samples), some of all."""

    @abstractmethod
    def visit_(
        self,
        net: DecoupledNetwork,
        x: Tensor,
        target: Tensor,
        z: Values,
        multiplier: Values,
        optimizer: Optimizer | None,
        numbers: EpochNumbers,
    ) -> Visit:
        """Trains on a minibatch. Without an optimizer the parameters' mean gradients are left in `.grad`."""

    def burn_in_(  # noqa: B027 nothing is a good default
        self,
        net: DecoupledNetwork,
        x: Tensor,
        target: Tensor,
        z: list[Tensor],
        multiplier: Values,
        numbers: EpochNumbers,
    ) -> None:
        """Moves a minibatch's z, where it is stored, from the values of the net fed forward before training begins; by
        default not at all."""


@dataclass(frozen=True)
class StoredValues(Mode):
    """Every sample keeps its z, and its multipliers, from one visit to the next.

    Args:
        multipliers: without them this is the method of auxiliary coordinates (Carreira-Perpinan & Wang 2014,
            arXiv:1212.5921), which deep nets learn less well with; with them the method of multipliers.
        steps: of z in a visit.
        visits: of a minibatch in a row. Multipliers that gather the residuals of many steps while the weights stand
            still make deep nets oscillate: with 31 hidden values 1 visit of 8 steps reached 96.4 % on digits, of 16
            steps 92.8, and 2 visits of 4 steps 96.9 (3 seeds, the best rates).
        rho: weight of the hidden error, a number or a function of the epoch.
        dual_step: step of the multipliers, likewise, at most rho; None is half of it.
        burn_in: steps of z before the first weight moves, see `burn_in_`.

    Raises TypeError or ValueError for an argument of the wrong type or value; where rho or dual_step are functions, at
    the start of the epoch.
    """

    multipliers: bool = True
    steps: int = 4
    visits: int = 2
    rho: Schedule = 1.0
    dual_step: Schedule | None = None
    burn_in: int = 64

    keeps_values = True

    def __post_init__(self) -> None:
        check_bool("multipliers", self.multipliers)
        _check_count("steps", self.steps)
        check_at_least("visits", self.visits, 1)
        _check_count("burn_in", self.burn_in)
        _check_schedules(self.rho, self.dual_step)

    @property
    def keeps_multipliers(self) -> bool:
        return self.multipliers

    def start_epoch(
        self, net: DecoupledNetwork, epoch: int, x: Tensor, target: Tensor, z: Values, multiplier: Values
    ) -> EpochNumbers:
        rho, dual_step = _at(epoch, self.rho, self.dual_step, 0.5)
        curvature = net.largest_curvature(x, z, target, multiplier=multiplier, rho=rho)
        return EpochNumbers(rho, dual_step, _inverse(curvature))

    def visit_(
        self,
        net: DecoupledNetwork,
        x: Tensor,
        target: Tensor,
        z: Values,
        multiplier: Values,
        optimizer: Optimizer | None,
        numbers: EpochNumbers,
    ) -> Visit:
        options = {"multiplier": multiplier, "steps": self.steps, "optimizer": optimizer, **numbers._asdict()}
        return net.visit_(x, z, target, **options)

    @torch.no_grad()
    def burn_in_(
        self,
        net: DecoupledNetwork,
        x: Tensor,
        target: Tensor,
        z: list[Tensor],
        multiplier: Values,
        numbers: EpochNumbers,
    ) -> None:
        """Moves z alone, by `burn_in` steps: from the values of the net fed forward, which every layer is content with,
        to ones that it can learn from."""
        for _ in range(self.burn_in):
            gradient = net.hidden_gradient(x, z, target, multiplier=multiplier, rho=numbers.rho)
            for value, of_value in zip(z, gradient, strict=True):
                value.sub_(of_value, alpha=numbers.step_size)


@dataclass(frozen=True)
class ReinitializedValues(Mode):
    """Every visit begins with the values of the net fed forward and multipliers of 0, and takes so many steps that they
    come close to backpropagation's: nothing is stored with the samples.

    Args:
        steps: of z in a visit; None is 4 for every layer. In a residual net of 31 hidden values with preactivation the
            smallest cosine between a layer's gradient and backpropagation's is then .97 at initialisation; with half as
            many steps .87, and with twice as many .80: more is worse.
        rho: weight of the hidden error, a number or a function of the epoch.
        dual_step: step of the multipliers, likewise, at most rho; None is rho.

    Raises: as `StoredValues`.
    """

    steps: int | None = None
    rho: Schedule = 1.0
    dual_step: Schedule | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            _check_count("steps", self.steps)
        _check_schedules(self.rho, self.dual_step)

    def start_epoch(
        self, net: DecoupledNetwork, epoch: int, x: Tensor, target: Tensor, z: Values, multiplier: Values
    ) -> EpochNumbers:
        rho, dual_step = _at(epoch, self.rho, self.dual_step, 1.0)
        curvature = net.largest_curvature(x, net.hidden_values(x), target, rho=rho)
        return EpochNumbers(rho, dual_step, _inverse(curvature))

    def visit_(
        self,
        net: DecoupledNetwork,
        x: Tensor,
        target: Tensor,
        z: Values,
        multiplier: Values,
        optimizer: Optimizer | None,
        numbers: EpochNumbers,
    ) -> Visit:
        values = net.hidden_values(x)
        steps = 4 * net.n_layers if self.steps is None else self.steps
        multipliers = [torch.zeros_like(value) for value in values]
        options = {"multiplier": multipliers, "steps": steps, "optimizer": optimizer, **numbers._asdict()}
        return net.visit_(x, values, target, **options)


@dataclass(frozen=True)
class Backpropagation(Mode):
    """The baseline: down the gradient of the mean loss of the ordinary net, through all layers in turn."""

    def start_epoch(
        self, net: DecoupledNetwork, epoch: int, x: Tensor, target: Tensor, z: Values, multiplier: Values
    ) -> EpochNumbers:
        return EpochNumbers()

    def visit_(
        self,
        net: DecoupledNetwork,
        x: Tensor,
        target: Tensor,
        z: Values,
        multiplier: Values,
        optimizer: Optimizer | None,
        numbers: EpochNumbers,
    ) -> Visit:
        """Its energies and residuals are 0, but for the loss; what its hidden values are is not known (NaN)."""
        net.zero_grad()
        if optimizer is not None:
            optimizer.zero_grad()
        loss = net.loss(x, target)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        n_hidden = len(net.layers) - 1
        residual_norm = loss.new_zeros(n_hidden)
        energies = torch.cat([residual_norm, len(x) * loss.detach().unsqueeze(0)])
        return Visit(energies, residual_norm, torch.full_like(residual_norm, torch.nan))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def _check_count(name: str, value: int) -> None:
    check_int(name, value)
    check_not_negative(name, value)


def _check_schedules(rho: Schedule, dual_step: Schedule | None) -> None:
    """What can be known before the first epoch."""
    if not callable(rho) and not callable(dual_step):
        _check_penalty(rho, rho if dual_step is None else dual_step, "")


def _check_penalty(rho: float, dual_step: float, when: str) -> None:
    check_not_negative(f"rho{when}", rho)
    check_not_negative(f"dual_step{when}", dual_step)
    if dual_step > rho:
        raise ValueError(f"dual_step{when}: must not be larger than rho, got {dual_step} and {rho}")


def _at(epoch: int, rho: Schedule, dual_step: Schedule | None, part_of_rho: float) -> tuple[float, float]:
    """(rho, dual_step) of an epoch; dual_step None is a part of rho."""
    rho = rho(epoch) if callable(rho) else rho
    if dual_step is None:
        dual_step = part_of_rho * rho
    elif callable(dual_step):
        dual_step = dual_step(epoch)
    _check_penalty(rho, dual_step, f" (epoch {epoch})")
    return float(rho), float(dual_step)


def _inverse(curvature: float) -> float:
    """1 / curvature; 0 where the energy is flat or there are no hidden values, and so nowhere to go."""
    return 1 / curvature if curvature > 0 else 0.0
