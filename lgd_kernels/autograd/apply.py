"""How the Functions of this package are called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad


def _is_nested_gradient() -> bool:
    """Whether torch.func.grad or the like and another transform stand around the code that is traced."""
    layers = torch._C._functorch.get_interpreter_stack() or []
    return len(layers) > 1 and any(layer.key() == TransformType.Grad for layer in layers)


# torch.compiler.assume_constant_result, without the second that the import of torch's compiler takes
_is_nested_gradient._dynamo_marked_constant = True


def _check_traceable(args: tuple) -> None:
    """Raise, or send the call to eager code, where torch.compile would lose derivatives without a word (torch 2.13)."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        torch._dynamo.graph_break()  # torch.func.jvp inside; an error with fullgraph=True
    if forward_ad._current_level >= 0 or _is_nested_gradient():
        raise NotImplementedError(
            "derivatives of derivatives or of torch.func.vmap by torch.func inside a compiled function, and dual "
            "tensors for one, would become 0 (torch 2.13); leave the transforms outside of torch.compile"
        )


def apply(function: type[Function], with_forward_mode: type[Function], args: tuple):
    """function.apply(*args), by the cheapest way that the present tracing and transforms allow.

    function: the Function that torch.compile traces; it cannot trace one with a jvp (torch 2.13).
    with_forward_mode: the subclass that adds the jvp.
    """
    if torch.compiler.is_compiling():
        _check_traceable(args)
        # views: of an argument of a function in torch.func.grad, dynamo holds that it needs no gradient (torch 2.13)
        args = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        # torch.compile tells a forward without ctx by the number of its parameters, and there may be any (torch 2.13)
        return function.forward(*args)
    if torch._C._are_functorch_transforms_active():
        return with_forward_mode.apply(*args)
    # Function.apply inspects the signature of `forward` at every call to bind defaults, which we have none of: the
    # method below it in C takes 10 us where Function.apply takes 60
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(Function, with_forward_mode).apply(*args)
