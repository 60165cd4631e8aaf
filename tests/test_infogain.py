"""The Infogain object: what each constructor stores, and that it stays what the caller gave."""

from __future__ import annotations

import math

import pytest
import torch
from cases import KINDS
from device import DEVICE

import lgd_kernels as lgd
from lgd_kernels.losses.softmax_infogain import parts_for

Infogain = lgd.Infogain
ALL_KINDS = [kind for kind in KINDS if kind != "none"]


def loss_of(H, C=7, labels=None):
    torch.manual_seed(5)
    labels = torch.arange(C) if labels is None else labels
    return lgd.softmax_infogain_loss(torch.randn(len(labels), C, dtype=torch.float64), labels, H, reduction="sum")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_to_dense(kind):
    H, dense = KINDS[kind](7)
    assert torch.equal(H.to_dense(7, dtype=torch.float64), dense) or kind in ("label_smoothing", "from_distance")
    torch.testing.assert_close(H.to_dense(7, dtype=torch.float64), dense, rtol=1e-15, atol=1e-15)
    assert H.to_dense(7).dtype == torch.float32


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_class(kind):
    H, dense = KINDS[kind](1)
    assert H.to_dense(1).shape == dense.shape == (1, 1)
    loss = lgd.softmax_infogain_loss(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), H)
    assert loss == 0


def test_what_each_kind_stores():
    """Far less than (C, C) wherever that is possible."""
    C = 1000
    for H, limit in (
        (Infogain.identity(C), 0),
        (Infogain.diagonal(torch.ones(C)), C),
        (Infogain.diagonal(torch.ones(C), background=0.1), C + 1),
        (Infogain.label_smoothing(0.1, C), 2),
        (Infogain.sparse(torch.eye(C).to_sparse(), background=0.1), 3 * C + 2),
        (Infogain.dense(torch.rand(C, C)), C * C),
    ):
        assert sum(part.numel() for part in H.parts if part is not None) <= limit


def test_a_quarter_of_a_million_classes():
    C = 256_000
    logits, labels = torch.randn(2, C), torch.tensor([5, C - 1])
    for H in (Infogain.identity(), Infogain.label_smoothing(0.1, C), Infogain.diagonal(torch.ones(C), background=1e-6)):
        assert lgd.softmax_infogain_loss(logits, labels, H).isfinite()


def test_tensors_are_kept_as_they_are():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        matrix, weight = torch.rand(5, 5).to(dtype), torch.rand(5).to(dtype)
        assert Infogain.dense(matrix).parts.matrix is matrix
        assert Infogain.diagonal(weight).parts.diagonal is weight
    csr = torch.rand(5, 5, dtype=torch.float64).to_sparse_csr()
    assert Infogain.sparse(csr).parts.values.data_ptr() == csr.values().data_ptr()


def test_a_number_is_kept_in_double_precision():
    assert Infogain.diagonal(torch.ones(3), background=0.1).parts.background.item() == 0.1
    assert Infogain.label_smoothing(0.1, 3).parts.background.item() == 0.1 / 3


@pytest.mark.usefixtures("backend")
def test_a_change_in_place_is_seen():
    """Nothing about H is cached: neither its entries nor its row sums."""
    matrix, weight = torch.rand(7, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    values = torch.rand(7, 7, dtype=torch.float64)
    csr = values.to_sparse_csr()
    epsilon = torch.tensor(0.3, dtype=torch.float64)
    for H, tensor in (
        (Infogain.dense(matrix), matrix),
        (Infogain.diagonal(weight), weight),
        (Infogain.diagonal(torch.zeros(7), background=epsilon), epsilon),
        (Infogain.sparse(csr), csr.values()),
    ):
        before = loss_of(H)
        tensor.mul_(3)
        torch.testing.assert_close(loss_of(H), 3 * before)
        crit = lgd.SoftmaxInfogainLoss(H, reduction="sum")
        logits = torch.randn(7, 7, dtype=torch.float64)
        before = crit(logits, torch.arange(7))
        tensor.mul_(2)
        torch.testing.assert_close(crit(logits, torch.arange(7)), 2 * before)


@pytest.mark.parametrize("layout", ["csr", "coo", "uncoalesced", "csc", "dense"])
def test_sparse_takes_any_layout(layout):
    dense = torch.zeros(5, 5)
    dense[[0, 1, 1, 4], [3, 0, 4, 2]] = torch.tensor([1.0, 2.0, -3.0, 0.5])
    matrix = {
        "csr": dense.to_sparse_csr,
        "coo": dense.to_sparse,
        "csc": dense.to_sparse_csc,
        "dense": dense.clone,
        "uncoalesced": lambda: torch.sparse_coo_tensor(
            [[0, 1, 1, 4, 4], [3, 0, 4, 2, 2]], [1.0, 2, -3, 0.25, 0.25], (5, 5)
        ),
    }[layout]()
    H = Infogain.sparse(matrix, background=0.125)
    assert H.parts.values.tolist() == [1.0, 2.0, -3.0, 0.5]
    assert torch.equal(H.to_dense(), torch.where(dense == 0, 0.125, dense))


def test_sparse_takes_32_bit_indices():
    csr = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), torch.tensor([1.0, 2.0])
    )
    assert Infogain.sparse(csr).parts.col.dtype == torch.int64
    assert loss_of(Infogain.sparse(csr), 2).isfinite()


def test_a_stored_zero_is_an_entry():
    H = Infogain.sparse(torch.sparse_coo_tensor([[0], [1]], [0.0], (2, 2)), background=1.0)
    assert H.to_dense().tolist() == [[1.0, 0.0], [1.0, 1.0]]


# ---------------------------------------------------------------------------------------------------------------------
# from_distance
# ---------------------------------------------------------------------------------------------------------------------


def distance_matrix():
    distance = torch.rand(6, 6, dtype=torch.float64) * 4
    return (distance + distance.T).fill_diagonal_(0)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0, 30.0])
def test_from_distance(beta):
    distance = distance_matrix()
    largest = max(max(row) for row in distance.tolist())
    rows = [[math.exp(-beta * d / largest) for d in row] for row in distance.tolist()]
    expected = torch.tensor([[h / sum(row) for h in row] for row in rows], dtype=torch.float64)
    H = Infogain.from_distance(distance, beta=beta)
    assert H.kind == "dense"
    torch.testing.assert_close(H.to_dense(dtype=torch.float64), expected)


def test_from_distance_defaults_to_beta_4():
    distance = distance_matrix()
    expected = Infogain.from_distance(distance, beta=4.0).to_dense()
    assert torch.equal(Infogain.from_distance(distance).to_dense(), expected)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_from_distance_keeps_the_most_similar_classes(top_k):
    distance = distance_matrix()
    similarity = torch.exp(-2 * distance / distance.max())
    threshold = similarity.sort(dim=1, descending=True).values[:, top_k - 1 : top_k]
    kept = torch.where(similarity >= threshold, similarity, 0)
    H = Infogain.from_distance(distance, beta=2.0, top_k=top_k)
    assert H.kind == "sparse"
    assert H.parts.values.numel() == 6 * top_k
    torch.testing.assert_close(H.to_dense(dtype=torch.float64), kept / kept.sum(1, keepdim=True))


def test_from_distance_where_all_distances_are_zero():
    assert torch.equal(Infogain.from_distance(torch.zeros(4, 4)).to_dense(), torch.full((4, 4), 0.25))


def test_from_distance_is_not_changed_and_scale_does_not_matter():
    distance = distance_matrix()
    before = distance.clone()
    H = Infogain.from_distance(distance).to_dense(dtype=torch.float64)
    assert torch.equal(distance, before)
    torch.testing.assert_close(Infogain.from_distance(distance * 1000).to_dense(dtype=torch.float64), H)


# ---------------------------------------------------------------------------------------------------------------------
# The rest of the object
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_to(kind):
    H, dense = KINDS[kind](5)
    moved = H.to("meta")
    assert (moved.kind, moved.num_classes) == (H.kind, H.num_classes)
    assert all(part.device.type == "meta" for part in moved.parts if part is not None)
    assert all(part.device == DEVICE for part in H.parts if part is not None)
    on_cpu = H.to("cpu").to_dense(5, dtype=torch.float64).cpu()  # of an identity, which has no device, where torch says
    torch.testing.assert_close(on_cpu, dense.cpu(), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_repr_names_the_kind_and_what_is_stored_but_no_values(kind):
    H, _ = KINDS[kind](5)
    text = repr(H)
    assert text.startswith(f"Infogain.{H.kind}(num_classes={H.num_classes}")
    for name, part in H.parts._asdict().items():
        assert (
            (f"{name}={tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}" in text)
            if part is not None
            else name + "=" not in text
        )
    assert "tensor(" not in text


@pytest.mark.parametrize("kind", ["diagonal", "label_smoothing", "sparse", "dense_negative"])
def test_plot(kind):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    H, dense = KINDS[kind](6)
    dense = dense.cpu()
    ax = H.plot()
    assert torch.allclose(torch.from_numpy(ax.images[0].get_array().data.copy()).double(), dense, atol=1e-6)
    low, high = ax.images[0].get_clim()
    assert low <= dense.min()
    assert high >= dense.max() - 1e-6
    if dense.min() < 0:
        assert low == -high  # a diverging colour map has its middle at 0
    assert ax.get_xlabel() == "class"
    assert ax.get_ylabel() == "label"
    assert ax.get_title()
    plt.close("all")


def test_plot_into_given_axes_with_names():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    _, ax = plt.subplots()
    assert Infogain.label_smoothing(0.1, 3).plot(ax, class_names=["cat", "dog", "car"]) is ax
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cat", "dog", "car"]
    Infogain.from_distance(torch.rand(40, 40)).plot()
    ax.figure.canvas.draw()
    plt.close("all")


def test_an_H_that_requires_grad_can_be_plotted_and_shown():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    H = Infogain.dense(torch.rand(3, 3, requires_grad=True))
    H.plot()
    assert "matrix=(3, 3) float32" in repr(H)
    plt.close("all")


def test_an_identity_without_a_number_of_classes_fits_any():
    H = Infogain.identity()
    for C in (1, 3, 10):
        torch.testing.assert_close(loss_of(H, C), loss_of(None, C))
    assert torch.equal(H.to_dense(4), torch.eye(4))


# ---------------------------------------------------------------------------------------------------------------------
# Built inside a compiled function
# ---------------------------------------------------------------------------------------------------------------------

BUILDERS = {
    "identity": lambda m: Infogain.identity(),
    "diagonal": lambda m: Infogain.diagonal(m.diagonal(), background=0.1),
    "diagonal_tensor_background": lambda m: Infogain.diagonal(m[0], background=m[1, 1]),
    "label_smoothing": lambda m: Infogain.label_smoothing(0.1, 5),
    "label_smoothing_tensor": lambda m: Infogain.label_smoothing(m[0, 0], 5),
    "dense": lambda m: Infogain.dense(m),
    "from_distance": lambda m: Infogain.from_distance(m.abs()),
    "from_distance_top_k": lambda m: Infogain.from_distance(m.abs(), top_k=2),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("builder", BUILDERS)
def test_built_inside_a_compiled_function(builder):
    def run(logits, labels, matrix):
        return lgd.softmax_infogain_loss(logits, labels, BUILDERS[builder](matrix))

    torch.compiler.reset()
    logits, labels, matrix = torch.randn(4, 5), torch.randint(5, (4,)), torch.rand(5, 5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = compiled(x, labels, matrix), run(y, labels, matrix)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, y))


def test_a_check_inside_a_compiled_function_still_raises():
    def run(logits, labels, matrix):
        return lgd.softmax_infogain_loss(logits, labels, Infogain.dense(matrix))

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    logits, labels, matrix = torch.randn(4, 5), torch.randint(5, (4,)), torch.rand(5, 5)
    compiled(logits, labels, matrix)
    matrix[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"matrix: every entry must be finite, found nan at \[3, 2\]"):
        compiled(logits, labels, matrix)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_numbers_go_to_the_device_of_the_logits(monkeypatch, requires_grad):
    """A constant is written there: a copy from the CPU would wait for a GPU, and could not be part of a CUDA graph."""
    epsilon = torch.tensor(0.25, dtype=torch.float64, requires_grad=requires_grad)
    H = Infogain.label_smoothing(epsilon, 5)
    copied = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args: copied.append(tensor) or original(tensor, *args))
    parts = parts_for(H, torch.device("meta"), 5, "the logits have 5")
    for part in (parts.background, parts.diagonal):
        assert part.device.type == "meta"
        assert part.dtype == torch.float64
        assert part.shape == ()
    assert len(copied) == (2 if requires_grad else 0)
    monkeypatch.undo()
    assert parts_for(H, torch.device("cpu"), 5, "the logits have 5").diagonal is H.parts.diagonal
