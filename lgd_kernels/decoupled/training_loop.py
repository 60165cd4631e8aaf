"""The training loop, for decoupled nets and for backpropagation as their baseline."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lgd_kernels.arguments import check_at_least, check_bool, check_int, check_number
from lgd_kernels.decoupled.checkpoint import Checkpoints
from lgd_kernels.decoupled.data import Batches, Data
from lgd_kernels.decoupled.history import History
from lgd_kernels.decoupled.modes import Mode, StoredValues
from lgd_kernels.decoupled.network import DecoupledNetwork
from lgd_kernels.decoupled.store import ActivationStore
from lgd_kernels.decoupled.training import Training

if TYPE_CHECKING:
    from lgd_kernels.decoupled.distributed import DistributedNetwork
    from lgd_kernels.decoupled.sharded_checkpoint import ShardedCheckpoints


class Callback:
    """What `fit` calls while it trains. Derive from it, and override what is of interest.

    It may look at everything and change the learning rate; what it keeps itself is not in the checkpoints.
    """

    def on_batch_end(self, training: Training) -> None:
        """After every visit of a minibatch."""

    def on_epoch_end(self, training: Training) -> None:
        """After every epoch: its numbers are in `training.history`."""


def fit(
    net: DecoupledNetwork | DistributedNetwork,
    data: Data,
    *,
    epochs: int,
    optimizer: Optimizer,
    mode: Mode | None = None,
    scheduler: LRScheduler | None = None,
    validation: Data | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    store: ActivationStore | None = None,
    clip_grad_norm: float | None = None,
    autocast: bool = False,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike | Checkpoints | ShardedCheckpoints | None = None,
    resume: bool = False,
    log: Any = None,
    progress: bool = True,
) -> History:
    """Train a net, and return what happened in every epoch.

        net = lgd.DecoupledNetwork(residual_net(64, 64, 31, 10))
        optimizer = torch.optim.Adam(parameter_groups(net, lr=1e-2))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        history = lgd.fit(net, (x, labels), epochs=60, optimizer=optimizer, scheduler=scheduler,
                          validation=(test_x, test_labels), checkpoint="runs/digits", resume=True)

    At first the hidden values of all samples are those of the net fed forward, moved by the mode's burn-in. At the
    beginning of every epoch the mode measures the curvature for its first minibatch, which sets the step of z.

    A `DistributedNetwork` is trained by all ranks together, each of which calls `fit` with the same arguments: all of
    the data, of which it loads its shard, and the optimizer of its own parameters. What is trained and returned is that
    of one process, but for the rounding of sums, and for the seconds, which each rank counts by itself. Callbacks are
    called on every rank, and must decide the same everywhere; rank 0 shows the bar and writes the log. Samples that are
    not shuffled make minibatches of one shard alone, for which the other shards' ranks wait.

    Args:
        net: on the device where it is to be trained.
        data: (x, target), tensors with a row for every sample; a map-style Dataset of such pairs; or a DataLoader of
            one, whose batch size, `shuffle`, `drop_last`, workers and `collate_fn` are kept. An epoch's order of
            samples depends on `seed` and the epoch alone.
        epochs: to train in all, those before a resume included.
        optimizer: of the net's parameters. Its step is fused with a visit where `DecoupledNetwork.visit_` can.
        mode: `StoredValues()`, the default; `StoredValues(multipliers=False)`, `ReinitializedValues()` or
            `Backpropagation()`, the last one not for a DistributedNetwork.
        scheduler: of the optimizer's learning rate; its `step` is called after every epoch, for ReduceLROnPlateau with
            the loss that `patience` watches.
        validation: like data; the net fed forward is judged by it after every epoch.
        batch_size: of tensors and Datasets, 64 if None. A DataLoader has its own.
        seed: of the order of the samples.
        store: where the hidden values are kept if not on the device in the dtype of the net; see `ActivationStore`.
            What is in it is overwritten. Of a DistributedNetwork: those of its rank, of the shard's samples.
        clip_grad_norm: the largest norm of the gradient of all parameters together. It keeps the optimizer's step from
            being fused. Not for a DistributedNetwork.
        autocast: mixed precision: layers that do not go to the fused ops run under torch.autocast in bfloat16. Not for
            a DistributedNetwork.
        patience: stop after so many epochs without a smaller validation loss (without validation: training loss).
        callbacks: see `Callback`.
        checkpoint: a folder, or `Checkpoints` for how often and how many. A folder gets one after every epoch, and the
            last two are kept. One is written before the first step as well. Of a DistributedNetwork: a folder that all
            ranks see, or `ShardedCheckpoints`; there is none before the first step.
        resume: go on from the last checkpoint in the folder, if there is one, with the numbers that the uninterrupted
            run would have had: on a CPU bit for bit. Net, optimizer, scheduler and store must be made as they were, and
            are then overwritten. Randomness in a Dataset is repeated only if it comes from torch's default generator,
            without worker processes. A DistributedNetwork may go on with another mesh than before; the numbers are then
            those of the uninterrupted run but for the rounding of sums, and no randomness is repeated.
        log: the path of a CSV file, or a torch.utils.tensorboard.SummaryWriter. Written after every epoch.
        progress: show a bar.

    Raises:
        TypeError, ValueError, IndexError: arguments that are wrong or do not fit each other; checkpoints that are in
            the folder without resume, or of other data.
        RuntimeError: of a DistributedNetwork: a rank is dead; a checkpoint of another net.
    """
    mode = StoredValues() if mode is None else mode
    kind_of_training = _kind_of_training(net)
    _check_kinds({"optimizer": (optimizer, Optimizer), "mode": (mode, Mode)})
    _check_numbers(epochs, seed, clip_grad_norm, patience)
    for name, value in {"autocast": autocast, "resume": resume, "progress": progress}.items():
        check_bool(name, value)
    _check_log(log)
    checkpoints = _checkpoints(checkpoint, resume, kind_of_training.kind_of_checkpoints)
    is_validated = validation is not None
    training = kind_of_training(
        net,
        optimizer,
        mode,
        Batches(data, batch_size, seed=seed),
        validation=Batches(validation, None, seed=seed, name="validation") if is_validated else None,
        scheduler=scheduler,
        store=store,
        clip_grad_norm=clip_grad_norm,
        autocast=autocast,
    )
    progress = progress and training.reports
    if not (resume and training.resume(checkpoints)):
        _begin(training, checkpoints, progress)
    with _bar(progress, "training", epochs * len(training.batches), training.step) as bar:
        while not _is_over(training, epochs, patience, is_validated):
            for _ in training.visits():
                for callback in callbacks:
                    callback.on_batch_end(training)
                if checkpoints is not None and checkpoints.every and training.step % checkpoints.every == 0:
                    training.save(checkpoints)
                bar.update()
            training.end_epoch()
            for callback in callbacks:
                callback.on_epoch_end(training)
            if training.reports:
                _write(log, training.history)
            bar.set_postfix_str(_summary(training.history, is_validated))
            is_last = _is_over(training, epochs, patience, is_validated)
            if checkpoints is not None and (checkpoints.every is None or is_last):
                training.save(checkpoints)
    return training.history


def _begin(training: Training, checkpoints: Checkpoints | None, progress: bool) -> None:
    """Set the hidden values of all samples."""
    with _bar(progress, "hidden values", len(training.batches.in_order())) as bar:
        for _ in training.initialize_values():
            bar.update()
    if checkpoints is not None:
        training.save(checkpoints)


def _watched(history: History, is_validated: bool) -> list[float]:
    """The loss of every epoch that decides when to stop; where there is no number, infinity."""
    losses = history.validation_loss if is_validated else history.loss
    return [math.inf if math.isnan(loss) else loss for loss in losses]


def _is_over(training: Training, epochs: int, patience: int | None, is_validated: bool) -> bool:
    if training.stop or training.epoch >= epochs:
        return True
    losses = _watched(training.history, is_validated)
    return patience is not None and len(losses) > 0 and len(losses) - 1 - losses.index(min(losses)) >= patience


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees
# ---------------------------------------------------------------------------------------------------------------------


def _bar(shown: bool, description: str, total: int, initial: int = 0) -> Any:
    """A bar over minibatches; without tqdm where none is to be shown."""
    if not shown:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: the bar needs tqdm; install it, or pass progress=False") from error
    return tqdm(total=total, initial=initial, desc=description, unit="batch")


class _NoBar(contextlib.AbstractContextManager):
    def update(self) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


def _summary(history: History, is_validated: bool) -> str:
    row = history.row(-1)
    names = ("loss", "validation_loss", "validation_accuracy") if is_validated else ("loss",)
    return ", ".join(f"{name.replace('_', ' ')} {row[name]:.4g}" for name in names if not math.isnan(row[name]))


def _write(log: Any, history: History) -> None:
    """The epochs so far into a CSV file, or the last one into TensorBoard."""
    if isinstance(log, (str, os.PathLike)):
        history.save_csv(log)
    elif log is not None:
        epoch = len(history) - 1
        for name, value in history.row(epoch).items():
            if not math.isnan(value):
                log.add_scalar(name, value, epoch)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _kind_of_training(net: Any) -> type[Training]:
    if isinstance(net, DecoupledNetwork):
        return Training
    if torch.distributed.is_available():
        from lgd_kernels.decoupled import distributed_training  # takes its time, so that only who needs it waits

        if isinstance(net, distributed_training.DistributedNetwork):
            return distributed_training.DistributedTraining
    kind = f"{DecoupledNetwork.__module__}.{DecoupledNetwork.__name__}"
    raise TypeError(f"net: expected {kind} or a DistributedNetwork, got {type(net).__name__}")


def _check_kinds(arguments: dict[str, tuple[Any, type]]) -> None:
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__module__}.{kind.__name__}, got {type(value).__name__}")


def _check_numbers(epochs: int, seed: int, clip_grad_norm: float | None, patience: int | None) -> None:
    check_int("seed", seed)
    check_at_least("epochs", epochs, 0)
    check_at_least("patience", 1 if patience is None else patience, 1)
    if clip_grad_norm is not None:
        check_number("clip_grad_norm", clip_grad_norm)
        if clip_grad_norm <= 0:
            raise ValueError(f"clip_grad_norm: must be positive, got {clip_grad_norm}")


def _check_log(log: Any) -> None:
    if isinstance(log, (str, os.PathLike)):
        if not Path(log).parent.is_dir():
            raise ValueError(f"log: there is no folder {Path(log).parent} for {os.fspath(log)!r}")
    elif log is not None and not hasattr(log, "add_scalar"):
        raise TypeError(f"log: expected a path or a SummaryWriter, got {type(log).__name__}")


def _checkpoints(checkpoint: Any, resume: bool, kind: type) -> Checkpoints | ShardedCheckpoints | None:
    if checkpoint is None:
        if resume:
            raise ValueError("resume: needs checkpoint, the folder to resume from; got None")
        return None
    if not isinstance(checkpoint, (str, os.PathLike, kind)):
        raise TypeError(f"checkpoint: expected a folder or {kind.__name__}, got {type(checkpoint).__name__}")
    checkpoints = checkpoint if isinstance(checkpoint, kind) else kind(checkpoint)
    steps = checkpoints.steps()
    if steps and not resume:
        raise ValueError(
            f"checkpoint: {checkpoints.folder} has a checkpoint of step {steps[-1]} already; pass resume=True to go on "
            "from it, or another folder"
        )
    return checkpoints
