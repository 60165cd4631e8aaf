"""The ops as torch sees them: opcheck, gradcheck, torch.compile, torch.func, autocast."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from cases import DTYPES, KINDS, REDUCTIONS, SOME_KINDS, dtype_name
from device import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lgd_kernels as lgd
from lgd_kernels import ops
from lgd_kernels.infogain import InfogainParts

pytestmark = pytest.mark.usefixtures("backend")
Infogain = lgd.Infogain
by_some_kinds = pytest.mark.parametrize("kind", SOME_KINDS)
NO_H = InfogainParts()
PASSES = ("forward", "backward")


def plain_loss(x, labels, dense, reduction="mean"):
    """In plain PyTorch, for logits (..., C): what torch.func makes of this is what it must make of ours."""
    rows = dense.index_select(0, labels.reshape(-1)).reshape(*labels.shape, -1)
    loss = -(rows * torch.log_softmax(x, -1)).sum(-1)
    return loss if reduction == "none" else getattr(loss, reduction)()


def problem(kind, N=3, C=4, dtype=torch.float64):
    H, dense = KINDS[kind](C)
    return torch.randn(N, C, dtype=dtype), torch.randint(C, (N,)), H, dense.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# opcheck, on detached inputs: the ops carry no autograd
# ---------------------------------------------------------------------------------------------------------------------


def rows_for_opcheck(kind, dtype, shape=(3, 5, 2)):
    H, _ = KINDS[kind](5)
    logits = torch.randn(shape).to(dtype)
    labels = torch.randint(5, (shape[0], shape[2]))
    if labels.numel() > 2:
        labels[0, 0] = -100
    per_row = functools.partial(
        torch.randn, labels.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    return (logits, labels, *(NO_H if H is None else H.parts), -100, 0.01), per_row


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in SOME_KINDS), *(("dense_negative", t) for t in DTYPES if t != torch.float32)],
)
def test_opcheck(kind, dtype):
    rows, per_row = rows_for_opcheck(kind, dtype)
    logits, labels = rows[:2]
    check = torch.library.opcheck
    check(ops.softmax_infogain, (*rows, per_row(), True, True))
    check(ops.softmax_infogain, (*rows, None, False, False))
    check(ops.softmax_infogain_reduced, (*rows, None, None, True))
    check(ops.softmax_infogain_reduced, (*rows, per_row(), 3.0, False))
    check(ops.softmax_infogain_backward, (*rows, per_row(), None))
    check(ops.softmax_infogain_backward, (*rows, per_row(), per_row()))
    check(ops.softmax_infogain_backward_, (torch.randn_like(logits), per_row(), *rows, per_row(), None))
    check(ops.softmax_infogain_double_backward, (*rows, per_row(), per_row(), torch.randn_like(logits)))
    check(ops.softmax_infogain_double_backward, (*rows, per_row(), None, torch.randn_like(logits)))
    check(ops.softmax_infogain_backward_matrix, (logits, labels, 5, -100, per_row()))


def test_opcheck_on_views_and_on_nothing():
    for shape in ((0, 5, 2), (3, 5, 0), (1, 5, 1)):
        rows, per_row = rows_for_opcheck("dense_negative", torch.float32, shape)
        torch.library.opcheck(ops.softmax_infogain, (*rows, per_row(), True, True))
        torch.library.opcheck(ops.softmax_infogain_backward, (*rows, per_row(), None))
    rows, per_row = rows_for_opcheck("dense_negative", torch.float32)
    for logits in (rows[0].transpose(0, 2).contiguous().transpose(0, 2), rows[0][:1].expand(3, 5, 2)):
        torch.library.opcheck(ops.softmax_infogain, (logits, *rows[1:], per_row(), True, True))
        torch.library.opcheck(ops.softmax_infogain_backward, (logits, *rows[1:], per_row(), per_row()))


def test_opcheck_of_the_small_ops():
    torch.library.opcheck(ops.count_labels, (torch.randint(3, (4, 5)), 2, torch.float32))
    matrix = torch.eye(4).to_sparse_csr()
    torch.library.opcheck(ops.check_finite, (torch.ones(3), "matrix"))
    torch.library.opcheck(ops.check_not_negative, (torch.ones(3), "matrix"))
    torch.library.opcheck(ops.check_csr, (matrix.crow_indices(), matrix.col_indices(), 4))


def test_outputs_that_are_not_asked_for_have_no_elements():
    rows, per_row = rows_for_opcheck("none", torch.float32)
    for row_scale, need_lse, need_norm in ((None, False, False), (per_row(), False, True), (None, True, False)):
        loss, lse, gradient, norm = ops.softmax_infogain(*rows, row_scale, need_lse, need_norm)
        assert loss.shape == (3, 2)
        assert gradient.shape == ((0,) if row_scale is None else rows[0].shape)
        assert lse.shape == ((3, 2) if need_lse else (0,))
        assert norm.shape == ((3, 2) if need_norm else (0,))


# ---------------------------------------------------------------------------------------------------------------------
# gradcheck and gradgradcheck, with forward mode and vmap
# ---------------------------------------------------------------------------------------------------------------------


def check_gradients(function, *inputs):
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_logits(kind):
    logits, labels, H, _ = problem(kind)
    check_gradients(lambda x: lgd.softmax_infogain_loss(x, labels, H), logits.requires_grad_())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_some_kinds
def test_gradcheck_with_weights_z_loss_and_every_output(kind, reduction):
    logits, labels, H, _ = problem(kind, N=4)
    labels[1] = -100

    def run(x, w):
        options = {"reduction": reduction, "z_loss": 0.1, "return_lse": True, "return_probabilities": True}
        return lgd.softmax_infogain_loss(x, labels, H, sample_weight=w, **options)

    check_gradients(run, logits.requires_grad_(), torch.rand(4, dtype=torch.float64, requires_grad=True))


def test_gradcheck_with_inner_dimensions():
    labels = torch.randint(4, (2, 3))
    for shape, axis in (((2, 4, 3), 1), ((4, 2, 3), 0), ((2, 3, 4), -1)):
        check_gradients(
            lambda x, axis=axis: lgd.softmax_infogain_loss(x, labels, axis=axis, z_loss=0.1),
            torch.randn(shape, dtype=torch.float64, requires_grad=True),
        )


CROW, COL = torch.tensor([0, 2, 3, 3, 5]), torch.tensor([1, 3, 0, 1, 2])
TRAINED = {
    "dense": ([(4, 4)], lambda m: Infogain.dense(m)),
    "diagonal": ([(4,)], lambda d: Infogain.diagonal(d)),
    "diagonal and background": ([(4,), ()], lambda d, b: Infogain.diagonal(d, background=b)),
    "label_smoothing": ([()], lambda e: Infogain.label_smoothing(e, 4)),
    "sparse": ([(5,)], lambda v: Infogain("sparse", 4, InfogainParts(crow=CROW, col=COL, values=v))),
    "sparse and background": (
        [(5,), ()],
        lambda v, b: Infogain("sparse", 4, InfogainParts(crow=CROW, col=COL, values=v, background=b)),
    ),
    "from_distance": ([(4, 4)], lambda d: Infogain.from_distance(d)),
    "from_distance top_k": ([(4, 4)], lambda d: Infogain.from_distance(d, top_k=2)),
}


@pytest.mark.parametrize("case", TRAINED)
def test_gradcheck_of_the_tensors_of_H(case):
    shapes, build = TRAINED[case]
    labels = torch.tensor([0, 3, -100, 1, 3])
    tensors = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *tensors):
        return lgd.softmax_infogain_loss(x, labels, build(*tensors), z_loss=0.05)

    check_gradients(run, logits, *tensors)
    torch.autograd.gradcheck(functools.partial(run, logits.detach()), tensors)  # where the logits need none


def test_gradcheck_of_sparse_values_through_the_constructor():
    labels = torch.tensor([0, 3, 1, 3])
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.repeat_interleave(torch.arange(4), CROW.diff())

    def run(x, values):
        matrix = torch.sparse_coo_tensor(torch.stack([rows, COL]), values, (4, 4))
        return lgd.softmax_infogain_loss(x, labels, Infogain.sparse(matrix, background=0.1))

    torch.autograd.gradcheck(run, (logits, torch.rand(5, dtype=torch.float64, requires_grad=True)))


def test_third_derivative():
    logits, labels, H, dense = problem("dense_negative")

    def third(loss):
        x = logits.clone().requires_grad_()
        value = loss(x)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            value = (value**2).sum()
        return value

    ours = third(lambda x: lgd.softmax_infogain_loss(x, labels, H))
    torch.testing.assert_close(ours, third(lambda x: plain_loss(x, labels, dense)))


# ---------------------------------------------------------------------------------------------------------------------
# torch.func
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [grad, jacrev, jacfwd, hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))],
    ids=["grad", "jacrev", "jacfwd", "hessian", "jacrev-jacrev", "jacrev-jacfwd"],
)
@by_some_kinds
def test_derivative_transforms(kind, transform):
    x, labels, H, dense = problem(kind)
    ours = transform(lambda x: lgd.softmax_infogain_loss(x, labels, H))(x)
    torch.testing.assert_close(ours, transform(lambda x: plain_loss(x, labels, dense))(x))


@by_some_kinds
def test_jvp(kind):
    x, labels, H, dense = problem(kind)
    tangent = torch.randn_like(x)
    for reduction in REDUCTIONS:
        ours = jvp(lambda x, r=reduction: lgd.softmax_infogain_loss(x, labels, H, reduction=r), (x,), (tangent,))
        torch.testing.assert_close(ours, jvp(lambda x, r=reduction: plain_loss(x, labels, dense, r), (x,), (tangent,)))
    with forward_ad.dual_level():
        dual = lgd.softmax_infogain_loss(forward_ad.make_dual(x, tangent), labels, H)
        assert forward_ad.unpack_dual(dual).tangent is not None


def test_jvp_in_every_input():
    x, labels, _, dense = problem("dense_negative")
    w = torch.rand(3, dtype=torch.float64)

    def ours(x, w, m):
        loss, lse = lgd.softmax_infogain_loss(
            x, labels, Infogain.dense(m), sample_weight=w, z_loss=0.1, return_lse=True
        )
        return loss, lse

    def plain(x, w, m):
        lse = torch.logsumexp(x, 1)
        return (w * (plain_loss(x, labels, m, "none") + 0.1 * lse**2)).mean(), lse

    inputs = (x, w, dense)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    torch.testing.assert_close(jvp(ours, inputs, tangents), jvp(plain, inputs, tangents))


@by_some_kinds
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_over_the_logits(kind, in_dim):
    _, labels, H, _ = problem(kind)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    for reduction in REDUCTIONS:

        def ours(x, labels=labels, reduction=reduction):
            return lgd.softmax_infogain_loss(x, labels, H, reduction=reduction)

        expected = torch.stack([ours(each) for each in x])
        torch.testing.assert_close(vmap(ours, in_dims=in_dim)(x.movedim(0, in_dim)), expected)


@by_some_kinds
def test_vmap_over_logits_labels_and_weights(kind):
    """Every batch entry has a mean of its own, with its own number of ignored rows."""
    _, _, H, _ = problem(kind)
    x, labels = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(4, (6, 5))
    labels[0, :3] = labels[3, 4] = -100
    weight = torch.rand(6, 5, dtype=torch.float64)

    def ours(x, labels, w):
        options = {"sample_weight": w, "z_loss": 0.1, "return_lse": True, "return_probabilities": True}
        return lgd.softmax_infogain_loss(x, labels, H, return_grad_norm=True, **options)

    expected = [
        torch.stack(outputs)
        for outputs in zip(*(ours(*each) for each in zip(x, labels, weight, strict=True)), strict=True)
    ]
    torch.testing.assert_close(list(vmap(ours)(x, labels, weight)), expected)
    nested = vmap(vmap(ours))(x.unflatten(0, (2, 3)), labels.unflatten(0, (2, 3)), weight.unflatten(0, (2, 3)))
    torch.testing.assert_close([output.flatten(0, 1) for output in nested], expected)


def test_vmap_over_H():
    x, labels, _, _ = problem("none")
    matrices = torch.rand(5, 4, 4, dtype=torch.float64)

    def ours(m):
        return lgd.softmax_infogain_loss(x, labels, Infogain("dense", 4, InfogainParts(matrix=m)))

    expected = torch.stack([ours(m) for m in matrices])
    torch.testing.assert_close(vmap(ours)(matrices), expected)
    torch.testing.assert_close(vmap(grad(ours))(matrices), torch.stack([grad(ours)(m) for m in matrices]))


@by_some_kinds
def test_gradients_of_single_samples(kind):
    x, labels, H, dense = problem(kind, N=5)

    def ours(x, label):
        return lgd.softmax_infogain_loss(x, label, H)

    expected = vmap(grad(lambda x, label: plain_loss(x, label, dense, "sum")))(x, labels)
    torch.testing.assert_close(vmap(grad(ours))(x, labels), expected)
    expected = vmap(hessian(lambda x, label: plain_loss(x, label, dense, "sum")))(x, labels)
    torch.testing.assert_close(vmap(hessian(ours))(x, labels), expected)


def test_gradients_of_single_samples_of_a_network():
    net = torch.nn.Linear(6, 4).double()
    parameters = dict(net.named_parameters())
    inputs, labels = torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))

    def loss(parameters, x, label, crit):
        return crit(torch.func.functional_call(net, parameters, (x,)), label)

    ours, theirs = (
        vmap(grad(functools.partial(loss, crit=crit)), in_dims=(None, 0, 0))(parameters, inputs, labels)
        for crit in (lgd.SoftmaxInfogainLoss(label_smoothing=0.1), torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    )
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------

COMPILED = {
    "plain": {},
    "sum": {"reduction": "sum", "ignore_index": 2},
    "none": {"reduction": "none"},
    "z_loss": {"z_loss": 0.1, "normalization": "valid"},
    "every output": {"return_probabilities": True, "return_lse": True, "return_grad_norm": True},
}


def assert_compiles(run, x, *args, backend="aot_eager"):
    """Outputs and gradients of the compiled function are those of the function."""
    torch.compiler.reset()
    results = []
    for function in (torch.compile(run, fullgraph=True, backend=backend), run):
        logits = x.detach().clone().requires_grad_()
        outputs = function(logits, *args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((output * (i + 1)).sum() for i, output in enumerate(outputs) if output.requires_grad)
        results.append([*outputs, *torch.autograd.grad(total, logits)])
    torch.testing.assert_close(*results)
    return results[0]


@pytest.mark.parametrize("kind", ["none", "sparse_background", "dense_negative"])
@pytest.mark.parametrize("options", COMPILED)
def test_compile(kind, options):
    x, labels, H, _ = problem(kind, N=6, dtype=torch.float32)
    weight = torch.rand(6)

    def run(x, labels, w):
        return lgd.softmax_infogain_loss(x, labels, H, sample_weight=w, **COMPILED[options])

    assert_compiles(run, x, labels, weight)


def test_compile_the_module():
    x, labels, H, _ = problem("diagonal_background", N=6, dtype=torch.float32)
    for crit in (
        lgd.SoftmaxInfogainLoss(H),
        lgd.SoftmaxInfogainLoss(weight=torch.rand(4), label_smoothing=0.1),
        lgd.SoftmaxInfogainLoss(label_smoothing=0.1),
    ):
        assert_compiles(crit, x, labels)
    assert_compiles(lgd.SoftmaxInfogainLoss(), x, torch.rand(6, 4))


def test_compile_with_inductor_and_strided_logits():
    """The loss between other operations that inductor fuses and lays out as it likes."""
    labels = torch.randint(5, (4, 3))

    def run(x, labels):
        logits = torch.tanh(x).transpose(1, 2) * 3
        return lgd.softmax_infogain_loss(logits, labels, Infogain.label_smoothing(0.1, 5)) * 2

    assert_compiles(run, torch.randn(4, 3, 5), labels, backend="inductor")


def test_compile_with_dynamic_shapes():
    torch.compiler.reset()
    count = CompileCounterWithBackend("aot_eager")
    H = Infogain.diagonal(torch.rand(7))
    compiled = torch.compile(
        lambda x, y: lgd.softmax_infogain_loss(x, y, H), fullgraph=True, dynamic=True, backend=count
    )
    graphs = []
    for N in (3, 5, 8):
        x, labels = torch.randn(N, 7, requires_grad=True), torch.randint(7, (N,))
        loss = compiled(x, labels)
        torch.testing.assert_close(loss, lgd.softmax_infogain_loss(x, labels, H))
        loss.backward()
        assert x.grad.shape == (N, 7)
        graphs.append(count.frame_count)
    assert graphs[0] == graphs[-1]


def test_compile_a_gradient_transform():
    x, labels, H, _ = problem("dense_negative")
    compiled = torch.compile(
        grad(lambda x: lgd.softmax_infogain_loss(x, labels, H)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), grad(lambda x: lgd.softmax_infogain_loss(x, labels, H))(x))


def test_a_label_out_of_range_raises_when_compiled(raising_labels):
    torch.compiler.reset()
    compiled = torch.compile(lgd.softmax_infogain_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="labels: value 9 at position 1 is out of range for 4 classes"):
        compiled(torch.randn(2, 4), torch.tensor([0, 9]))


# ---------------------------------------------------------------------------------------------------------------------
# autocast
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@by_some_kinds
def test_autocast(kind, dtype):
    """The loss is float32, as for F.cross_entropy; the gradient has the logits' dtype."""
    _, labels, H, dense = problem(kind, N=6, dtype=torch.float32)
    linear, x = torch.nn.Linear(8, 4), torch.randn(6, 8)
    with torch.autocast(DEVICE.type, dtype):
        logits = linear(x)
        assert logits.dtype == dtype
        logits.retain_grad()
        loss, p = lgd.softmax_infogain_loss(logits, labels, H, return_probabilities=True)
        assert loss.dtype == p.dtype == torch.float32
        assert lgd.softmax_infogain_loss(logits.double(), labels, H).dtype == torch.float64
        assert lgd.SoftmaxInfogainLoss(label_smoothing=0.1)(logits, labels).dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss(logits.float(), labels, dense))
    loss.backward()
    assert logits.grad.dtype == dtype
    assert linear.weight.grad.dtype == torch.float32


def test_autocast_and_gradient_scaling():
    """A float32 upstream gradient beyond float16's range times a small gradient: no overflow, no rounding twice."""
    logits = torch.zeros(2**13, 4, dtype=torch.float16, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.float16):
        loss = lgd.softmax_infogain_loss(logits, torch.zeros(2**13, dtype=torch.int64))
    (loss * 2.0**17).backward()
    assert logits.grad[0].tolist() == [-12.0, 4.0, 4.0, 4.0]


@by_some_kinds
def test_many_upstream_gradients_at_once(backend, kind):
    """The backward pass itself under vmap, of a loss whose gradient was made in the forward pass."""
    logits, labels, H, _ = problem(kind)
    logits.requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=logits.dtype)
    loss = lgd.softmax_infogain_loss(logits, labels, H)
    (batched,) = torch.autograd.grad(loss, logits, upstream, is_grads_batched=True)
    (grad,) = torch.autograd.grad(lgd.softmax_infogain_loss(logits, labels, H), logits)
    torch.testing.assert_close(batched, upstream.reshape(3, *[1] * grad.dim()) * grad)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: lgd.softmax_infogain_loss(x, labels, H), logits.detach(), vectorize=True
    )
    torch.testing.assert_close(jacobian, grad)


# ---------------------------------------------------------------------------------------------------------------------
# Who else may watch a call: none of them may be passed over by a short cut
# ---------------------------------------------------------------------------------------------------------------------


def loss_and_gradient(logits, labels, H=None):
    loss = lgd.softmax_infogain_loss(logits, labels, H)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_lazily_negated_tensors():
    logits = torch.randn(5, 4, dtype=torch.complex64).conj().imag
    matrix = torch.rand(4, 4, dtype=torch.complex64).conj().imag
    assert logits.is_neg() and matrix.is_neg()
    labels = torch.randint(4, (5,))
    lazy = loss_and_gradient(logits.requires_grad_(), labels, Infogain.dense(matrix))
    plain = loss_and_gradient(
        logits.detach().resolve_neg().requires_grad_(), labels, Infogain.dense(matrix.resolve_neg())
    )
    assert torch.equal(lazy[0], plain[0])
    assert torch.equal(lazy[1], plain[1])


def test_a_subclass_sees_the_ops():
    from torch.testing._internal.two_tensor import TwoTensor

    one, two, labels = torch.randn(5, 4), torch.randn(5, 4), torch.randint(4, (5,))
    loss, gradient = loss_and_gradient(TwoTensor(one, two).requires_grad_(), TwoTensor(labels, labels))
    for x, part_of_loss, part_of_gradient in ((one, loss.a, gradient.a), (two, loss.b, gradient.b)):
        expected = loss_and_gradient(x.requires_grad_(), labels)
        assert torch.equal(part_of_loss, expected[0])
        assert torch.equal(part_of_gradient, expected[1])


class Watch(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    """The same one level higher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watch, WatchFunctions])
def test_a_mode_sees_the_ops(mode):
    with mode() as watch:
        loss_and_gradient(torch.randn(5, 4, requires_grad=True), torch.randint(4, (5,)))
    assert ops.softmax_infogain_reduced in watch.seen


def _losses_of_one_tensor():
    z, weight, target = torch.randn(2, 3, 4), torch.randn(2, 4, 4), torch.randn(2, 3, 4)
    return {
        "softmax_infogain_loss": (lambda x: lgd.softmax_infogain_loss(x, torch.tensor([2, 0, 1])), torch.randn(3, 4)),
        "local_residual_loss": (lambda x: lgd.local_residual_loss(x, target).sum(), z),
        "decoupled_linear_loss": (lambda x: lgd.decoupled_linear_loss(x, weight, None, target).sum(), z),
        "of a list": (lambda x: lgd.decoupled_linear_loss([*x], [*weight], None, [*target]).sum(), z),
    }


@pytest.mark.parametrize("name", _losses_of_one_tensor())
def test_transforms_inside_a_compiled_function(name):
    """torch.func.grad is traced; torch.func.jvp goes to eager code, because tangents would get lost."""
    loss, x = _losses_of_one_tensor()[name]
    gradient = torch.func.grad(loss)

    def derivative(x):
        return torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]

    expected = gradient(x)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.compile(derivative, backend="aot_eager")(x), expected.sum())


def _is_right_or_raises(function, x, fullgraph):
    expected = function(x)
    assert expected.abs().sum() > 0
    torch._dynamo.reset()
    try:
        got = torch.compile(function, backend="eager", fullgraph=fullgraph)(x)
    except Exception:  # torch has many ways to say that it cannot
        return
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", _losses_of_one_tensor())
def test_transforms_that_cannot_be_compiled_are_never_silently_wrong(name, fullgraph):
    """Of these derivatives torch 2.13 makes 0, without a word, of any torch.autograd.Function."""
    loss, x = _losses_of_one_tensor()[name]
    _is_right_or_raises(grad(lambda x: grad(loss)(x).square().sum()), x, fullgraph)
    _is_right_or_raises(grad(lambda x: vmap(loss)(torch.stack([x, x])).sum()), x, fullgraph)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, x))).tangent

    compiled = loss
    expected = tangent(x)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=fullgraph)
    try:
        got = tangent(x)
    except Exception:
        return
    torch.testing.assert_close(got, expected)


def test_watchers_see_a_decoupled_step():
    """A call that concerns nobody else goes to the kernel past the dispatcher; these do not."""
    from torch.profiler import ProfilerActivity, profile

    def step():
        x, z, weight = torch.randn(5, 4), torch.randn(1, 5, 4), torch.randn(2, 4, 4)
        lgd.decoupled_step_(x, z, weight, None, torch.randn(5, 4), step_size=0.1, head="squared")

    for mode in (Watch, WatchFunctions):
        with mode() as watch:
            step()
        assert ops.decoupled_step_ in watch.seen
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    assert "lgd_kernels::decoupled_step_" in {event.key for event in profiled.key_averages()}


def test_a_subclass_with_torch_function_keeps_its_type():
    class Named(torch.Tensor):
        pass

    logits, labels = torch.randn(5, 4).as_subclass(Named).requires_grad_(), torch.randint(4, (5,))
    loss = lgd.softmax_infogain_loss(logits, labels)
    assert type(loss) is Named
    assert loss.item() == lgd.softmax_infogain_loss(logits.detach().as_subclass(torch.Tensor), labels).item()


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_checkpoint_with_a_dispatch_mode_in_one_of_the_passes(watched):
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    logits, labels = torch.randn(5, 4, requires_grad=True), torch.randint(4, (5,))
    mode = {name: FlopCounterMode(display=False) if name == watched else nullcontext() for name in PASSES}
    with mode["forward"]:
        loss = checkpoint(lgd.softmax_infogain_loss, logits, labels, use_reentrant=False)
    with mode["backward"]:
        (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, loss_and_gradient(logits, labels)[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_records_the_loss():
    labels, others = torch.randint(4, (5,)), torch.randn(5, 4)
    traced = torch.jit.trace(lgd.softmax_infogain_loss, (torch.randn(5, 4), labels))
    assert torch.equal(traced(others, labels), lgd.softmax_infogain_loss(others, labels))


def test_make_fx_records_forward_and_backward():
    from torch.fx.experimental.proxy_tensor import make_fx

    logits, labels, others = torch.randn(5, 4), torch.randint(4, (5,)), torch.randn(5, 4)
    traced = make_fx(lambda x, y: lgd.softmax_infogain_loss(x, y), pre_dispatch=True)(logits, labels)
    assert torch.equal(traced(others, labels), lgd.softmax_infogain_loss(others, labels))
    loss = lgd.softmax_infogain_loss(logits.requires_grad_(), labels)
    traced = make_fx(lambda upstream: torch.autograd.grad(loss, logits, upstream)[0])(torch.tensor(1.0))
    expected = 3 * loss_and_gradient(logits, labels)[1]
    torch.testing.assert_close(traced(torch.tensor(3.0)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_compiled_autograd(upstream):
    from torch._dynamo import compiled_autograd

    logits, labels = torch.randn(5, 4, requires_grad=True), torch.randint(4, (5,))
    loss = upstream * lgd.softmax_infogain_loss(logits, labels)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    expected = upstream * loss_and_gradient(logits, labels)[1]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-7)


def test_the_profiler_names_the_op():
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        lgd.softmax_infogain_loss(torch.randn(5, 4), torch.randint(4, (5,)))
    assert "lgd_kernels::softmax_infogain_reduced" in {event.key for event in profiled.key_averages()}


def test_an_undefined_upstream_gradient_stays_undefined():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    logits = torch.randn(5, 4, requires_grad=True)
    Stop.apply(lgd.softmax_infogain_loss(logits, torch.randint(4, (5,)))).backward()
    assert logits.grad is None


def test_tangent_of_an_upstream_gradient():
    logits, labels = torch.randn(5, 4, requires_grad=True), torch.randint(4, (5,))
    loss = lgd.softmax_infogain_loss(logits, labels)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(2.0))
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        tangent = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent, 2 * loss_and_gradient(logits, labels)[1], rtol=1e-6, atol=1e-7)


def test_a_gradient_may_be_changed_by_tensors_that_require_grad():
    logits, factor = torch.randn(5, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    _, gradient = loss_and_gradient(logits, torch.randint(4, (5,)))
    gradient.mul_(factor)
    assert gradient.requires_grad


def test_tangents_of_plain_autograd():
    """forward_ad without torch.func: dual tensors look like ordinary ones."""
    logits, labels, H, dense = problem("dense_negative")
    tangent = torch.randn_like(logits)
    with forward_ad.dual_level():
        loss = lgd.softmax_infogain_loss(forward_ad.make_dual(logits, tangent), labels, H)
        change = forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(change, jvp(lambda x: plain_loss(x, labels, dense), (logits,), (tangent,))[1])
