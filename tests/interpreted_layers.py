"""What the Triton kernels of the layer ops promise beyond the other backends, in Triton's interpreter.

Not collected by itself: test_triton_layers.py starts a process for it."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
import triton
import triton.language as tl
from cases import dtype_name
from step_nets import arguments_of_op, clone, listed, make, step

from bench.correctness import OK, check_peers
from lgd_kernels import backends, reference
from lgd_kernels.triton_kernels import decoupled_linear as linear_kernels
from lgd_kernels.triton_kernels import decoupled_step as step_kernels
from lgd_kernels.triton_kernels import layers, linear_launches, linear_library, linear_tiles, operands, tile_table
from lgd_kernels.triton_kernels import local_residual as residual_kernels
from lgd_kernels.triton_kernels.activations import activated, hidden_loss
from lgd_kernels.triton_kernels.linear_kernels import weight_gradient_kernel
from lgd_kernels.triton_kernels.linear_tiles import LinearTiles
from tools.gpu import tile_trials

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


@pytest.mark.parametrize("shape", [(2, 3, 700), (1, 37, 130), (2, 2100, 1)])
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


def padded(x):
    """The same numbers in rows that are aligned and do not end where they are."""
    return torch.nn.functional.pad(x, (0, 8 - x.shape[-1]), value=torch.nan)[..., : x.shape[-1]]


def test_local_residual_of_parts_of_aligned_rows():
    arguments = residual_arguments(2, 4, 5)
    changed = [padded(x) for x in arguments[:4]]
    expected = reference.local_residual(*arguments)
    assert_close(residual_kernels.local_residual(*changed, *arguments[4:]), expected)


def test_local_residual_with_64_bit_offsets(monkeypatch):
    """The specialization for layers of more than 2^31 elements, on small ones."""
    arguments = residual_arguments(2, 37, 130)
    arguments = (arguments[0].mT.contiguous().mT, *arguments[1:])
    narrow = residual_kernels.local_residual(*arguments)
    monkeypatch.setattr(residual_kernels, "INT32_MAX", 2**20)
    wide = residual_kernels.local_residual(*arguments)
    assert all(map(torch.equal, narrow, wide))


def test_energies_of_more_tiles_than_are_added_at_once():
    partial, energy = torch.rand(2, 2500), torch.empty(3)
    layers.sum_energy(partial, energy, (2, 0))
    assert_close(energy[[2, 0]], partial.double().sum(1).float())


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


# ---------------------------------------------------------------------------------------------------------------------
# decoupled_linear
# ---------------------------------------------------------------------------------------------------------------------

SMALL = LinearTiles(16, 16, 16, parts=2, num_warps=1, num_stages=1, registers=255, descriptors=True)
by_preactivation = pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])


def linear_arguments(sizes, dtype=torch.float32, weight_dtype=None):
    """Of decoupled_linear: one stack, with everything given and different for every layer."""
    T, n, d_in, d_out = sizes
    shapes = ((T, n, d_in), (T, d_out, d_in), (T, d_out), (T, n, d_out), (T, n, d_out))
    dtypes = (dtype, weight_dtype or dtype, weight_dtype or dtype, dtype, dtype)
    tensors = [torch.randn(shape).to(of) for shape, of in zip(shapes, dtypes, strict=True)]
    skip = [0.25 * (t + 1) if d_in == d_out else 0.0 for t in range(T)]
    numbers = ([0.5 + t for t in range(T)], skip, [1.0 / (1 + t) for t in range(T)], [t / T for t in range(T)])
    return [[x] for x in tensors], [(t * 5 + 2) % 9 for t in range(T)], numbers


def run_linear(module, lists, activation, numbers, preactivation):
    """Everything that both ops make, as one flat list."""
    stacks, yes = len(lists[0]), [True] * len(lists[0])
    options = (activation, preactivation, 1, 0.7, *numbers, yes, yes)
    energy, e, delta, q = module.decoupled_linear(*lists, *options)
    _, skip, scale, _ = numbers
    upstream = torch.linspace(-1, 2, len(activation), dtype=energy.dtype)
    given = (*lists[:2], e, delta, q)
    made = module.decoupled_linear_backward(*given, upstream, activation, preactivation, skip, scale, *[yes] * 5)
    assert all(len(outputs) == stacks for outputs in (e, delta, q, *made))
    return [energy, *e, *delta, *q, *(x for outputs in made for x in outputs)]


@by_preactivation
@pytest.mark.parametrize("sizes", [(1, 37, 17, 17), (1, 40, 19, 35), (2, 5, 40, 3)], ids=str)
def test_decoupled_linear_in_several_tiles(sizes, preactivation, monkeypatch):
    """Of which the last ones are not full, with an epilogue in parts."""
    monkeypatch.setattr(linear_launches, "linear_tiles", lambda *_: SMALL)
    arguments = (*linear_arguments(sizes), preactivation)
    assert_close(run_linear(linear_kernels, *arguments), run_linear(reference, *arguments))


@by_preactivation
def test_decoupled_linear_of_parts_of_aligned_rows(preactivation):
    lists, *options = linear_arguments((2, 4, 5, 5))
    changed = [[padded(x)] for (x,) in lists]
    got, expected = (
        run_linear(m, x, *options, preactivation) for m, x in ((linear_kernels, changed), (reference, lists))
    )
    assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_decoupled_linear_with_tiles_as_on_tensor_cores(dtype, weight_dtype):
    arguments = (*linear_arguments((1, 130, 67, 67), dtype, weight_dtype), True)
    for got, expected in zip(run_linear(linear_kernels, *arguments), run_linear(reference, *arguments), strict=True):
        torch.testing.assert_close(got, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


def test_a_stack_equals_its_layers_in_several_tiles(monkeypatch):
    """Bit for bit: a stack, a list of single layers, and one layer alone."""
    monkeypatch.setattr(linear_launches, "linear_tiles", lambda *_: SMALL)
    lists, activation, numbers = linear_arguments((3, 17, 5, 5))
    activation = [2, 6, 2]
    stack = run_linear(linear_kernels, lists, activation, numbers, True)
    of_list = run_linear(linear_kernels, [[y.clone() for y in x] for (x,) in lists], activation, numbers, True)
    assert torch.equal(of_list[0], stack[0])
    for i, of_stack in enumerate(stack[1:]):
        assert all(map(torch.equal, of_list[1 + 3 * i : 4 + 3 * i], of_stack))
    alone = run_linear(linear_kernels, [[y[1:2].clone()] for (y,) in lists], [6], [x[1:2] for x in numbers], True)
    forward = slice(0, len(("energy", "e", "delta", "q")))
    assert all(torch.equal(x, y[1:2]) for x, y in zip(alone[forward], stack[forward], strict=True))


def test_launches_do_not_depend_on_the_number_of_layers(monkeypatch):
    """Stacks and lists of equal layers; layers of other shapes and other activations have launches of their own."""
    seen = []
    for module in (linear_launches, layers):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: seen.append(kernel))

    def launches(sizes, n_activations=1, as_list=False):
        lists, activation, numbers = linear_arguments(sizes)
        lists = [list(x[0]) for x in lists] if as_list else lists
        seen.clear()
        run_linear(linear_kernels, lists, [t % n_activations for t in range(len(activation))], numbers, True)
        return len(seen)

    assert {launches((T, 3, 4, 4), as_list=as_list) for T in (1, 2, 40) for as_list in (False, True)} == {5}
    assert launches((40, 3, 4, 4), n_activations=2) == 10


def test_decoupled_linear_with_64_bit_offsets(monkeypatch):
    """The specialization for layers of more than 2^31 elements, on small ones."""
    arguments = (*linear_arguments((2, 37, 21, 21)), True)
    narrow = run_linear(linear_kernels, *arguments)
    monkeypatch.setattr(linear_launches, "INT32_MAX", 2**20)
    assert all(map(torch.equal, run_linear(linear_kernels, *arguments), narrow))


def test_decoupled_linear_refuses_wrong_shapes():
    lists, activation, numbers = linear_arguments((2, 3, 4, 4))
    for i in range(1, 5):
        wrong = [[x[0][:, :2]] if i == j else x for j, x in enumerate(lists)]
        with pytest.raises(ValueError, match="expected shape"):
            run_linear(linear_kernels, wrong, activation, numbers, True)
    with pytest.raises(ValueError, match="activation: has 1 values, but there are 2 layers"):
        run_linear(linear_kernels, lists, activation[:1], numbers, True)
    with pytest.raises(ValueError, match="bias: has 2 stacks, but z has 1"):
        run_linear(linear_kernels, [*lists[:2], lists[2] * 2, *lists[3:]], activation, numbers, True)


# ---------------------------------------------------------------------------------------------------------------------
# decoupled_step_
# ---------------------------------------------------------------------------------------------------------------------


def step_nets(dtype, T=5):
    """Two equal nets: of T layers of one width in stacks, and a smaller one at the end."""
    tensors = make((6,) * (T + 1) + (3,), n=9, dtype=dtype, velocity=True)
    tensors |= {name: torch.stack(tensors[name]) for name in ("z", "multiplier", "velocity")}
    tensors |= {name: [torch.stack(tensors[name][:T]), tensors[name][T]] for name in ("weight", "bias")}
    return tensors, clone(tensors)


def visit(tensors, preactivation):
    with backends.force("triton"):
        return step(tensors, steps=2, z_momentum=0.5, skip=1.0, dual_step=0.3, preactivation=preactivation)


@by_preactivation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_products_of_the_library(dtype, preactivation, monkeypatch):
    """The same visit as with tiles, to the rounding of the order of sums; all products are the library's then."""
    by_tiles, by_library = step_nets(dtype)
    expected = visit(by_tiles, preactivation)
    monkeypatch.setattr(linear_library, "WIDTHS", {"half": 1, "ieee": 1})
    for name in ("launch_forward", "launch_input_gradient", "launch_weight_gradient"):
        monkeypatch.setattr(step_kernels, name, None)  # a call of it would raise
    torch.testing.assert_close(visit(by_library, preactivation), expected)
    for name in ("z", "multiplier", "velocity", "weight", "bias"):
        for a, b in zip(listed(by_library[name]), listed(by_tiles[name]), strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a.grad, b.grad)


def test_when_products_are_the_librarys():
    def takes(samples, d_in, d_out, precision):
        return linear_library.takes_library(linear_launches.Sizes(2, samples, d_in, d_out), precision)

    assert takes(4096, 4096, 8192, "half") and not takes(4096, 4095, 8192, "half") and not takes(64, 4096, 4096, "half")
    assert takes(256, 256, 256, "ieee") and not takes(256, 256, 128, "ieee")
    assert not takes(2**14, 2**14, 2**14, "float64")


def test_layers_that_are_not_equally_far_apart_are_no_batch():
    stack, other = torch.zeros(5, 2, 3), torch.zeros(1, 2, 3)
    of_stacks = layers.LayerList([stack, other])
    assert of_stacks.batch([1, 3]).data_ptr() == stack[1].data_ptr() and len(of_stacks.batch([1, 3])) == 2
    assert of_stacks.batch([5]).data_ptr() == other.data_ptr()
    assert all(of_stacks.batch(chosen) is None for chosen in ([0, 1, 3], [4, 5], [3, 1]))


def test_a_visit_refuses_what_does_not_fit():
    """Every list of tensors with a layer too few or a wrong size, every list of numbers, and a skip at the softmax."""
    good = arguments_of_op(make((4, 6, 6, 3), velocity=True), "adam")
    step_kernels.decoupled_step_(*good)
    names = [*inspect.signature(step_kernels.decoupled_step_).parameters]
    lists = names[names.index("z") : names.index("target")]
    per_layer = ("activation", "rho", "skip", "branch_scale")
    for name in (*lists, "target", *per_layer, "update_numbers"):
        i = names.index(name)
        wrong = [good[i][:-1]] if name not in lists else [good[i][1:], [stack[..., 1:] for stack in good[i]]]
        for value in wrong:
            with pytest.raises(ValueError, match=f"^({name}|z): "):  # z, where its widths no longer fit the weights
                step_kernels.decoupled_step_(*good[:i], value, *good[i + 1 :])
    i = names.index("skip")
    with pytest.raises(ValueError, match=r"^skip: the last layer's must be 0 for softmax_infogain, got 0\.5"):
        step_kernels.decoupled_step_(*good[:i], [0.0, 0.0, 0.5], *good[i + 1 :])


def test_launches_of_a_visit_do_not_depend_on_the_depth(monkeypatch):
    seen = []
    for module in (linear_launches, layers, operands):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: seen.append(kernel))
    counts = set()
    for T in (2, 5, 40):
        seen.clear()
        visit(step_nets(torch.bfloat16, T)[0], preactivation=True)
        counts.add(len(seen))
    # twice weights, 3 passes of 3 shapes, z of 2 shapes twice, 3 energies less that of the head, 2 x 3 gradients
    assert counts == {2 + 3 * 3 + 2 * 2 + 2 + 2 * 3}


def test_counted_tiles_depend_on_one_layer():
    tiles = linear_tiles.counted_tiles
    assert tiles(1024, 1024, 2, "half", 90) == LinearTiles(128, 128, 64, 8, 4, 3, registers=255, descriptors=True)
    assert tiles(1024, 1024, 4, "tf32", 80) == LinearTiles(128, 128, 16, 8, 8, 4, registers=255, descriptors=False)
    assert tiles(64, 32, 2, "half", 90) == LinearTiles(64, 32, 64, 2, 4, 3, registers=168, descriptors=True)
    assert tiles(512, 64, 2, "half", 100).descriptors and not tiles(512, 32, 2, "half", 100).descriptors
    assert not tiles(512, 64, 2, "half", 90, even=False).descriptors
    by_descriptors = [a for a in (80, 89, 90, 100, 103, 120) if tiles(512, 64, 2, "half", a).descriptors]
    assert by_descriptors == [90, 100, 103]
    for rows, columns in ((0, 0), (1, 1), (64, 64), (65, 65), (5000, 5000)):
        for architecture in (80, 89, 90, 100, 120):
            chosen = tiles(rows, columns, 2, "half", architecture)
            staged = chosen.num_stages * chosen.depth * (chosen.rows + chosen.columns) * 2
            assert staged <= 99 * 1024


def test_the_steps_that_make_tune_times(monkeypatch):
    """On the CPU, for one of two classes of products: right with any tiles, which those products alone have."""
    steps = tile_trials.StepsOfBenchmark(tile_trials.Size("ieee", 2, 40, 4), "cpu")
    classes = [tile_table.product_class(n, 40, 4, "ieee", 90, even=False) for n in (4, 40)]
    assert steps.products() == classes
    counted = linear_tiles.counted_tiles(4, 40, 4, "ieee", 90, even=False)
    other = dataclasses.replace(counted, rows=32, depth=32)
    problem = steps.problem(classes[1], [counted, other])
    assert {check.status for check in check_peers(problem).values()} == {OK}
    seen = []

    def launch(kernel, grid, like, *args, **options):
        if "BLOCK_M" in options:
            seen.append((kernel is weight_gradient_kernel, options["BLOCK_M"]))

    monkeypatch.setattr(linear_launches, "launch", launch)
    problem.calls[tile_trials.name_of(other)]()
    assert set(seen) == {(True, other.rows), (False, counted.rows)}


def test_float32_products_follow_torchs_switch():
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for setting, precision in (("ieee", "ieee"), ("tf32", "tf32")):
            switch.fp32_precision = setting
            assert linear_tiles.precision_of(torch.float32) == precision
    finally:
        switch.fp32_precision = before
