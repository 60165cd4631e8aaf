"""The state of a torch.optim optimizer as decoupled_step_ takes it: its buffers, which are made where torch.optim would
make them, and the numbers of its next step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lgd_kernels.decoupled.memory import overlaps_itself
from lgd_kernels.reference import UPDATE_RULES, UpdateNumbers

_SUPPORTED = (SGD, Adam, AdamW)
_UNSUPPORTED = ("nesterov", "amsgrad", "maximize", "dampening")  # options that must be off


class Buffers(NamedTuple):
    """What an update rule keeps for some parameters, each in the parameter's shape; empty for what it does not."""

    first: list[Tensor]
    second: list[Tensor]

    def all(self) -> list[Tensor]:
        return [*self.first, *self.second]


class NextStep(NamedTuple):
    """The next step of an optimizer for lists of parameters. Nothing has changed yet, in the optimizer or in .grad."""

    optimizer: Optimizer | None
    rule: int  # a position in reference.UPDATE_RULES
    buffers: list[Buffers]  # of every list
    numbers: list[float]  # `UpdateNumbers`, parameter by parameter, list by list
    counts: list[tuple[Tensor, int]]  # Adam's numbers of steps, and what they become
    made: list[tuple[Tensor, str, Tensor]]  # (parameter, name, buffer) of the buffers that are new

    def numbers_on(self, device: torch.device) -> Tensor:
        """`UpdateNumbers` of every stack, (stacks, 7) float64, on the device; the host does not wait for the copy."""
        if _numbers_of_graph is not None:
            return _numbers_of_graph
        width = len(UpdateNumbers._fields)
        made = torch.tensor(self.numbers, dtype=torch.float64).view(len(self.numbers) // width, width)
        if device.type != "cuda":
            return made.to(device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "decoupled_step_: a CUDA graph would repeat the numbers of this one step of the optimizer for ever; "
                "capture it by lgd.capture_step"
            )
        return made.pin_memory().to(device, non_blocking=True)

    def addresses(self) -> list[int]:
        """Where the buffers lie."""
        return [buffer.data_ptr() for of_list in self.buffers for buffer in of_list.all()]

    def done(self) -> None:
        """To be called once the step is made."""
        for parameter, name, buffer in self.made:
            if self.optimizer is None:
                parameter.grad = buffer
            else:
                self.optimizer.state[parameter][name] = buffer
        for count, value in self.counts:
            count.fill_(value)
        if self.optimizer is not None:
            self.optimizer._opt_called = True  # or torch's schedules warn that step() was not called before theirs


_numbers_of_graph: Tensor | None = None


@contextlib.contextmanager
def numbers_in(tensor: Tensor) -> Iterator[None]:
    """Within the block `numbers_on` is this tensor: a graph that is captured there reads what will be in it."""
    global _numbers_of_graph
    before, _numbers_of_graph = _numbers_of_graph, tensor
    try:
        yield
    finally:
        _numbers_of_graph = before


def next_step(optimizer: Optimizer | None, parameters: list[list[Tensor]]) -> NextStep:
    """The next step for the parameters, all of which the optimizer must know. Without an optimizer the step is to put
    the gradients in `.grad`.

    Raises TypeError for an optimizer other than torch.optim's SGD, Adam and AdamW, ValueError for an option that is not
    supported or a parameter that it does not know.
    """
    if optimizer is None:
        return _step_to_gradients(parameters)
    if type(optimizer) not in _SUPPORTED:
        raise TypeError(
            f"optimizer: expected torch.optim's SGD, Adam or AdamW, got {type(optimizer).__name__}; for another one "
            "leave it out, and call it on the gradients that are then put in .grad"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    _check_options(optimizer)
    if isinstance(optimizer, SGD):
        return _step_of_sgd(optimizer, groups, parameters)
    return _step_of_adam(optimizer, groups, parameters)


def is_fusable(optimizer: Optimizer, parameters: list[Tensor]) -> bool:
    """Whether `next_step` takes the optimizer for these parameters, and nobody wants to be told of its steps."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    has_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return (
        type(optimizer) in _SUPPORTED
        and not any(group.get(option) for group in optimizer.param_groups for option in _UNSUPPORTED)
        and not has_hooks
        and all(id(p) in known for p in parameters)
    )


def _step_to_gradients(parameters: list[list[Tensor]]) -> NextStep:
    buffers, made = [], []
    for of_list in parameters:
        gradients = []
        for p in of_list:
            gradient = p.grad
            is_like = gradient is not None and (gradient.shape, gradient.dtype) == (p.shape, p.dtype)
            if not is_like or overlaps_itself(gradient):
                gradient = torch.empty_like(p, requires_grad=False)
                made.append((p, "grad", gradient))
            gradients.append(gradient)
        buffers.append(Buffers(gradients, []))
    numbers = [number for of_list in parameters for _ in of_list for number in UpdateNumbers()]
    return NextStep(None, UPDATE_RULES.index("gradient"), buffers, numbers, [], made)


def _check_options(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for option in _UNSUPPORTED:
            if group.get(option):
                raise ValueError(f"optimizer: {option}={group[option]} is not supported, only {option} off")


def _group_of(parameter: Tensor, groups: dict[int, dict]) -> dict:
    if id(parameter) not in groups:
        raise ValueError(
            f"optimizer: does not know a parameter of shape {tuple(parameter.shape)}; its param_groups must hold the "
            "very tensors that weight and bias list"
        )
    return groups[id(parameter)]


def _buffer(optimizer: Optimizer, parameter: Tensor, name: str, made: list) -> Tensor:
    """The optimizer's buffer, or a new one of zeros."""
    buffer = optimizer.state.get(parameter, {}).get(name)
    if buffer is None:
        buffer = torch.zeros_like(parameter, requires_grad=False)
        made.append((parameter, name, buffer))
    if overlaps_itself(buffer):
        raise ValueError(f"optimizer: its {name} has elements that share their memory (strides {buffer.stride()})")
    return buffer


def _step_of_sgd(optimizer: SGD, groups: dict[int, dict], parameters: list[list[Tensor]]) -> NextStep:
    with_momentum = any(group["momentum"] != 0 for group in optimizer.param_groups)
    buffers, numbers, made = [], [], []
    for of_list in parameters:
        first = []
        for p in of_list:
            group = _group_of(p, groups)
            numbers += UpdateNumbers(float(group["lr"]), group["momentum"], l2=group["weight_decay"])
            if with_momentum:
                first.append(_buffer(optimizer, p, "momentum_buffer", made))
        buffers.append(Buffers(first, []))
    return NextStep(optimizer, UPDATE_RULES.index("momentum" if with_momentum else "sgd"), buffers, numbers, [], made)


def _step_of_adam(optimizer: Adam, groups: dict[int, dict], parameters: list[list[Tensor]]) -> NextStep:
    buffers, numbers, counts, made = [], [], [], []
    for of_list in parameters:
        first, second = [], []
        for p in of_list:
            group, count = _group_of(p, groups), optimizer.state.get(p, {}).get("step")
            if count is None:
                count = torch.zeros((), dtype=torch.float32)
                made.append((p, "step", count))
            step = int(count) + 1
            counts.append((count, step))
            numbers += _numbers_of_adam(group, step, isinstance(optimizer, AdamW))
            first.append(_buffer(optimizer, p, "exp_avg", made))
            second.append(_buffer(optimizer, p, "exp_avg_sq", made))
        buffers.append(Buffers(first, second))
    return NextStep(optimizer, UPDATE_RULES.index("adam"), buffers, numbers, counts, made)


def _numbers_of_adam(group: dict, step: int, is_adamw: bool) -> UpdateNumbers:
    lr, decay = float(group["lr"]), group["weight_decay"]
    beta1, beta2 = map(float, group["betas"])
    decoupled = is_adamw or group.get("decoupled_weight_decay", False)
    return UpdateNumbers(
        lr=lr / (1 - beta1**step),
        momentum=beta1,
        second_momentum=beta2,
        epsilon=group["eps"],
        l2=0.0 if decoupled else decay,
        decay=1 - lr * decay if decoupled else 1.0,
        root=(1 - beta2**step) ** 0.5,
    )
