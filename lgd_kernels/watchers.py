"""Whether anybody watches or overrides the ops of a call. If not, a kernel may be called past the dispatcher, which
takes 20 us for an op with many arguments, and 70 where other code has had the caches since the last call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_eager() -> bool:
    """Whether no compiler, jit tracer or transform watches this call, and no tangents are carried along."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_overridden(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a subclass or a mode wants to see the ops that are called with these tensors."""
    return (
        torch._C._has_torch_function(tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def is_plain(tensors: list[Tensor]) -> bool:
    """Whether a call with these tensors concerns nobody else: no compiler, transform, mode, profiler or subclass."""
    return (
        is_eager()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and not is_overridden(tensors)
        and not torch.autograd._profiler_enabled()
    )
