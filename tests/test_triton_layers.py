"""The Triton kernels of the layer ops without a GPU: their tests in Triton's interpreter; and three kernels compiled
ahead of time (`make gates`: all)."""

from __future__ import annotations

import pytest
import torch

from tools.gates.triton_ahead_of_time import compile_variant
from tools.gates.triton_layers import LayerVariant

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu


@pytest.mark.interpreted("test_local_residual.py", "test_decoupled_step.py")
def test_residuals_and_visits_in_the_interpreter(interpreted):
    pass


@pytest.mark.interpreted("test_decoupled_linear.py", "interpreted_layers.py", "interpreted_descriptors.py")
def test_linear_layers_in_the_interpreter(interpreted):
    pass


@pytest.mark.parametrize(
    "variant",
    [LayerVariant(kernel, "bfloat16", "tall", 90) for kernel in ("forward", "input_gradient", "weight_gradient")],
    ids=lambda variant: variant.name,
)
def test_compiled_ahead_of_time(variant):
    """No spills; wgmma; loads and stores of 16 bytes. `make gates`: every kernel, dtype and tile."""
    report, _ = compile_variant(variant)
    assert report.stack == 0
    assert list(variant.complaints(report)) == []
    assert report.tensor_cores == "wgmma.mma_async"


def test_codes():
    """Of activations and hidden losses: positions in the reference's lists."""
    from lgd_kernels import reference
    from lgd_kernels.triton_kernels import activations

    for names in (reference.ACTIVATIONS, reference.HIDDEN_LOSSES):
        assert [getattr(activations, name.upper()).value for name in names] == list(range(len(names)))


def test_residual_tiles():
    from lgd_kernels.triton_kernels.local_residual import ResidualTiles, residual_tiles

    assert residual_tiles(1, 2**20, torch.bfloat16) == ResidualTiles(1, 1024, num_warps=4)
    assert residual_tiles(300, 100, torch.float32) == ResidualTiles(8, 128, num_warps=4)
    assert residual_tiles(300, 100, torch.float64) == ResidualTiles(4, 128, num_warps=4)
    assert residual_tiles(1, 35, torch.float32) == ResidualTiles(1, 64, num_warps=1)
    for rows in (0, 1, 2, 33, 5000):
        for columns in (0, 1, 2, 33, 5000):
            tiles = residual_tiles(rows, columns, torch.float32)
            assert tiles.rows * tiles.columns <= 1024
