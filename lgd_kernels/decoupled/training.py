"""A training run: everything that changes while `fit` trains, one minibatch after the other."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lgd_kernels.decoupled.checkpoint import Checkpoints, random_state, set_random_state
from lgd_kernels.decoupled.data import Batches
from lgd_kernels.decoupled.history import EpochSums, History
from lgd_kernels.decoupled.modes import EpochNumbers, Mode
from lgd_kernels.decoupled.network import DecoupledNetwork
from lgd_kernels.decoupled.store import ActivationStore


class Training:
    """The state of a run, as callbacks see it.

    Attributes:
        net, optimizer, scheduler, mode: as given to `fit`.
        store: the hidden values of all samples; None for a mode that keeps none.
        validation: the minibatches by which the net is judged after every epoch, or None.
        history: of the epochs that are done.
        epoch: how many epochs are done; batch: how many minibatches of the present one; step: how many in all.
        numbers: rho, dual_step and step_size of the present epoch.
        stop: set it to end the run after the present epoch.
        reports: whether this process is the one that shows a bar and writes the log.
    """

    reports = True
    kind_of_checkpoints: type = Checkpoints  # that `save` and `resume` take

    def __init__(
        self,
        net: DecoupledNetwork,
        optimizer: Optimizer,
        mode: Mode,
        batches: Batches,
        *,
        validation: Batches | None,
        scheduler: LRScheduler | None,
        store: ActivationStore | None,
        clip_grad_norm: float | None,
        autocast: bool,
    ):
        self.net, self.optimizer, self.mode, self.scheduler = net, optimizer, mode, scheduler
        self.batches, self.validation, self.device = batches, validation, next(net.parameters()).device
        self._clip_grad_norm, self._autocast = clip_grad_norm, autocast
        self.store = self._fitting_store(store)
        self.history, self.numbers = History(), EpochNumbers()
        self.epoch = self.batch = self.step = 0
        self.stop = False
        self._begin_epoch()

    # -----------------------------------------------------------------------------------------------------------------
    # Hidden values
    # -----------------------------------------------------------------------------------------------------------------

    def _fitting_store(self, store: ActivationStore | None) -> ActivationStore | None:
        """The store that the mode needs: the one given, if it suits the net and the data."""
        if not self.mode.keeps_values:
            if store is not None:
                raise ValueError(f"store: {self.mode} keeps no hidden values, got {store}")
            return None
        x, _ = next(self.batches.load(self.batches.in_order()[:1], self.device))
        values = self.net.hidden_values(x)
        shapes = [tuple(value.shape[1:]) for value in values]
        if store is None:
            is_double = any(value.dtype == torch.float64 for value in values)
            return ActivationStore(
                len(self.batches.shard),
                shapes,
                multiplier=self.mode.keeps_multipliers,
                device=self.device,
                dtype=torch.float64 if is_double else torch.float32,
            )
        for name, ours, needed in (
            ("n_samples", store.n_samples, len(self.batches.shard)),
            ("shapes", store.shapes, shapes),
            ("multiplier", store.multiplier is not None, self.mode.keeps_multipliers),
            ("device", store.device, self.device),
        ):
            if ours != needed:
                raise ValueError(f"store: has {name} {ours}, but net, data and mode need {needed}")
        return store

    def _rows(self, indices: Tensor) -> Tensor:
        """Where the store has the samples of a minibatch."""
        return self.batches.of_shard(indices) - self.batches.shard.start

    def initialize_values(self) -> Iterator[None]:
        """Set the hidden values of all samples to those of the net fed forward, and burn them in; multipliers to 0.
        Yields after every minibatch."""
        if self.store is None:
            return
        self.net.train()
        batches, numbers = self.batches.in_order(), None
        for indices, (x, target) in zip(batches, self.batches.load(batches, self.device), strict=True):
            stored = self.store.gather(self._rows(indices))
            for z, value in zip(stored.z, self.net.hidden_values(x), strict=True):
                z.copy_(value)
            for multiplier in stored.multiplier or []:
                multiplier.zero_()
            if numbers is None:
                numbers = self.mode.start_epoch(self.net, 0, x, target, stored.z, stored.multiplier)
            self.mode.burn_in_(self.net, x, target, stored.z, stored.multiplier, numbers)
            self.store.scatter(stored)
            yield

    # -----------------------------------------------------------------------------------------------------------------
    # An epoch
    # -----------------------------------------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        self.batch, self._began = 0, time.perf_counter()
        self._sums = EpochSums.zero(self.net.n_layers, self.device)

    def visits(self) -> Iterator[None]:
        """Train on what is left of the epoch. Yields after every minibatch."""
        self.net.train()
        left = self.batches.of_epoch(self.epoch)[self.batch :]
        for i, (x, target) in enumerate(self.batches.load(left, self.device)):
            self._visit_minibatch(left[i], x, target, left[i + 1] if i + 1 < len(left) else None)
            yield

    def _visit_minibatch(self, indices: Tensor, x: Tensor, target: Tensor, coming: Tensor | None) -> None:
        stored = None if self.store is None else self.store.gather(self._rows(indices))
        values = (None, None) if stored is None else (stored.z, stored.multiplier)
        if self.batch == 0:
            self.numbers = self.mode.start_epoch(self.net, self.epoch, x, target, *values)
        if stored is not None and coming is not None:
            self.store.prefetch(self._rows(coming))
        optimizer = self.optimizer if self._clip_grad_norm is None else None
        for _ in range(self.mode.visits):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                visit = self.mode.visit_(self.net, x, target, *values, optimizer, self.numbers)
            if self._clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), self._clip_grad_norm)
                self.optimizer.step()
            self._sums.add_(len(indices), *visit)
        if stored is not None:
            self.store.scatter(stored)
        self.batch += 1
        self.step += 1

    def end_epoch(self) -> None:
        """Judge the net, put the epoch into the history, and step the learning rate."""
        means = self._sums.means()
        judged = {"validation_loss": math.nan, "validation_accuracy": math.nan}
        if self.validation is not None:
            judged = self._evaluate(self.validation)
        self.history.append(
            **means,
            **judged,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            step_size=self.numbers.step_size,
            rho=self.numbers.rho,
            seconds=time.perf_counter() - self._began,
        )
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(means["loss"] if self.validation is None else judged["validation_loss"])
        elif self.scheduler is not None:
            self.scheduler.step()
        self.epoch += 1
        self._begin_epoch()

    @torch.no_grad()
    def _evaluate(self, batches: Batches) -> dict[str, float]:
        """Mean loss of the net fed forward over the samples, and where there are labels its accuracy, else NaN."""
        was_training = self.net.training
        self.net.eval()
        sums = self._total(_sums_of_outputs(self.net, batches, self.device))
        self.net.train(was_training)
        loss, right, labels = sums
        return {"validation_loss": float(loss / batches.n_samples), "validation_accuracy": float(right / labels)}

    def _total(self, sums: Tensor) -> Tensor:
        """Sums over the samples of all processes, from those of this one."""
        return sums

    # -----------------------------------------------------------------------------------------------------------------
    # From one process to the next
    # -----------------------------------------------------------------------------------------------------------------

    def save(self, checkpoints: Checkpoints) -> None:
        checkpoints.save(self.step, self.state_dict())

    def resume(self, checkpoints: Checkpoints) -> bool:
        """Go on from the last checkpoint; whether there was one. Its file is mapped into memory in here and no longer,
        so that its space on the disk is free when it is removed."""
        state = checkpoints.load()
        if state is not None:
            self.load_state_dict(state)
        return state is not None

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and the history. Tensors are not copied."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "store": None if self.store is None else self.store.state_dict(),
            "random": random_state(),
            **self._progress(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run with the same net, optimizer, scheduler, mode, data, batch size and seed.

        Raises ValueError with both values where the two differ.
        """
        self._check_progress(state)
        _check_presence("store", state["store"], self.store)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # or it keeps the tensors that it is given
        self.optimizer._opt_called = True  # or torch's schedules warn that step() was not called before theirs
        if self.store is not None:
            self.store.load_state_dict(state["store"])
        self._load_progress(state)
        set_random_state(state["random"])

    def _progress(self) -> dict[str, Any]:
        """How far the run has come: the part of its state that is the same in every process."""
        return {
            "order": self._order(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "position": (self.epoch, self.batch, self.step),
            "numbers": tuple(self.numbers),
            "sums": tuple(total.cpu() for total in self._sums),
            "history": self.history.state_dict(),
            "seconds": time.perf_counter() - self._began,
        }

    def _check_progress(self, state: dict[str, Any]) -> None:
        for name, ours in self._order().items():
            if state["order"][name] != ours:
                raise ValueError(f"{name}: the checkpoint has {state['order'][name]}, this run has {ours}")
        _check_presence("scheduler", state["scheduler"], self.scheduler)

    def _load_progress(self, state: dict[str, Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.batch, self.step = state["position"]
        self.numbers = EpochNumbers(*state["numbers"])
        self._sums = EpochSums(*(total.to(self.device, copy=True) for total in state["sums"]))
        self.history = History(**copy.deepcopy(state["history"]))
        self._began = time.perf_counter() - state["seconds"]

    def _order(self) -> dict[str, int]:
        """What the order of the samples depends on."""
        batches = self.batches
        return {"n_samples": batches.n_samples, "batch_size": batches.batch_size, "seed": batches.seed}


def _check_presence(name: str, saved: Any, ours: Any) -> None:
    if (saved is None) != (ours is None):
        theirs = "none" if saved is None else "one"
        raise ValueError(f"{name}: the checkpoint has {theirs}, this run has {ours}")


def _sums_of_outputs(net: DecoupledNetwork, batches: Batches, device: torch.device) -> Tensor:
    """(3,) float64: loss, right answers and labels, summed over the samples of this process."""
    loss, right, labels = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
    for x, target in batches.load(batches.in_order(), device):
        output = net(x)
        if output is None:  # it comes out of another process
            continue
        loss += net.head_loss(output, target)
        if net.criterion is not None:
            counts = target.to(torch.int64) != net.criterion.ignore_index
            right += ((output.argmax(1) == target) & counts).sum()
            labels += counts.sum()
    return torch.stack([loss, right, labels])
