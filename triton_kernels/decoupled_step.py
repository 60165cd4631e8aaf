"""decoupled_step_ in Triton: one visit of a minibatch, in a number of launches that does not depend on the depth.

`decoupled_step_` has the signature and the results of `reference/decoupled_step.py`, which says what it computes. Each
pass over the layers is a launch for all layers of one shape and activation (linear_kernels.py):

    forward              the step of lambda, q and delta are in the epilogue; raw logits are stored for a softmax alone
    input gradient       the step of z is in the epilogue
    parameter gradients  the optimizer's step is in the epilogue

Where linear_library.py says so, a product is the library's, and the epilogue a launch of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear_library
from .activations import SQUARED
from .layers import (
    LayerList,
    LayerNumbers,
    Layers,
    ResidualIo,
    accumulation_dtype,
    grouped,
    numbers_of_layers,
    stack_layers,
    sum_energy,
    table,
    workspace,
)
from .linear_launches import (
    Sizes,
    launch_bias_gradient,
    launch_forward,
    launch_input_gradient,
    launch_weight_gradient,
    phi_and_f,
)
from .linear_tiles import Arithmetic, arithmetic
from .operands import store_operands
from .softmax_infogain import softmax_infogain
from .update_rules import RULES, UPDATE_NUMBERS, Hidden, Parameters, adam, move_hidden, sgd

OPS = ("decoupled_step_",)


def rounded(layers: LayerList, like: Tensor, how: Arithmetic) -> LayerList:
    """The layers as products read them: rounded once for all products of a visit."""
    shapes = [layers.shape(t) for t in range(len(layers))]
    to = workspace(like, shapes, how.rounded)
    for chosen in grouped([(layers.key(t), shapes[t]) for t in range(len(layers))]):
        store_operands(layers.choose(chosen), to.choose(chosen), len(chosen), how)
    return to


@dataclass(frozen=True)
class Optimized:
    """Parameters with what their optimizer keeps, layer by layer."""

    value: LayerList
    first: LayerList
    second: LayerList
    numbers: Tensor  # (S, UPDATE_NUMBERS) float64
    first_row: int  # of `numbers` that is about these parameters

    def key(self, t: int) -> tuple:
        return self.value.key(t), self.first.key(t), self.second.key(t)

    def choose(self, chosen: Sequence[int]) -> Parameters | None:
        if not self.value:
            return None
        places = tuple(self.first_row + self.value.places[t][0] for t in chosen)
        lists = (layers.choose(chosen) for layers in (self.value, self.first, self.second))
        return Parameters(*lists, self.numbers, table(places, torch.int64, self.numbers.device))


@dataclass(frozen=True)
class Net:
    """What all passes of a visit have in common. What belongs to hidden values has an entry less than there are layers:
    entry t is of the target of layer t."""

    inputs: LayerList  # x, z_1, ..
    z: LayerList
    multiplier: LayerList
    velocity: LayerList
    residual: LayerList
    weight: Optimized
    bias: Optimized
    products: LayerList  # the weights as the products read them
    delta: LayerList
    q: LayerList
    activation: Sequence[int]
    preactivation: bool
    hidden_loss: int
    numbers: Sequence[LayerNumbers]
    how: Arithmetic

    @property
    def last(self) -> int:
        return len(self.activation) - 1

    @property
    def x(self) -> Tensor:
        return self.inputs.stacks[0][0]

    def sizes(self, chosen: Sequence[int]) -> Sizes:
        d_out, d_in = self.products.shape(chosen[0])
        return Sizes(len(chosen), len(self.x), d_in, d_out)

    def groups(self, layers: Sequence[int], *keys: Callable[[int], Hashable]) -> list[tuple[int, ...]]:
        """The layers, in groups that one launch can take: of one activation, and with equal keys; where the library
        multiplies, from one stack of inputs."""
        of_all = (self.activation.__getitem__, self.inputs.key, self.products.key, self.stack_for_library, *keys)
        return [tuple(layers[i] for i in g) for g in grouped([tuple(key(t) for key in of_all) for t in layers])]

    def phi_and_f(self, chosen: Sequence[int]) -> tuple[int, int]:
        return phi_and_f(self.activation[chosen[0]], self.preactivation)

    def stack_for_library(self, t: int) -> int | None:
        return self.inputs.places[t][0] if linear_library.takes_library(self.sizes([t]), self.how.precision) else None

    def for_library(self, chosen: Sequence[int], *lists: LayerList) -> tuple[Tensor, ...] | None:
        """The chosen layers of the lists as tensors (L, ..), where the library is to multiply them and can."""
        if not linear_library.takes_library(self.sizes(chosen), self.how.precision):
            return None
        batches = tuple(layers.batch(chosen) for layers in lists)
        return None if any(batch is None for batch in batches) else batches

    def if_skip(self, chosen: Sequence[int], layers: LayerList) -> Layers | None:
        return layers.choose(chosen) if any(self.numbers[t].skip for t in chosen) else None

    # -- forward ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def hidden_groups(self) -> list[tuple[int, ...]]:
        lists = (self.z, self.bias, self.multiplier, self.residual)
        return self.groups(range(self.last), *(of.key for of in lists))

    def forward(self, dual_step: float, energy: Tensor | None) -> None:
        """delta and q of the hidden layers, and the step of their multipliers; with `energy` also energies and e."""
        for chosen in self.hidden_groups:
            io = ResidualIo(
                target=self.z.choose(chosen),
                multiplier=self.multiplier.choose(chosen),
                skip_input=self.if_skip(chosen, self.inputs),
                residual=None if energy is None else self.residual.choose(chosen),
                delta=self.delta.choose(chosen),
                q=self.q.choose(chosen),
                updated=self.multiplier.choose(chosen) if dual_step else None,
            )
            self._launch_forward(chosen, io, dual_step, self.hidden_loss, energy)

    def _launch_forward(
        self, chosen: tuple[int, ...], io: ResidualIo, dual_step: float, hidden_loss: int, energy: Tensor | None
    ) -> None:
        bias, numbers = self.bias.value.choose(chosen), [self.numbers[t]._replace(dual_step=dual_step) for t in chosen]
        rest = (bias, io, numbers, self.how, *self.phi_and_f(chosen), hidden_loss)
        if batches := self.for_library(chosen, self.inputs, self.products):
            partial = linear_library.launch_forward(*batches, *rest)
        else:
            operands = (self.inputs.operand(chosen), self.products.operand(chosen))
            partial = launch_forward(self.sizes(chosen), *operands, *rest)
        if energy is not None:
            sum_energy(partial, energy, chosen)

    def forward_to_squared(self, target: Tensor, energy: Tensor | None) -> None:
        """delta and q of the last layer, for half of the squared distance of its output to the target."""
        chosen = (self.last,)
        io = ResidualIo(
            target=stack_layers(target.unsqueeze(0), (0,)),
            skip_input=self.if_skip(chosen, self.inputs),
            delta=self.delta.choose(chosen),
            q=self.q.choose(chosen),
        )
        self._launch_forward(chosen, io, 0.0, SQUARED.value, energy)

    def forward_to_softmax(self, head: SoftmaxHead, energy: Tensor | None) -> None:
        """delta of the last layer, for the loss of its raw logits."""
        chosen, (n_samples, n_classes) = (self.last,), self.delta.shape(self.last)
        logits = self.x.new_empty(1, n_samples, n_classes, dtype=self.how.accumulate)
        self._launch_forward(chosen, ResidualIo(logits=stack_layers(logits, (0,))), 0.0, SQUARED.value, None)
        rows = (logits.view(n_samples, n_classes, 1), head.labels.unsqueeze(1), *head.parts, head.ignore_index, 0.0)
        loss, _, gradient, _ = softmax_infogain(*rows, logits.new_ones(n_samples, 1), False, False)
        of_last, position = self.delta.places[self.last]
        self.delta.stacks[of_last][position].copy_(gradient.view(n_samples, n_classes))
        if energy is not None:
            torch.sum(loss.flatten(), 0, out=energy[self.last])

    # -- updates ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def groups_with_hidden_inputs(self) -> list[tuple[int, ...]]:
        return self.groups(range(1, self.last + 1), lambda t: self.velocity.key(t - 1))

    def move_hidden(self) -> None:
        """z -= step_size dE/dz, for all layers at once."""
        for chosen in self.groups_with_hidden_inputs:
            below = [t - 1 for t in chosen]
            numbers, z = [self.numbers[t] for t in chosen], self.inputs.choose(chosen)
            on_device = numbers_of_layers(numbers, self.how.accumulate, self.x.device)
            to = Hidden(z, self.velocity.choose(below), self.q.choose(below), on_device)
            q, rest = self.if_skip(chosen, self.q), (to, numbers, self.how, self.phi_and_f(chosen)[0], move_hidden)
            if batches := self.for_library(chosen, self.delta, self.products):
                linear_library.launch_input_gradient(*batches, z, q, *rest)
            else:
                operands = (z, self.products.operand(chosen), self.delta.operand(chosen))
                launch_input_gradient(self.sizes(chosen), *operands, q, None, *rest)

    def step_of_parameters(self, rule: int) -> None:
        """The optimizer's step with the mean of the gradients over the samples."""
        mean = 1 / len(self.x) if len(self.x) else 0.0
        for chosen in self.groups(range(self.last + 1), self.weight.key, self.bias.key):
            factors = table((mean,) * len(chosen), self.how.accumulate, self.x.device)
            sizes, upstream = self.sizes(chosen), stack_layers(factors, tuple(range(len(chosen))))
            delta, bias = self.delta.operand(chosen), self.bias.choose(chosen)
            to, numbers = self.weight.choose(chosen), [self.numbers[t] for t in chosen]
            rest = (upstream, to, numbers, self.how, self.phi_and_f(chosen)[0], RULES[rule])
            if batches := self.for_library(chosen, self.inputs, self.delta):
                linear_library.launch_weight_gradient(*batches, *rest)
            else:
                launch_weight_gradient(sizes, self.inputs.operand(chosen), delta, *rest)
            if bias is not None:
                launch_bias_gradient(sizes, delta.layers, upstream, bias, self.how, RULES[rule])


class SoftmaxHead(NamedTuple):
    """What softmax_infogain needs besides the logits."""

    labels: Tensor
    parts: tuple[Tensor | None, ...]
    ignore_index: int


def decoupled_step_(
    x: Tensor,
    z: list[Tensor],
    multiplier: list[Tensor],
    velocity: list[Tensor],
    residual: list[Tensor],
    weight: list[Tensor],
    weight_first: list[Tensor],
    weight_second: list[Tensor],
    bias: list[Tensor],
    bias_first: list[Tensor],
    bias_second: list[Tensor],
    target: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    squared_error: bool,
    activation: list[int],
    preactivation: bool,
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    branch_scale: list[float],
    steps: int,
    step_size: float,
    z_momentum: float,
    dual_step: float,
    update_rule: int,
    update_numbers: Tensor,
) -> Tensor:
    """Move z and multiplier, then the parameters; returns the energies (T,) that the parameters' step starts from."""
    accumulate = accumulation_dtype(x.dtype)
    operands = x.dtype if x.dtype == torch.bfloat16 else accumulate
    how = arithmetic(x.dtype, operands)
    of_weight, of_bias = (
        Optimized(*map(LayerList, lists), update_numbers, first_row)
        for lists, first_row in (
            ((weight, weight_first, weight_second), 0),
            ((bias, bias_first, bias_second), len(weight)),
        )
    )
    hidden = [LayerList(stacks) for stacks in (z, multiplier, velocity, residual)]
    _check(x, *hidden, of_weight, of_bias, target, squared_error, update_rule, (activation, rho, skip, branch_scale))
    shapes = [(len(x), of_weight.value.shape(t)[0]) for t in range(len(activation))]
    per_layer = zip(rho, skip, branch_scale, strict=True)
    net = Net(
        LayerList([x.unsqueeze(0), *z]),
        *hidden,
        of_weight,
        of_bias,
        of_weight.value if operands == accumulate else rounded(of_weight.value, x, how),
        workspace(x, shapes, operands),
        workspace(x, shapes, accumulate),
        activation,
        preactivation,
        hidden_loss,
        [LayerNumbers(r, c, s, 0.0, kappa, step_size, z_momentum) for r, c, s in per_layer],
        how,
    )
    energy = x.new_empty(len(activation), dtype=accumulate)
    head = SoftmaxHead(target, (matrix, background, diagonal, crow, col, values), ignore_index)
    for k in range(steps + 1):
        energies = energy if k == steps else None
        net.forward(dual_step if k > 0 and multiplier else 0.0, energies)
        if squared_error:
            net.forward_to_squared(target, energies)
        else:
            net.forward_to_softmax(head, energies)
        if k < steps:
            net.move_hidden()
    net.step_of_parameters(update_rule)
    return energy


def _check(
    x: Tensor,
    z: LayerList,
    multiplier: LayerList,
    velocity: LayerList,
    residual: LayerList,
    weight: Optimized,
    bias: Optimized,
    target: Tensor,
    squared_error: bool,
    rule: int,
    per_layer: Sequence[Sequence],
) -> None:
    """No kernel may read beyond its arguments, whoever calls the op."""
    n_layers = len(weight.value)
    widths = [x.shape[1], *(weight.value.shape(t)[0] for t in range(n_layers))]
    n_first, n_second = (0 if RULES[rule] is sgd else n_layers), (n_layers if RULES[rule] is adam else 0)
    of_weight, of_bias = list(itertools.pairwise(widths)), [(d,) for d in widths[1:]]
    of_weight = [(d_out, d_in) for d_in, d_out in of_weight]
    of_samples = [(len(x), d) for d in widths[1:-1]]
    for name, layers, shapes, optional in (
        ("z", z, of_samples, False),
        ("multiplier", multiplier, of_samples, True),
        ("velocity", velocity, of_samples, True),
        ("residual", residual, of_samples, True),
        ("weight", weight.value, of_weight, False),
        ("weight_first", weight.first, of_weight[:n_first], False),
        ("weight_second", weight.second, of_weight[:n_second], False),
        ("bias", bias.value, of_bias, True),
        ("bias_first", bias.first, of_bias[:n_first], not bias.value),
        ("bias_second", bias.second, of_bias[:n_second], not bias.value),
        ("target", LayerList([target.unsqueeze(0)]), [(len(x), widths[-1])[: 1 + squared_error]], False),
    ):
        given = [tuple(layers.shape(t)) for t in range(len(layers))]
        if given != shapes and not (optional and not given):
            raise ValueError(f"{name}: expected layers of shapes {shapes}, got {given}")
    _, _, skip, _ = per_layer
    if skip and skip[-1] != 0 and not squared_error:
        raise ValueError(f"skip: the last layer's must be 0 for softmax_infogain, got {skip[-1]}")
    for name, numbers in zip(("activation", "rho", "skip", "branch_scale"), per_layer, strict=True):
        if len(numbers) != n_layers:
            raise ValueError(f"{name}: has {len(numbers)} values, but there are {n_layers} layers")
    expected = (len(weight.value.stacks) + len(bias.value.stacks), UPDATE_NUMBERS.value)
    if weight.numbers.shape != expected or weight.numbers.dtype != torch.float64:
        raise ValueError(
            f"update_numbers: expected float64 of shape {expected}, got {weight.numbers.dtype} of shape "
            f"{tuple(weight.numbers.shape)}"
        )
