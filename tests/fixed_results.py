"""The results of fixed problems, made in a process of its own: `python fixed_results.py OUT.npz [options]`.

Every build, instruction set and backend has to give the same results within `differences`. The numbers that go in are
exact in every dtype, so the results in float64 are the truth for all of them. What the process found out about its
backends it prints as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings

import numpy as np
import torch

Results = dict[str, np.ndarray]
KINDS = ("none", "diagonal_background", "label_smoothing", "sparse_background", "dense_float32", "dense_negative")
DTYPES = ("float64", "float32", "bfloat16", "float16")
CLASSES = (19, 70)
LAYOUTS = {"rows": lambda x: x, "columns": lambda x: x.T.contiguous().T}


def results(dtype: str) -> Results:
    """Loss, lse, gradient and second derivative of every problem, "kind/classes/layout/result" -> values."""
    from cases import KINDS as MAKE

    torch.manual_seed(0)
    found = {}
    for C in CLASSES:
        logits, v = _sixteenths(9, C), _sixteenths(9, C)
        labels = torch.randint(C, (9,))
        labels[4] = -100
        for kind in KINDS:
            H = _rounded(MAKE[kind](C)[0])
            for name, layout in LAYOUTS.items():
                arguments = (layout(t.to(getattr(torch, dtype))) for t in (logits, v))
                for result, value in _derivatives(*arguments, labels, H).items():
                    found[f"{kind}/{C}/{name}/{result}"] = value.detach().double().numpy()
    return found


def _rounded(H):
    """H with its numbers rounded in place: torch.randn has other last bits on another instruction set."""
    for part in [] if H is None else H.parts:
        if part is not None and part.is_floating_point():
            part.mul_(256).round_().div_(256)
    return H


def _sixteenths(*shape: int) -> torch.Tensor:
    """Random multiples of 1/16 below 16 in magnitude: exact in 8 bits."""
    return (torch.randn(shape, dtype=torch.float64) * 3).clamp(-15, 15).mul(16).round() / 16


def _derivatives(logits, v, labels, H) -> dict[str, torch.Tensor]:
    import lgd_kernels as lgd

    logits.requires_grad_()
    loss, lse = lgd.softmax_infogain_loss(logits, labels, H, reduction="none", return_lse=True, z_loss=0.25)
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    (product,) = torch.autograd.grad(grad, logits, v)
    return {"loss": loss, "lse": lse, "grad": grad, "product": product}


def differences(found: Results, truth: Results, dtype: str) -> list[str]:
    """The results in `dtype` that are further from the truth than one rounding to that dtype and 64 roundings of the
    arithmetic, relative to the largest value, explain."""
    assert found.keys() == truth.keys()
    arithmetic = torch.finfo(torch.float64 if dtype == "float64" else torch.float32).eps
    step = torch.finfo(getattr(torch, dtype)).eps
    smallest = torch.finfo(getattr(torch, dtype)).smallest_normal * step
    off = []
    for name, exact in truth.items():
        rounding = arithmetic if name.endswith("lse") else step
        allowed = rounding * np.abs(exact) + smallest + 64 * arithmetic * np.abs(exact).max()
        excess = np.abs(found[name] - exact) / allowed
        if not (excess <= 1).all():
            off.append(f"{name} in {dtype}: {np.nanmax(excess):.3g} times what is allowed")
    return off


def _try_import(backend: str) -> str:
    """What importing lgd_kernels with this LGD_BACKEND raises."""
    os.environ["LGD_BACKEND"] = backend
    try:
        import lgd_kernels  # noqa: F401
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--without-extension", action="store_true", help="as if it had not been built")
    parser.add_argument("--refused", nargs="*", default=[], help="values of LGD_BACKEND to try before the real import")
    options = parser.parse_args()
    if options.without_extension:
        sys.modules["lgd_kernels._C"] = None
    backend = os.environ.get("LGD_BACKEND", "auto")
    report: dict = {"refused": {name: _try_import(name) for name in options.refused}}
    os.environ["LGD_BACKEND"] = backend
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import lgd_kernels
    report["warnings"] = [f"{w.category.__name__}: {w.message}" for w in caught]
    from lgd_kernels import backends

    report["package"] = os.path.dirname(lgd_kernels.__file__)
    report["describe"] = backends.describe()
    report["capability"] = None if backends.extension is None else backends.extension.cpu_capability()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {f"{dtype}/{name}": value for dtype in DTYPES for name, value in results(dtype).items()}
    report["later warnings"] = [str(w.message) for w in caught if "lgd_kernels" in str(w.message)]
    np.savez(options.out, **found)
    print(json.dumps(report))


def load(path) -> dict[str, Results]:
    """What `main` saved, dtype -> results."""
    with np.load(path) as file:
        return {
            dtype: {name.removeprefix(f"{dtype}/"): file[name] for name in file if name.startswith(f"{dtype}/")}
            for dtype in DTYPES
        }


if __name__ == "__main__":
    main()
