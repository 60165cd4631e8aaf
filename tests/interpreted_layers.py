"""What the Triton kernels of the layer ops promise beyond the other backends, in Triton's interpreter.

Not collected by itself: test_triton_layers.py starts a process for it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from cases import dtype_name

from lgd_kernels import reference
from lgd_kernels.triton_kernels import local_residual as residual_kernels
from lgd_kernels.triton_kernels.activations import activated, hidden_loss

pytestmark = pytest.mark.usefixtures("nan_prefill")
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 0.625, -0.625, 20.0, -20.0)
by_accumulation_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)


@triton.jit
def function_kernel(x, value, slope, n, FUNCTION: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0)
    if FUNCTION == "activation":
        f, df = activated(a, CODE)
    else:
        f, df = hidden_loss(a, 0.5, CODE)
    tl.store(value + i, f, mask=i < n)
    tl.store(slope + i, df, mask=i < n)


def at_special_values(function, code, dtype):
    """(x, f(x), f'(x)) from the kernels."""
    x = torch.cat([torch.tensor(SPECIAL), torch.linspace(-9, 9, 200), torch.linspace(-0.01, 0.01, 20)]).to(dtype)
    value, slope = torch.empty(2, len(x), dtype=dtype)
    function_kernel[(1,)](x, value, slope, len(x), function, code, 256)
    return x, value, slope


def assert_same(got, expected):
    """Up to a few roundings of numbers of that size or of 1."""
    rounding = 16 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected.to(got.dtype), atol=rounding, rtol=rounding, equal_nan=True)


@by_accumulation_dtype
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations(name, dtype):
    code = reference.ACTIVATIONS.index(name)
    x, value, slope = at_special_values("activation", code, dtype)
    assert_same(value, reference.activations.activate(code, x.double()))
    assert_same(slope, reference.activations.activation_derivative(code, x.double()))


@pytest.mark.parametrize("name", ["tanh", "scaled_tanh", "gelu_tanh", "silu"])
def test_small_activations_are_relatively_accurate(name):
    code = reference.ACTIVATIONS.index(name)
    x, value, _ = at_special_values("activation", code, torch.float32)
    expected, small = reference.activations.activate(code, x.double()), x.abs() < 1
    assert ((value - expected).abs() <= 1e-6 * expected.abs())[small].all()


@by_accumulation_dtype
@pytest.mark.parametrize("code", [0, 1])
def test_hidden_losses(code, dtype):
    x, value, slope = at_special_values("hidden_loss", code, dtype)
    assert_same(value, reference.activations.hidden_loss(code, x.double(), 0.5))
    assert_same(slope, reference.activations.hidden_loss_derivative(code, x.double(), 0.5))


def residual_arguments(T, n, d):
    """Of local_residual, with everything given and different for every layer."""
    tensors = torch.randn(4, T, n, d).unbind()
    per_layer = ([0.5 + t for t in range(T)], [0.25 * t for t in range(T)], [t / T for t in range(T)])
    return *tensors, [t % 3 for t in range(T)], 1, 0.7, *per_layer, True, True


def assert_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("shape", [(4, 3, 700), (2, 37, 130), (3, 5000, 1)])
def test_local_residual_in_several_tiles(shape):
    """Contiguous, transposed, and with rows apart."""
    arguments = residual_arguments(*shape)
    expected = reference.local_residual(*arguments)
    assert_close(residual_kernels.local_residual(*arguments), expected)
    transposed = [x.mT.contiguous().mT for x in arguments[:4]]
    assert_close(residual_kernels.local_residual(*transposed, *arguments[4:]), expected)
    padded = torch.nn.functional.pad(arguments[1], (3, 2), value=torch.nan)[..., 3:-2]
    changed = (arguments[0], padded, *arguments[2:])
    assert_close(residual_kernels.local_residual(*changed), expected)


def test_local_residual_with_64_bit_offsets(monkeypatch):
    """The specialization for layers of more than 2^31 elements, on small ones."""
    arguments = residual_arguments(2, 37, 130)
    arguments = (arguments[0].mT.contiguous().mT, *arguments[1:])
    narrow = residual_kernels.local_residual(*arguments)
    monkeypatch.setattr(residual_kernels, "INT32_MAX", 2**20)
    wide = residual_kernels.local_residual(*arguments)
    assert all(map(torch.equal, narrow, wide))


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_no_infinity_times_zero(step):
    """A residual that is infinite, without a multiplier, and a skip of 0 around NaN."""
    logits, target = torch.zeros(2, 1, 3), torch.tensor([float("inf"), 1.0, -2.0]).expand(2, 1, 3)
    arguments = (logits, target, None, torch.full_like(logits, torch.nan), [1, 1], 1, 1.0, [1.0] * 2, [0.0] * 2)
    arguments = (*arguments, [0.0, step], True, True)
    both = zip(residual_kernels.local_residual(*arguments), reference.local_residual(*arguments), strict=True)
    for got, expected in both:
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


def test_local_residual_refuses_wrong_shapes():
    good = residual_arguments(2, 3, 4)
    for i in range(4):
        wrong = [x[:, :2] if i == j else x for j, x in enumerate(good[:4])]
        with pytest.raises(ValueError, match="expected shape"):
            residual_kernels.local_residual(*wrong, *good[4:])
    with pytest.raises(ValueError, match="skip_input"):
        residual_kernels.local_residual(*good[:3], None, *good[4:])
