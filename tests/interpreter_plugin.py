"""A pytest plugin (`-p interpreter_plugin`) that runs the tests of ops on the Triton kernels, in Triton's interpreter
(TRITON_INTERPRET=1): thinned, and with `--tiles=small` on tiles so small that most rows or layers take several.

interpreted_runs.py starts the processes for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.gates.pytest_plugin import keep_only, parameters, thinned

_OF_COMPILED_CODE = {"compiled", "threads"}  # fixtures
_VISITS = "test_decoupled_step.py"
_WITH_THEIR_BACKEND = ("test_local_residual.py", "test_decoupled_linear.py", _VISITS)  # others are on the CPU's
_TOO_LONG = (
    "special_long_rows",
    "40000-columns",
    "many_threads",
    "(200, 130, 140)",
    "(130, 70, 33)",
    "(64, 64, 64)",
    "bit_for_bit[triton-sizes1",
    "bit_for_bit[triton-sizes2",
    "1030",
)
# a sample of the tests of a visit, all of them with --full: they take minutes, on the kernels of decoupled_linear
_OF_A_VISIT = (
    "test_visits[",
    "test_steps_and_optional_tensors",
    "test_several_visits_with_an_optimizer",
    "test_options_of_their_own",
    "test_the_last_layer_of_a_squared_head",
    "test_softmax_infogain_head",
    "test_visits_in_16_bits",
    "test_a_net_is_its_layers[triton-7",
    "test_views_of_larger_stores[triton-1-float32-every_other_layer",
    "test_no_samples",
    "test_one_layer_has_no_hidden_values",
    "test_width_zero",
    "test_nan_of_one_sample",
)
# what the interpreter cannot show, or follows from what other tests show of the same kernels
_SAYS_NOTHING_NEW = (
    "twice_the_same_bits",
    "width_zero_after_other_layers",
    "backpropagation_is_the_equilibrium",
    "test_decoupled_linear.py::test_nan_goes_through",
)
# what a kernel does with the tiles of a row; the other tests are about what surrounds it
_ABOUT_TILES = (
    "loss_and_gradient",
    "weights_ignored_rows_and_z_loss",
    "optional_outputs",
    "gradient_through_the_lse",
    "second_derivative",
    "zero_whatever_is_in_them",
    "far_apart",
    "special_rows",
    "masked_class",
)
_MOST_CLASSES_IN_SMALL_TILES = 64


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("interpreter")
    group.addoption("--tiles", choices=("small", "as-launched"), default="as-launched")


def pytest_configure(config: pytest.Config) -> None:
    from lgd_kernels.triton_kernels import common, softmax_infogain

    assert common.INTERPRETED
    _round_to_bfloat16()
    if config.getoption("tiles") == "small":
        small = common.Tiles(rows=4, classes=16, whole=False, num_warps=1)
        softmax_infogain.tiles_for = lambda *args: small


def _round_to_bfloat16() -> None:
    """As GPUs do: Triton 3.6's interpreter cuts the last bits of float32 off, and takes bits for numbers in float64."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}
    before = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, to):
        of, dtype = source.dtype.scalar, to.scalar
        if tl.bfloat16 not in (of, dtype) or not (of.is_floating() and dtype.is_floating()) or of == dtype:
            return before(self, source, to)
        values = torch.from_numpy(np.array(source.data))  # a copy: it may not be writable
        if of == tl.bfloat16:
            made = values.view(torch.bfloat16).to(dtypes[dtype])
        else:
            made = values.to(torch.bfloat16).view(torch.uint16)
        return interpreter.TensorHandle(made.numpy(), dtype)

    interpreter.InterpreterBuilder.cast_impl = cast


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if not _OF_COMPILED_CODE & set(item.fixturenames)]
    chosen = [item for item in chosen if not any(part in item.nodeid for part in _TOO_LONG + _SAYS_NOTHING_NEW)]
    chosen = [x for x in chosen if x.path.name not in _WITH_THEIR_BACKEND or "backend" in x.fixturenames]
    if not config.getoption("full"):
        chosen = [x for x in chosen if x.path.name != _VISITS or any(part in x.nodeid for part in _OF_A_VISIT)]
    if config.getoption("tiles") == "small":
        chosen = [item for item in chosen if any(part in item.nodeid for part in _ABOUT_TILES)]
        chosen = [item for item in chosen if parameters(item).get("C", 0) <= _MOST_CLASSES_IN_SMALL_TILES]
    keep_only(thinned(chosen, 1), config, items)
