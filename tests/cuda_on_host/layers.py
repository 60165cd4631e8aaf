"""The CUDA kernels over layers on a CPU: answers for their ops, on CPU tensors. What the glue of a CUDA build does, it
does here in Python."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from cuda_on_host import DTYPES
from lgd_kernels.reference import accumulation_dtype


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int8), ("stride", ctypes.c_int64)]


class _LayerOptions(ctypes.Structure):
    _fields_ = [
        ("activation", ctypes.c_int64),
        *[(name, ctypes.c_double) for name in ("rho", "skip", "branch_scale", "dual_step")],
    ]


class _HiddenLoss(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int64), ("kappa", ctypes.c_double)]


class _ResidualIo(ctypes.Structure):
    _names = ("target", "multiplier", "skip_input", "new_multiplier", "residual", "delta", "q")
    _fields_ = [(name, _Matrix) for name in _names]


class _ResidualLayer(ctypes.Structure):
    _fields_ = [
        ("n_samples", ctypes.c_int64),
        ("n_units", ctypes.c_int64),
        ("logits", _Matrix),
        ("io", _ResidualIo),
        ("options", _LayerOptions),
    ]


class _LinearLayer(ctypes.Structure):
    _fields_ = [
        ("n_samples", ctypes.c_int64),
        ("d_in", ctypes.c_int),
        ("d_out", ctypes.c_int),
        ("preactivation", ctypes.c_bool),
        ("options", _LayerOptions),
        ("z", _Matrix),
        ("weight", _Matrix),
        ("bias", _Matrix),
    ]


class _DecoupledLinearLayer(ctypes.Structure):
    _fields_ = [("linear", _LinearLayer), ("io", _ResidualIo)]


class _DecoupledLinearBackwardLayer(ctypes.Structure):
    _fields_ = [
        ("linear", _LinearLayer),
        ("delta", _Matrix),
        ("q", _Matrix),
        ("upstream", ctypes.c_void_p),
        ("grad_z", _Matrix),
        ("grad_weight", _Matrix),
        ("grad_bias", _Matrix),
    ]


def _matrix(stack: Tensor | None, t: int) -> _Matrix:
    """Layer t of a stack (T, n, d) whose rows are contiguous."""
    if stack is None:
        return _Matrix()
    return _Matrix(stack[t].data_ptr(), DTYPES.index(stack.dtype), stack.stride(-2) if stack.dim() > 2 else 0)


def _rows(x: Tensor | None) -> Tensor | None:
    """x with the elements of a row side by side."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _as_stack(x: Tensor | None, z: Tensor) -> Tensor | None:
    """x, of a single layer or of a stack as z is, as a stack with contiguous rows."""
    return x if x is None else _rows(x.unsqueeze(0) if z.dim() == 2 else x)


def _linear_layer(
    z: Tensor, weight: Tensor, bias: Tensor | None, t: int, options: _LayerOptions, preactivation: bool
) -> _LinearLayer:
    shape = (*z.shape[1:], weight.shape[1])
    return _LinearLayer(*shape, preactivation, options, *(_matrix(x, t) for x in (z, weight, bias)))


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


class LayerKernels:
    """The ops, answered by the kernels in `library`."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.take_failure.restype = ctypes.c_char_p
        for name in ("local_residual_tiles", "decoupled_linear_tiles", "decoupled_linear_backward_parts"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.tf32 = False

    def cut(self, function: str, *shape: int | bool) -> tuple[int, ...]:
        """The numbers of `forward_cut`, `backward_cut` or `residual_cut`, in the order of the struct in csrc/cuda."""
        numbers = (ctypes.c_int64 * 10)(*[-1] * 10)
        getattr(self.library, function)(ctypes.c_int64(shape[0]), *shape[1:], numbers)
        return tuple(number for number in numbers if number != -1)

    def take_launches(self) -> int:
        """How many kernels were started since the last call."""
        return self.library.take_launches()

    def run_in_reverse(self, reverse: bool) -> None:
        self.library.run_in_reverse(reverse)

    def local_residual(
        self, logits, target, multiplier, skip_input, activation, hidden_loss, kappa, rho, skip, dual_step,
        need_residual, need_gradient,
    ):  # fmt: skip
        T, n, d = logits.shape
        inputs = [_rows(x) for x in (target, multiplier, skip_input)]
        wanted = (need_residual, need_gradient, need_gradient)
        made = [torch.empty(logits.shape, dtype=logits.dtype) if want else None for want in wanted]
        logits = _rows(logits)
        layers = (_ResidualLayer * T)()
        for t in range(T):
            of_io = (*inputs, None, *made)
            io = _ResidualIo(*(_matrix(x, t) for x in of_io))
            options = _LayerOptions(activation[t], rho[t], skip[t], 1.0, dual_step[t])
            layers[t] = _ResidualLayer(n, d, _matrix(logits, t), io, options)
        energy = torch.empty(T, dtype=accumulation_dtype(logits.dtype))
        T = ctypes.c_int64(T)
        tile_energy = torch.empty(self.library.local_residual_tiles(layers, T), dtype=torch.float64)
        loss, in_double = _HiddenLoss(hidden_loss, kappa), logits.dtype == torch.float64
        outputs = (_pointer(energy), _pointer(tile_energy))
        self._check("local_residual", self.library.local_residual(layers, T, ctypes.byref(loss), in_double, *outputs))
        return energy, *(logits.new_empty(0) if x is None else x for x in made)

    def decoupled_linear(
        self, z, weight, bias, target, multiplier, activation, preactivation, hidden_loss, kappa, rho, skip,
        branch_scale, dual_step, need_residual, need_gradient,
    ):  # fmt: skip
        made = ([], [], [])
        kept, layers = [], []
        for i, (x, w, b, y, lambda_) in enumerate(zip(z, weight, bias, target, multiplier, strict=True)):
            wanted = (need_residual[i], need_gradient[i], need_gradient[i])
            outputs = [torch.empty(y.shape, dtype=x.dtype) if want else None for want in wanted]
            for stacks, output in zip(made, outputs, strict=True):
                stacks.append(x.new_empty(0) if output is None else output)
            x, w, b, y, lambda_, *outputs = (_as_stack(tensor, x) for tensor in (x, w, b, y, lambda_, *outputs))
            kept += [x, w, b, y, lambda_]
            for t in range(len(x)):
                options = _LayerOptions(*(of[len(layers)] for of in (activation, rho, skip, branch_scale, dual_step)))
                io = _ResidualIo(*(_matrix(of, t) for of in (y, lambda_, x, None, *outputs)))
                layers.append(_DecoupledLinearLayer(_linear_layer(x, w, b, t, options, preactivation), io))
        energy = torch.empty(len(layers), dtype=accumulation_dtype(z[0].dtype))
        loss = _HiddenLoss(hidden_loss, kappa)
        call = ((_DecoupledLinearLayer * len(layers))(*layers), ctypes.c_int64(len(layers)))
        how = (energy.dtype == torch.float64, self.tf32)
        tile_energy = torch.empty(self.library.decoupled_linear_tiles(*call, *how), dtype=torch.float64)
        outputs = (_pointer(energy), _pointer(tile_energy))
        status = self.library.decoupled_linear(*call, ctypes.byref(loss), *how, *outputs)
        self._check("decoupled_linear", status)
        return energy, *made

    def decoupled_linear_backward(
        self, z, weight, e, delta, q, grad_energy, activation, preactivation, skip, branch_scale, need_z, need_weight,
        need_bias, need_target, need_multiplier,
    ):  # fmt: skip
        made = ([], [], [], [], [])
        kept, layers = [], []
        dtype = accumulation_dtype(z[0].dtype)
        for i, (x, w, d, pull) in enumerate(zip(z, weight, delta, q, strict=True)):
            wanted = (need_z[i], need_weight[i], need_bias[i])
            like = ((x.shape, x.dtype), (w.shape, w.dtype), (w.shape[:-1], w.dtype))
            outputs = [
                torch.empty(shape, dtype=of) if want else None for (shape, of), want in zip(like, wanted, strict=True)
            ]
            single, first = x.dim() == 2, len(layers)
            for stacks, output in zip(made, outputs, strict=False):
                stacks.append(x.new_empty(0) if output is None else output)
            factors = None if grad_energy is None else grad_energy[first : first + (1 if single else len(x))].to(dtype)
            for stacks, of, want in ((made[3], pull, need_target[i]), (made[4], e[i], need_multiplier[i])):
                if want:
                    scale = 1.0 if factors is None else factors if single else factors[:, None, None]
                    stacks.append((of * scale).to(x.dtype))
                else:
                    stacks.append(x.new_empty(0))
            if not any(wanted):
                layers += [None] * (1 if single else len(x))
                continue
            pull = pull if need_z[i] else None
            x, w, d, pull, *outputs = (_as_stack(tensor, x) for tensor in (x, w, d, pull, *outputs))
            kept += [x, w, d, pull, factors]
            for t in range(len(x)):
                of_layer = (of[len(layers)] for of in (activation, skip, branch_scale))
                code, c, scale = of_layer
                linear = _linear_layer(x, w, None, t, _LayerOptions(code, 1.0, c, scale, 0.0), preactivation)
                of_z, of_weight, of_bias = outputs
                layers.append(
                    _DecoupledLinearBackwardLayer(
                        linear,
                        _matrix(d, t),
                        _matrix(pull, t),
                        None if factors is None else factors[t].data_ptr(),
                        _matrix(of_z, t),
                        _matrix(of_weight, t),
                        _matrix(of_bias, t),
                    )
                )
        layers = [layer for layer in layers if layer is not None]
        call = ((_DecoupledLinearBackwardLayer * len(layers))(*layers), ctypes.c_int64(len(layers)))
        how = (dtype == torch.float64, self.tf32)
        parts = torch.empty(self.library.decoupled_linear_backward_parts(*call, *how), dtype=dtype)
        status = self.library.decoupled_linear_backward(*call, *how, _pointer(parts))
        self._check("decoupled_linear_backward", status)
        return made

    def _check(self, function: str, status: int) -> None:
        failure = self.library.take_failure().decode()
        assert not failure, failure
        assert status == 0, f"{function}: status {status}"
