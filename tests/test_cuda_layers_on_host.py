"""The CUDA kernels over layers, run on this CPU (cuda_on_host), against the equations in extended precision.

Here is a sample of every kernel; `make gates` runs all tests of these ops on them, under sanitizers.
"""

from __future__ import annotations

import pytest
import test_decoupled_linear
import test_local_residual
import torch
from cases import DTYPES, dtype_name
from cuda_on_host.glue_fixtures import answer_with
from cuda_on_host.layers import LayerKernels
from layer_oracle import ACTIVATIONS

from lgd_kernels import ops, reference

pytestmark = pytest.mark.cpu

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(params=["in order", "in reverse"])
def kernels(request, cuda_on_host_library, nan_prefill, monkeypatch) -> LayerKernels:
    """The kernels, whose threads run in either order; they answer for the ops."""
    kernels = LayerKernels(cuda_on_host_library)
    kernels.run_in_reverse(request.param == "in reverse")
    answer_with(kernels, monkeypatch)
    return kernels


# ---------------------------------------------------------------------------------------------------------------------
# local_residual
# ---------------------------------------------------------------------------------------------------------------------


@by_dtype
@by_activation
def test_every_activation_of_local_residual(kernels, activation, dtype):
    tensors = test_local_residual.make(3, 5, 7, dtype)
    hidden_loss = "huber" if ACTIVATIONS.index(activation) % 2 else "squared"
    test_local_residual.check(tensors, activation=activation, hidden_loss=hidden_loss, kappa=0.7, rho=0.8, skip=1.0)


def residual_arguments(T, n, d, dtype=torch.float32):
    """Of local_residual, with everything given and different for every layer."""
    tensors = torch.randn(4, T, n, d, dtype=torch.float64).to(dtype).unbind()
    per_layer = ([0.5 + t for t in range(T)], [0.25 * t for t in range(T)], [t / T for t in range(T)])
    return *tensors, [t % len(ACTIVATIONS) for t in range(T)], 1, 0.7, *per_layer, True, True


def assert_as_reference(kernels, arguments):
    expected = reference.local_residual(*arguments)
    for got, wanted in zip(kernels.local_residual(*arguments), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@by_dtype
@pytest.mark.parametrize("shape", [(2, 3, 700), (1, 37, 130), (2, 2100, 1), (1, 70, 64)], ids=str)
def test_local_residual_of_several_blocks(kernels, shape, dtype):
    """Contiguous; and in rows that begin at any alignment, between values that nobody may read."""
    arguments = residual_arguments(*shape, dtype)
    assert_as_reference(kernels, arguments)
    apart = torch.nn.functional.pad(arguments[1], (3, 2), value=torch.nan)[..., 3:-2]
    assert_as_reference(kernels, (arguments[0], apart, *arguments[2:]))


def test_local_residual_of_more_layers_than_a_launch_takes(kernels):
    assert_as_reference(kernels, residual_arguments(300, 2, 3))


@by_dtype
def test_a_stack_of_local_residual_equals_its_layers_bit_for_bit(kernels, dtype):
    """35 elements: the layers of the stack start at every alignment."""
    *tensors, activation, loss, kappa, rho, skip, dual_step, _, _ = residual_arguments(3, 5, 7, dtype)
    of_stack = ops.local_residual(*tensors, activation, loss, kappa, rho, skip, dual_step, True, True)
    for t in range(3):
        layer = [x[t : t + 1].clone() for x in tensors]
        numbers = ([x[t]] for x in (rho, skip, dual_step))
        alone = ops.local_residual(*layer, activation[t : t + 1], loss, kappa, *numbers, True, True)
        assert all(torch.equal(x[0], y[t]) for x, y in zip(alone, of_stack, strict=True))


@pytest.mark.parametrize("multiplier", [None, 0.5], ids=["without", "with"])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_no_infinity_times_zero(kernels, step, multiplier):
    """A residual that is infinite, with and without a multiplier, and a skip of 0 around NaN."""
    logits, target = torch.zeros(2, 1, 3), torch.tensor([float("inf"), 1.0, -2.0]).expand(2, 1, 3)
    given = None if multiplier is None else torch.full_like(logits, multiplier)
    arguments = (logits, target, given, torch.full_like(logits, torch.nan), [1, 1], 1, 1.0, [1.0] * 2, [0.0] * 2)
    arguments = (*arguments, [0.0, step], True, True)
    for got, expected in zip(kernels.local_residual(*arguments), reference.local_residual(*arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


def test_nan_and_missing_inputs(kernels):
    for activation in ACTIVATIONS:
        test_local_residual.test_nan_goes_through(None, activation)
    test_local_residual.test_without_skip_input(None)
    for dtype in (torch.float64, torch.bfloat16):
        test_local_residual.test_outputs_on_request_and_the_step_of_the_multiplier(None, dtype)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        test_local_residual.test_size_zero(None, shape)


# ---------------------------------------------------------------------------------------------------------------------
# decoupled_linear
# ---------------------------------------------------------------------------------------------------------------------

by_preactivation = pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])


@by_dtype
@by_preactivation
@by_activation
def test_every_activation_of_decoupled_linear(kernels, activation, preactivation, dtype):
    test_decoupled_linear.check(
        test_decoupled_linear.make(2, 6, 5, 5, dtype),
        activation=activation,
        preactivation=preactivation,
        hidden_loss="huber" if ACTIVATIONS.index(activation) % 2 else "squared",
        kappa=0.7,
        rho=0.8,
        skip=1.0,
        branch_scale=0.4,
    )


@by_preactivation
@pytest.mark.parametrize("given", ["bias", "multiplier", "neither"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 9, 3), (4, 33, 65, 17), (2, 130, 16, 40), (1, 70, 128, 128)])
def test_unequal_widths_and_optional_tensors(kernels, sizes, given, preactivation):
    test_decoupled_linear.test_unequal_widths_and_optional_tensors(None, sizes, given, preactivation)


@by_dtype
@by_preactivation
@pytest.mark.parametrize(("d_in", "d_out"), [(0, 4), (3, 0)])
def test_width_zero(kernels, d_in, d_out, dtype, preactivation):
    test_decoupled_linear.test_width_zero_after_other_layers(None, d_in, d_out, dtype, preactivation)


# Several tiles of samples, several panels of columns, and several chunks of samples, whose parts are added up.
SEVERAL = [(2, 7, 5, 3), (3, 33, 66, 18), (1, 301, 40, 70)]


@pytest.mark.parametrize("sizes", SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_products_of_bfloat16(kernels, dtype, sizes):
    """All three of them, exact but for the sums in float32."""
    test_decoupled_linear.test_products_of_bfloat16(None, dtype, True, sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_several_chunks(kernels, dtype):
    test_decoupled_linear.check(test_decoupled_linear.make(1, 301, 40, 70, dtype), branch_scale=0.2, activation="tanh")


def rounded_to_tf32(x):
    """To 10 bits of mantissa, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("sizes", SEVERAL, ids=str)
def test_products_in_tf32(kernels, sizes):
    """Their operands are rounded, which the sums over all samples for the bias are not."""
    kernels.tf32 = True
    T, n, d_in, d_out = sizes
    z, weight, delta = torch.randn(T, n, d_in), torch.randn(T, d_out, d_in), torch.randn(T, n, d_out)
    codes, scale = [0] * T, [0.5] * T
    zeros = torch.zeros(T, n, d_out)
    options = (codes, False, 0, 1.0, [1.0] * T, [0.0] * T, scale, [0.0] * T, True, False)
    _, e, _, _ = test_decoupled_linear.forward_op(z, weight, None, zeros, None, *options)
    given = (z, weight, e, delta, zeros, None, codes, False, [0.0] * T, scale, True, True, True, False, False)
    grad_z, grad_weight, grad_bias, _, _ = test_decoupled_linear.backward_op(*given)
    worst, (x, w, d) = test_decoupled_linear.worst_of_product, map(rounded_to_tf32, (z, weight, delta))
    assert worst(e, x, w.mT, -0.5) < 1 < worst(e, z, weight.mT, -0.5)
    assert worst(grad_z, d, w, 0.5) < 1 < worst(grad_z, delta, weight, 0.5)
    assert worst(grad_weight, d.mT, x, 0.5) < 1 < worst(grad_weight, delta.mT, z, 0.5)
    assert worst(grad_bias.unsqueeze(2), delta.mT, torch.ones(T, n, 1), 1.0) < 1


@by_dtype
@by_preactivation
@pytest.mark.parametrize("sizes", [(5, 7, 9), (70, 33, 17)], ids=str)
def test_a_stack_of_decoupled_linear_equals_its_layers_bit_for_bit(kernels, sizes, dtype, preactivation):
    test = test_decoupled_linear.test_a_stack_of_layers_equals_its_layers_bit_for_bit
    test(None, sizes, dtype, preactivation)


def make_lists(T, n, d, activations, *, single=False):
    """What `test_decoupled_linear.loss` takes and the activations, as stacks or as lists of single layers."""
    tensors = test_decoupled_linear.make(T, n, d, d, torch.float32)
    lists = [[y.detach().requires_grad_() for y in x.unbind()] for x in tensors] if single else tensors
    return lists, [ACTIVATIONS[t % activations] for t in range(T)]


@pytest.mark.parametrize("single", [False, True], ids=["stack", "list"])
def test_launches_do_not_depend_on_the_number_of_layers(kernels, single):
    """Nor on their activations: two forward, one backward, and one more where there are several chunks of samples."""

    def launches(T, activations, n=3):
        tensors, names = make_lists(T, n, 4, activations, single=single)
        kernels.take_launches()
        energies = test_decoupled_linear.loss(*tensors, activation=names, skip=1.0)
        forward = kernels.take_launches()
        torch.autograd.grad(energies.sum(), [x for of in tensors for x in of] if single else tensors)
        return forward, kernels.take_launches()

    assert {launches(T, activations) for T in (1, 2, 40) for activations in (1, 9)} == {(2, 1)}
    assert launches(2, 2, n=200) == (2, 2)


def test_wide_layers_among_others(kernels):
    """What the kernels cannot take is answered by another backend; what they can, is not."""
    for dtype in (torch.float32, torch.float64):
        shapes = [(3, 4, 4), (3, 130, 20), (3, 4, 4)]
        test_decoupled_linear.test_a_list_of_layers_equals_its_layers_bit_for_bit(None, shapes, dtype, True)


def test_strides_of_decoupled_linear(kernels):
    for preactivation in (False, True):
        test_decoupled_linear.test_strides(None, preactivation)


def test_layers_of_one_shape_and_different_strides(kernels):
    """A list whose second layer has rows that do not end where they are, in one tensor after the other."""
    lists = [list(x.detach()) for x in test_decoupled_linear.make(2, 5, 7, 7, torch.float32)]
    options = {"activation": ["tanh", "relu"], "skip": 1.0}
    expected = test_decoupled_linear.loss(*lists, **options)
    for tensors in lists:
        padding = (3, 2) if tensors[1].dim() == 2 else (0, 0)
        apart = torch.nn.functional.pad(tensors[1], padding, value=torch.nan)
        changed = [[x[0], apart[..., 3:-2] if x is tensors and x[1].dim() == 2 else x[1]] for x in lists]
        assert torch.equal(test_decoupled_linear.loss(*changed, **options), expected)


def test_nan_and_requests_of_decoupled_linear(kernels):
    for activation in ACTIVATIONS:
        test_decoupled_linear.test_nan_goes_through(None, activation, activation in ACTIVATIONS[::2])
    for dtype in DTYPES:
        test_decoupled_linear.test_outputs_on_request_and_the_step_of_the_multiplier(None, dtype, False)
        test_decoupled_linear.test_backward_op(None, dtype, True)
    for sizes in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        test_decoupled_linear.test_size_zero(None, sizes)
    test_decoupled_linear.test_the_gradient_of_a_narrower_bias_sums_what_is_not_rounded(None)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------

MOST_SHARED = 99 * 1024  # that a block may have on every chip from sm_80 on


def test_how_layers_are_cut(kernels):
    assert kernels.cut("residual_cut", 64, 128, True, 2) == (1, 8192, 1024, 2)
    assert kernels.cut("residual_cut", 5, 7, False, 4) == (5, 7, 2, 1)
    assert kernels.cut("residual_cut", 0, 7, True, 4) == (1, 0, 0, 0)
    bf16, float32, float64 = (2, 4), (4, 4), (8, 8)
    assert kernels.cut("forward_cut", 64, 128, 128, *bf16) == (1, 1, 128, 136, 34816, 33792)
    assert kernels.cut("forward_cut", 65, 128, 128, *float32) == (3, 2, 64, 132, 33792, 16896)
    assert kernels.cut("forward_cut", 65, 7, 9, *float64) == (3, 1, 16, 18, 2304, 4608)
    assert kernels.cut("backward_cut", 64, 128, 128, *bf16, True) == (1, 4, 1, 1, 128, 136, 136, 34816, 17408, 34816)
    assert kernels.cut("backward_cut", 1025, 7, 9, *bf16, True)[:4] == (17, 4, 5, 1)
    assert kernels.cut("backward_cut", 10**6, 7, 9, *bf16, True)[:4] == (15625, 977, 16, 1)
    assert kernels.cut("backward_cut", 1025, 128, 9, *float32, False)[:4] == (33, 1, 33, 2)
    assert kernels.cut("backward_cut", 0, 0, 9, *float32, True)[:4] == (0, 4, 1, 1)


def test_every_cut_fits_into_shared_memory(kernels):
    for sizes in ((2, 4), (4, 4), (8, 8)):
        for d_in in (0, 1, 16, 33, 64, 127, 128):
            for d_out in (0, 1, 16, 33, 64, 127, 128):
                *_, weight, tile = kernels.cut("forward_cut", 1000, d_in, d_out, *sizes)
                assert weight + tile + 2048 <= MOST_SHARED  # the rest is for the bias and sums
                *_, weight, delta, tile = kernels.cut("backward_cut", 1000, d_in, d_out, *sizes, True)
                assert delta <= tile and weight + tile <= MOST_SHARED
