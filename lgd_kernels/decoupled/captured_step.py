"""decoupled_step_ as a CUDA graph: captured once, replayed for every minibatch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lgd_kernels.decoupled import optimizer_state
from lgd_kernels.decoupled.decoupled_step import Stacks, decoupled_step_
from lgd_kernels.decoupled.optimizer_state import NextStep, next_step


def capture_step(*args: Any, **options: Any) -> CapturedStep:
    """`decoupled_step_` for the same tensors again and again: put the next minibatch into them, and call the result.

        step = lgd.capture_step(x, z, weight, bias, target, multiplier=multiplier, step_size=0.1, optimizer=optimizer)
        for rows in batches:
            x.copy_(all_x[rows]), z.copy_(all_z[:, rows]), ...      # in place: the graph reads and writes these tensors
            energies = step()                                       # one visit

    On a CUDA device the first call is an ordinary visit, which compiles the kernels and makes what the optimizer keeps.
    The second one captures a CUDA graph, and every call from then on launches that: one launch for the host instead of
    one for each kernel. On other devices every call is an ordinary visit, with the same results.

    The optimizer's learning rate, step count and so on are read at every call, so that schedules work as ever. All
    other numbers (step_size, rho, ...) are those of the capture: where they change, as from epoch to epoch, capture
    anew.

    Args: those of `decoupled_step_`, all of which stay referenced.

    Returns:
        A function without arguments that returns what `decoupled_step_` does; the next call overwrites it.

    Raises:
        TypeError: an argument that `decoupled_step_` does not have, or lacks. What is wrong with their values, the
        first call raises.
    """
    return CapturedStep(*args, **options)


class CapturedStep:
    """What `capture_step` returns."""

    def __init__(self, *args: Any, **options: Any):
        bound = inspect.signature(decoupled_step_).bind(*args, **options)
        bound.apply_defaults()
        self._arguments = bound.arguments
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self) -> Tensor | tuple[Tensor, Stacks]:
        """One visit of what is in the tensors now."""
        self._calls += 1
        if self._calls == 1 or not self._on_cuda():
            return self._visit()
        self._put_gradients_back()
        step = self._next_step()
        if self._graph is None or step.addresses() != self._addresses:
            self._capture(step)
        else:
            self._numbers.copy_(step.numbers_on(self._numbers.device))
            step.done()
        self._graph.replay()
        torch.autograd.graph.increment_version(self._written(step))
        return self._results

    def _on_cuda(self) -> bool:
        return self._arguments["x"].is_cuda

    def _visit(self) -> Tensor | tuple[Tensor, Stacks]:
        results = decoupled_step_(**self._arguments)
        if self._arguments["optimizer"] is None:
            self._gradients = [p.grad for p in self._listed("weight", "bias")]
        return results

    def _put_gradients_back(self) -> None:
        """A graph writes where the gradients were, whatever `zero_grad` has made of `.grad` since."""
        if self._arguments["optimizer"] is None:
            for p, gradient in zip(self._listed("weight", "bias"), self._gradients, strict=True):
                p.grad = gradient

    def _capture(self, step: NextStep) -> None:
        """Capture a visit; its Python, with what that does to the optimizer's step counts, runs now."""
        self._addresses, self._numbers = step.addresses(), step.numbers_on(self._arguments["x"].device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), optimizer_state.numbers_in(self._numbers):
            self._results = self._visit()

    def _listed(self, *names: str) -> list[Tensor]:
        stacks = (self._arguments[name] for name in names)
        return [tensor for of in stacks for tensor in ([of] if isinstance(of, Tensor) else of or ())]

    def _next_step(self) -> NextStep:
        return next_step(self._arguments["optimizer"], [self._listed("weight"), self._listed("bias")])

    def _written(self, step: NextStep) -> list[Tensor]:
        buffers = [buffer for of_list in step.buffers for buffer in of_list.all()]
        parameters = [] if self._arguments["optimizer"] is None else self._listed("weight", "bias")
        hidden = self._listed("z", "multiplier", "velocity") if self._arguments["steps"] else []
        return [*buffers, *parameters, *hidden]
