"""What `fit` does differently for a DistributedNetwork: each rank trains with its shard of every minibatch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lgd_kernels.decoupled.data import Batches
from lgd_kernels.decoupled.distributed import DistributedNetwork
from lgd_kernels.decoupled.modes import Backpropagation, Mode
from lgd_kernels.decoupled.sharded_checkpoint import ShardedCheckpoints
from lgd_kernels.decoupled.training import Training


class DistributedTraining(Training):
    """The state of a run, on one of its ranks. The minibatches and their order are those of one process."""

    kind_of_checkpoints = ShardedCheckpoints

    def __init__(
        self,
        net: DistributedNetwork,
        optimizer: Optimizer,
        mode: Mode,
        batches: Batches,
        *,
        validation: Batches | None,
        clip_grad_norm: float | None,
        autocast: bool,
        **options: Any,
    ):
        supported = {
            "mode": (mode, "one with hidden values", not isinstance(mode, Backpropagation)),
            "clip_grad_norm": (clip_grad_norm, "None", clip_grad_norm is None),
            "autocast": (autocast, "False", not autocast),
        }
        for name, (given, expected, is_supported) in supported.items():
            if not is_supported:
                raise ValueError(f"{name}: for a DistributedNetwork only {expected} is supported, got {given}")
        for part in (batches, validation):
            if part is not None:
                part.shard = net.shard(part.n_samples)
        super().__init__(
            *(net, optimizer, mode, batches),
            validation=validation,
            clip_grad_norm=clip_grad_norm,
            autocast=autocast,
            **options,
        )

    @property
    def reports(self) -> bool:
        return dist.get_rank() == 0

    def _total(self, sums: Tensor) -> Tensor:
        return self.net.total(sums)

    def save(self, checkpoints: ShardedCheckpoints) -> None:
        if self.step > 0:  # to save an optimizer, torch.distributed.checkpoint makes the first step of a fresh one
            checkpoints.save(self.step, self.net, self.optimizer, self.store, self._progress())

    def resume(self, checkpoints: ShardedCheckpoints) -> bool:
        """Go on from the last checkpoint; whether there was one."""
        progress: dict[str, Any] = {}
        if checkpoints.load(self.net, self.optimizer, self.store, progress) is None:
            return False
        self._check_progress(progress)
        self._load_progress(progress)
        return True
