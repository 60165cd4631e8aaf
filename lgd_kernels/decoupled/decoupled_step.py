"""One visit of a minibatch by layer-wise gradient decoupling, in place and in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lgd_kernels import backends, ops
from lgd_kernels.arguments import check_bool, check_int, check_not_negative, one_of
from lgd_kernels.decoupled.memory import check_memory, overlaps_itself
from lgd_kernels.decoupled.optimizer_state import next_step
from lgd_kernels.infogain import Infogain, InfogainParts
from lgd_kernels.losses.checks import (
    activation_codes,
    check_shape,
    check_tensor,
    hidden_loss_code,
    layer_numbers,
    weights_of_energy,
)
from lgd_kernels.losses.softmax_infogain import parts_for
from lgd_kernels.reference import ACTIVATIONS, accumulation_dtype
from lgd_kernels.watchers import is_plain

HEADS = ("softmax_infogain", "squared")
_IDENTITY = ACTIVATIONS.index("identity")

Stacks = Tensor | Sequence[Tensor]


def decoupled_step_(
    x: Tensor,
    z: Stacks,
    weight: Stacks,
    bias: Stacks | None,
    target: Tensor,
    *,
    step_size: float,
    steps: int = 1,
    multiplier: Stacks | None = None,
    dual_step: float | None = None,
    velocity: Stacks | None = None,
    z_momentum: float = 0.0,
    optimizer: Optimizer | None = None,
    head: str = "softmax_infogain",
    H: Infogain | None = None,
    ignore_index: int = -100,
    activation: str | Sequence[str] = "tanh",
    preactivation: bool = False,
    hidden_loss: str = "squared",
    kappa: float = 1.0,
    rho: float | Sequence[float] = 1.0,
    skip: float | Sequence[float] = 0.0,
    branch_scale: float | Sequence[float] = 1.0,
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Stacks]:
    """One visit of a minibatch: moves its hidden values z and multipliers, then the parameters, all of them in place.

    A net of T layers, z_0 = x, and every sample has trainable values z_1 .. z_(T-1) of its own:

        zhat_(t+1) = c z_t + f(a_t),   a_t = s phi(z_t) W_t^T + b_t            t = 0 .. T-1
        E          = sum over samples of  L(target, zhat_T) + sum over t of  rho L_h(e_t) + <lambda_t, e_t>
        e_t        = z_t - zhat_t

    One visit is `steps` times, for all layers at once,

        lambda_t += dual_step e_t   (except in the first of them)
        z_t      -= step_size dE/dz_t

    and then once more lambda_t += dual_step e_t (if steps > 0), and one step of the optimizer with the mean over the
    samples of dE/dW_t and dE/db_t at the final z and lambda. With z_momentum, z_t -= step_size v_t where v_t =
    z_momentum v_t + dE/dz_t. Without multipliers this is the method of auxiliary coordinates (Carreira-Perpinan & Wang
    2014, arXiv:1212.5921), with them the method of multipliers (Taylor et al. 2016, arXiv:1605.02026).

    Args:
        x: (n, d_0); float64, float32, bfloat16 or float16; any strides. With bfloat16 the operands of the products
            (phi(z), W and delta = -q f'(a)) are rounded to it, as under autocast; else they keep their precision. Sums
            are accumulated in float64 for float64 and in float32 otherwise.
        z: the hidden values, (T-1, n, d), or where their widths differ a list of tensors (n, d_t), or (T_i, n, d) for
            runs of equal width. Has the dtype of x. Small steps get lost in 16 bits: on digits, 3 seeds, bfloat16 took
            1.5 points of accuracy without multipliers (93.6 instead of 95.1 %) and 0.2 with them. An `ActivationStore`
            in bfloat16, whose minibatches are visited in float32, took none (95.0 and 97.7 %).
        weight: (T, d_out, d_in), or a list of tensors (d_out, d_in), or (T_i, d_out, d_in) for runs of equal layers;
            float64 for float64 x, else float32.
        bias: (T, d_out), or a list like that of the weights, of (d_out,) or (T_i, d_out); or None.
        target: labels (n,), int64 or uint8, for the head "softmax_infogain"; (n, d_T) in the dtype of x for "squared".
        step_size: of z; 1 / (the largest curvature of E in z) is stable, see `DecoupledNetwork.largest_curvature`.
        steps: of z in this visit; 0 moves only the parameters.
        multiplier: lambda, like z; starts at 0 and belongs to the sample, like z. None: no multipliers.
        dual_step: of the multipliers, if there are any; at most rho is stable. None: half of the smallest rho.
        velocity: v, like z; starts at 0. Needed where z_momentum is not 0.
        z_momentum: in [0, 1).
        optimizer: a torch.optim.SGD, Adam or AdamW that holds the very tensors of weight and bias. The step is fused
            into the computation of the gradients; learning rate, buffers and step counts are the optimizer's own, so
            that schedules and checkpoints work as ever (hooks of its step are not called). None: the gradients are put
            in `.grad`, and weight and bias stay.
        head: the loss of the last layer. "softmax_infogain": `softmax_infogain_loss` of its raw logits with H, summed.
            "squared": half of the squared distance of its output to target.
        H: an `Infogain`; None is cross entropy.
        ignore_index: samples with this label have no loss at the head.
        activation: a name as in `decoupled_linear_loss`, for all hidden layers; the first layer's phi (with
            preactivation) and the last layer's f (without) are then the identity. Or a list of T names.
        preactivation: whether the activation is phi, else it is f.
        hidden_loss, kappa: L_h, as in `decoupled_linear_loss`.
        rho: a number, or one for each of the T-1 hidden values.
        skip: c, a number for all layers but the first and the last, which have none; or a list of T numbers, of which
            the last one must be 0 for the head "softmax_infogain".
        branch_scale: s, a number, or a list of T.
        return_residual: also return the final e_t.

    Returns:
        The energies of the T layers (T,) before the step of the parameters, in float64 for float64 and in float32
        otherwise: sums over the samples; the last one is the loss. With return_residual also the final e_t, like z.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device, value or name; memory that two of
            the tensors share. Nothing has been written then.
        IndexError: a label that is neither a class nor ignore_index (CPU).
    """
    check_tensor("x", x, (2,))
    squared = one_of("head", head, HEADS) == HEADS.index("squared")
    hidden = {
        name: [] if stacks is None and name != "z" else _stacks(name, stacks, 2, x, x.dtype)
        for name, stacks in (("z", z), ("multiplier", multiplier), ("velocity", velocity))
    }
    of_parameters = accumulation_dtype(x.dtype)
    weights = _stacks("weight", weight, 2, x, of_parameters)
    biases = [] if bias is None else _stacks("bias", bias, 1, x, of_parameters)
    shapes = _Shapes(
        x.shape,
        *(
            None if given is None else _shapes(stacks)
            for given, stacks in (
                (z, hidden["z"]),
                (multiplier, hidden["multiplier"]),
                (velocity, hidden["velocity"]),
                (weight, weights),
                (bias, biases),
            )
        ),
    )
    options = _Options(squared, *map(_hashable, (activation, preactivation, rho, skip, branch_scale)))
    check_bool("preactivation", preactivation)
    plan = _plan_of(shapes, options)
    labels, parts = _check_head(x, target, squared, H, plan.n_outputs)
    _check_numbers(steps, step_size, z_momentum, dual_step, ignore_index)
    loss = hidden_loss_code(hidden_loss, kappa)
    check_bool("return_residual", return_residual)
    if z_momentum != 0 and velocity is None:
        raise ValueError(f"velocity: is needed for z_momentum {z_momentum}, got None")
    step = next_step(optimizer, [_listed(weight), [] if bias is None else _listed(bias)])
    written = hidden | {"weight": weights, "bias": biases, "optimizer": [b for of in step.buffers for b in of.all()]}
    check_memory({"x": [x], "target": [target]}, written)

    with torch.no_grad():
        residual = [
            torch.empty(stack.shape, dtype=x.dtype, device=x.device) for stack in hidden["z"] if return_residual
        ]
        of_weight, of_bias = (
            [[_as_stack(buffer, dim) for buffer in of_list] for of_list in buffers]
            for buffers, dim in zip(step.buffers, (2, 1), strict=True)
        )
        changed = [weights, *of_weight, biases, *of_bias]
        involved = [
            x,
            target,
            *(tensor for stacks in written.values() for tensor in stacks),
            *(p for p in parts if p is not None),
        ]
        energies = _op_for(involved)(
            *(x, *hidden.values(), residual, *changed, labels, *parts, ignore_index, squared),
            *(plan.activation, preactivation, loss, float(kappa), *plan.numbers),
            *(steps, step_size, z_momentum, plan.dual_step if dual_step is None else dual_step),
            *(step.rule, step.numbers_on(x.device)),
        )
        step.done()
    moved = [*of_weight, *of_bias] if optimizer is None else changed
    moved = [*moved, *hidden.values()] if steps > 0 else moved
    torch.autograd.graph.increment_version(tensor for stacks in moved for tensor in stacks)
    return (energies, _like(z, residual)) if return_residual else energies


def _op_for(tensors: list[Tensor]) -> Callable[..., Tensor]:
    """The op; where nobody else is concerned, its kernel."""
    kernels = backends.implementation("decoupled_step_", tensors[0].device.type)
    return kernels.decoupled_step_ if kernels is backends.extension and is_plain(tensors) else ops.decoupled_step_


# ---------------------------------------------------------------------------------------------------------------------
# Lists of layers
# ---------------------------------------------------------------------------------------------------------------------


def _listed(stacks: Stacks) -> list[Tensor]:
    return [stacks] if isinstance(stacks, Tensor) else list(stacks)


def _as_stack(tensor: Tensor, dim: int) -> Tensor:
    """A stack of layers of `dim` dimensions; of one layer, if the tensor is that."""
    return tensor.unsqueeze(0) if tensor.dim() == dim else tensor


def _like(given: Stacks, stacks: list[Tensor]) -> Stacks:
    """The stacks in the form in which their like was given."""
    if isinstance(given, Tensor):
        return stacks[0]
    return [stack.view(like.shape) for stack, like in zip(stacks, given, strict=True)]


def _stacks(name: str, value: Stacks, dim: int, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The argument as a list of stacks of layers of `dim` dimensions, of this dtype and on the device of x."""
    if not isinstance(value, (Tensor, list, tuple)):
        raise TypeError(f"{name}: expected a torch.Tensor or a list of them, got {type(value).__name__}")
    if isinstance(value, Tensor):
        check_tensor(name, value, (dim + 1,))
    stacks = []
    for i, tensor in enumerate(_listed(value)):
        of_list = name if isinstance(value, Tensor) else f"{name}[{i}]"
        check_tensor(of_list, tensor, (dim, dim + 1))
        if tensor.device != x.device:
            raise ValueError(f"{of_list}: is on {tensor.device}, but x is on {x.device}")
        if tensor.dtype != dtype:
            raise TypeError(f"{of_list}: has dtype {tensor.dtype}, expected {dtype} for x of dtype {x.dtype}")
        if overlaps_itself(tensor):
            raise ValueError(f"{of_list}: has elements that share their memory (strides {tensor.stride()})")
        stacks.append(_as_stack(tensor, dim))
    return stacks


# ---------------------------------------------------------------------------------------------------------------------
# What follows from shapes and options alone, and is the same in every visit
# ---------------------------------------------------------------------------------------------------------------------


class _Shapes(NamedTuple):
    """Of the stacks of every list; None for what was not given."""

    x: tuple[int, ...]
    z: tuple[tuple[int, ...], ...]
    multiplier: tuple[tuple[int, ...], ...] | None
    velocity: tuple[tuple[int, ...], ...] | None
    weight: tuple[tuple[int, ...], ...]
    bias: tuple[tuple[int, ...], ...] | None


class _Options(NamedTuple):
    """As the caller gave them, with tuples for lists."""

    squared: bool
    activation: str | tuple[str, ...]
    preactivation: bool
    rho: float | tuple[float, ...]
    skip: float | tuple[float, ...]
    branch_scale: float | tuple[float, ...]


class _Plan(NamedTuple):
    n_outputs: int
    activation: list[int]
    numbers: tuple[list[float], list[float], list[float]]  # rho, skip, branch_scale, layer by layer
    dual_step: float  # where none is given


def _shapes(stacks: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(stack.shape for stack in stacks)


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _plan_of(shapes: _Shapes, options: _Options) -> _Plan:
    """The plan, from the memory of earlier visits if it is there: 100 of 200 microseconds for 32 layers."""
    try:
        hash(options)
    except TypeError:  # what has no hash is no valid option: the plan says so in its own words
        return _plan(shapes, options)
    return _remembered_plan(shapes, options)


def _plan(shapes: _Shapes, options: _Options) -> _Plan:
    """The net's widths and the op's options, once all shapes and options fit each other."""
    sizes, T = _sizes(shapes), sum(len_of_stack for len_of_stack, *_ in shapes.weight)
    if shapes.bias is not None:
        _check_layers("bias", shapes.bias, [(d,) for d in sizes[1:]], "for the layers of weight")
    for name in ("z", "multiplier", "velocity"):
        given = getattr(shapes, name)
        if given is not None:
            because = f"for x of shape {tuple(shapes.x)} and {T} layers of weight"
            _check_layers(name, given, [(shapes.x[0], d) for d in sizes[1:-1]], because)
    rhos = weights_of_energy(options.rho, T - 1, "hidden values")
    numbers = ([*rhos, 1.0], _skips(options, sizes), layer_numbers("branch_scale", options.branch_scale, T))
    return _Plan(sizes[-1], _activations(options, T), numbers, 0.5 * min(rhos, default=0.0))


_remembered_plan = functools.lru_cache(maxsize=128)(_plan)


def _check_layers(name: str, stacks: tuple, shapes: list[tuple[int, ...]], because: str) -> None:
    """The layers of the stacks have these shapes."""
    layers = [tuple(shape) for n_layers, *shape in stacks for _ in range(n_layers)]
    if len(layers) != len(shapes):
        raise ValueError(f"{name}: has {len(layers)} layers, but {because} there must be {len(shapes)}")
    for t, (shape, expected) in enumerate(zip(layers, shapes, strict=True)):
        if shape != expected:
            raise ValueError(f"{name}: layer {t} has shape {shape}, but {because} it must be {expected}")


def _sizes(shapes: _Shapes) -> list[int]:
    """The widths d_0 .. d_T of the net."""
    sizes = [shapes.x[1]]
    for n_layers, d_out, d_in in shapes.weight:
        for _ in range(n_layers):
            if d_in != sizes[-1]:
                below = f"layer {len(sizes) - 2} has d_out" if len(sizes) > 1 else "x has"
                raise ValueError(
                    f"weight: layer {len(sizes) - 1} has d_in {d_in} (shape {(d_out, d_in)}), but {below} {sizes[-1]}"
                )
            sizes.append(d_out)
    if len(sizes) == 1:
        raise ValueError("weight: expected at least 1 layer, got none")
    return sizes


def _activations(options: _Options, T: int) -> list[int]:
    """The codes of the layers' activations. A single name leaves out the net's input and its output."""
    codes = activation_codes(options.activation, T)
    if isinstance(options.activation, str):
        codes[0 if options.preactivation else -1] = _IDENTITY
    if not (options.squared or options.preactivation) and codes[-1] != _IDENTITY:
        raise ValueError(
            "activation: the last layer's must be 'identity' for head='softmax_infogain', which takes raw logits, got "
            f"{options.activation[-1]!r}"
        )
    return codes


def _skips(options: _Options, sizes: list[int]) -> list[float]:
    """The skip coefficients of all layers. A single number leaves out the first and the last layer."""
    numbers = layer_numbers("skip", options.skip, len(sizes) - 1)
    if not isinstance(options.skip, tuple):
        numbers[0] = numbers[-1] = 0.0
    for t, c in enumerate(numbers):
        if c != 0 and sizes[t] != sizes[t + 1]:
            raise ValueError(
                f"skip: is {c} for layer {t}, which needs d_in == d_out, got {sizes[t]} and {sizes[t + 1]}"
            )
    if not options.squared and numbers[-1] != 0:
        raise ValueError(
            f"skip: the last layer's must be 0 for head='softmax_infogain', which takes raw logits, got {numbers[-1]}"
        )
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# What may change from visit to visit
# ---------------------------------------------------------------------------------------------------------------------


def _check_head(
    x: Tensor, target: Tensor, squared: bool, H: Infogain | None, n_outputs: int
) -> tuple[Tensor, InfogainParts]:
    """(the target as the op takes it, the parts of H)."""
    if squared:
        if H is not None:
            raise ValueError(f"H: {H!r} needs head='softmax_infogain', got head='squared'")
        check_tensor("target", target, (2,))
        if target.dtype != x.dtype:
            raise TypeError(f"target: has dtype {target.dtype}, but x has dtype {x.dtype}")
        if target.device != x.device:
            raise ValueError(f"target: is on {target.device}, but x is on {x.device}")
        check_shape("target", target, (x.shape[0], n_outputs), f"for x of shape {tuple(x.shape)}")
        return target, InfogainParts()
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"target: dtype must be int64 or uint8 for head='softmax_infogain', got {target.dtype}")
    check_shape("target", target, (x.shape[0],), f"for x of shape {tuple(x.shape)}")
    if target.device != x.device:
        raise ValueError(f"target: is on {target.device}, but x is on {x.device}")
    return target.to(torch.int64), parts_for(H, x.device, n_outputs, f"the last layer has {n_outputs} outputs")


def _check_numbers(steps: int, step_size: float, z_momentum: float, dual_step: float | None, ignore_index: int) -> None:
    check_int("steps", steps)
    check_int("ignore_index", ignore_index)
    numbers = {"steps": steps, "step_size": step_size, "z_momentum": z_momentum, "dual_step": dual_step}
    for name, number in numbers.items():
        if number is not None or name != "dual_step":
            check_not_negative(name, number)
    if z_momentum >= 1:
        raise ValueError(f"z_momentum: must be less than 1, got {z_momentum}")
