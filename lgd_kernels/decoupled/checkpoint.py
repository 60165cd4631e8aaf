"""Checkpoints of a training run: the last few, each there whole or not at all."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from lgd_kernels.arguments import check_at_least
from lgd_kernels.decoupled import files

_NAME = re.compile(r"checkpoint-(\d+)\.pt")


class Checkpoints:
    """The last checkpoints of one training run, in a folder of its own.

        checkpoints = Checkpoints("runs/digits", every=500)
        lgd.fit(net, data, ..., checkpoint=checkpoints, resume=True)

    A checkpoint holds all of the run, the stored hidden values of every sample included, so that it costs the writing
    of as many bytes as the store has, and `keep` + 1 times as many on the disk while one is being written. That is also
    what makes a store on disk safe: a crash leaves its file somewhere between two checkpoints, and to resume means to
    copy the checkpoint's values over it.

    Args:
        folder: is made if it is not there.
        every: the number of optimizer steps from one checkpoint to the next; None: one at the end of every epoch.
        keep: how many are kept.
    """

    def __init__(self, folder: str | os.PathLike, *, every: int | None = None, keep: int = 2):
        check_counts(every=every, keep=keep)
        self.folder, self.every, self.keep = Path(folder), every, keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after this step, then remove all others but the `keep` - 1 before it. There are later ones
        only where a run had to go back to an earlier one.

        Raises TypeError for a state with something other than tensors and plain containers.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files.save(state, self.folder / f"checkpoint-{step:09d}.pt")
        found = self._found()
        last = 1 + [of for of, _ in found].index(step)
        for _, path in found[: max(0, last - self.keep)] + found[last:]:
            path.unlink()

    def load(self) -> dict[str, Any] | None:
        """The state of the latest checkpoint that is intact, on the CPU; None if there is none.

        A damaged one (cut short, or with a wrong checksum) is passed over with a warning.
        """
        for _, path in reversed(self._found()):
            try:
                return files.load(path)
            except ValueError as error:
                warnings.warn(f"{error}; the checkpoint before it is taken", stacklevel=2)
        return None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, oldest first."""
        return [step for step, _ in self._found()]

    def _found(self) -> list[tuple[int, Path]]:
        names = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("checkpoint-*"))
        return sorted((int(match[1]), path) for match, path in names if match)


def check_counts(*, every: int | None, keep: int) -> None:
    """How often checkpoints are written, and how many are kept."""
    for name, value in (("every", 1 if every is None else every), ("keep", keep)):
        check_at_least(name, value, 1)


def random_state() -> dict[str, Any]:
    """The states of torch's generators, of the CPU and of the CUDA devices in use."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": on_cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into these states; a run that was on CUDA may go on without."""
    torch.set_rng_state(state["cpu"].clone())
    if torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(state["cuda"])
