"""How PyTorch knows the ops: pairs `sdw::<op>` and `sdw::<op>_backward`, registered with `torch.library`.

    sdw::op(inputs, options, keep) -> (result, note)
    sdw::op_backward(grad, note, inputs, options, wanted) -> the gradients of the differentiable inputs

Autograd, torch.compile and torch.func see tensors alone. What a forward pass leaves for its backward pass (a tape, a
gradient that is already known) is none: it hangs on the memory of a one-byte tensor, the note, and lives as long as
that. Autograd saves the note, and frees it when it frees what it saves. A backward pass that finds nothing there (the
note was copied, or what hung on it was handed over before) runs the forward pass again: the same bits, later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from sdw_fast.ops._backend import follow_torch

try:  # what `torch.library` itself is made of, and has no public name
    from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd, _len_torch_dispatch_stack
    from torch._C._functorch import is_legacy_batchedtensor
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError as error:
    raise ImportError(
        f"sdw_fast registers its ops with parts of PyTorch that torch {torch.__version__} does not have ({error}): "
        "install torch 2.13, with which it is tested, or a newer sdw_fast"
    ) from error

# From the gradient of the result, and which are wanted: the gradients of the differentiable inputs.
Adjoint = Callable[[Tensor, Sequence[bool]], list[Tensor | None]]

library = torch.library.Library("sdw", "FRAGMENT")


class _Memory(bytearray):
    """The byte of a note, and what hangs on it."""

    adjoint: Adjoint  # gone once it was taken
    shape: torch.Size  # of the result; another one, under vmap, is of other problems


_memories: WeakValueDictionary[int, _Memory] = WeakValueDictionary()  # by address


def _note(adjoint: Adjoint | None, shape: torch.Size) -> Tensor:
    if adjoint is None:
        return _blank()
    memory = _Memory(1)
    memory.adjoint, memory.shape = adjoint, shape
    note = torch.frombuffer(memory, dtype=torch.uint8)
    _memories[note.data_ptr()] = memory
    return note


def _blank() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device="cpu")


def _noted(note: Tensor, shape: torch.Size, once: bool) -> Adjoint | None:
    memory = _memories.get(note.data_ptr())
    if memory is None or memory.shape != shape:
        return None
    # Taken in one step: of two threads that go back through one loss at a time, one finds nothing.
    return vars(memory).pop("adjoint", None) if once else memory.adjoint


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def register(
    op: str,
    inputs: Sequence[str],
    options: str,
    run: Callable[..., tuple[Tensor, Adjoint | None]],
    *,
    result: Callable[..., Tensor],
    differentiable: int,
    once: bool,
    second: str | Callable[..., tuple[Tensor, ...]],
    problems: bool,
) -> Callable[..., Tensor]:
    """Registers an op and its backward pass, and returns what calls it, with `keep` False, for the result.

    Args:
        op: Its name.
        inputs: Names of its tensors, the differentiable ones first.
        options: The rest of its arguments, as a schema has them.
        run: From all of them and `keep`: the result, and its adjoint if `keep`, else None.
        result: From the inputs: an empty tensor like the result.
        differentiable: Number of differentiable inputs.
        once: The adjoint hands memory over, so that it can be called once.
        second: What to do where a second derivative is asked for, a sentence; or, from the gradients of the results of
            the backward pass, grad and the inputs, the gradients of grad and of the differentiable inputs.
        problems: Inputs and result have a leading dimension of independent problems, which torch.func.vmap maps onto.
    """
    count = len(inputs)
    constants = list(inputs[differentiable:])
    arguments = ", ".join([*(f"Tensor {name}" for name in inputs), options])
    gradients = ", ".join(["Tensor"] * differentiable)
    library.define(f"{op}({arguments}, bool keep) -> (Tensor, Tensor)")
    library.define(f"{op}_backward(Tensor grad, Tensor note, {arguments}, bool[] wanted) -> ({gradients})")
    forward_op = getattr(torch.ops.sdw, op).default
    backward_op = getattr(torch.ops.sdw, f"{op}_backward").default

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        follow_torch()
        value, adjoint = run(*arguments)
        return value, _note(adjoint, value.shape)

    def backward(grad: Tensor, note: Tensor, *arguments: Any) -> Any:
        follow_torch()
        adjoint = _noted(note, grad.shape, once)
        if adjoint is None:
            _, adjoint = run(*arguments[:-1], True)
        assert adjoint is not None
        return _bare(
            [grad.new_empty(0) if g is None else g for g in adjoint(grad.detach().contiguous(), arguments[-1])]
        )

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return result(*arguments[:count]), _blank()

    def fake_backward(grad: Tensor, note: Tensor, *arguments: Any) -> Any:
        like = zip(arguments, arguments[-1], strict=False)
        return _bare([grad.new_empty(tensor.shape if wanted else 0) for tensor, wanted in like])

    def save(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if any(asked := ctx.needs_input_grad[differentiable:count]):
            check_constant(op, **dict(zip(constants, asked, strict=True)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *arguments[:count])
        ctx.options = arguments[count:-1]

    def differentiate(ctx: Any, grad: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:differentiable]
        rest = (None,) * (len(constants) + len(ctx.options) + 1)
        if grad is None:
            return (*(None for _ in wanted), *rest)
        note, *tensors = ctx.saved_tensors
        # What `is_grads_batched` batches looks like any tensor.
        batched = is_legacy_batchedtensor(grad)
        gradients = _several((backward_op if batched else call_backward)(grad, note, *tensors, *ctx.options, wanted))
        return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *rest)

    def save_again(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(arguments[0], *arguments[2 : count + 2])
        ctx.rest = len(arguments) - 2 - differentiable

    def differentiate_again(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if isinstance(second, str):
            raise RuntimeError(f"{op}: the gradient cannot be differentiated a second time; {second}")
        of_grad, *of_inputs = second(*grads, *ctx.saved_tensors)
        return (of_grad, None, *of_inputs, *(None,) * ctx.rest)

    def merge(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
        moved = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
        return [tensor.flatten(0, 1) for tensor in moved]

    def vmapped_forward(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        value, note = forward_op(*merge(info, dims[:count], arguments[:count]), *arguments[count:])
        return (value.unflatten(0, (info.batch_size, -1)), note), (0, None)

    def vmapped_backward(info: Any, dims: tuple[Any, ...], grad: Tensor, note: Tensor, *arguments: Any) -> Any:
        grad, *tensors = merge(info, [dims[0], *dims[2 : count + 2]], [grad, *arguments[:count]])
        gradients = _several(backward_op(grad, note, *tensors, *arguments[count:]))
        split = [g.unflatten(0, (info.batch_size, -1)) if len(g) else g for g in gradients]
        return _bare(split), _bare([0 if len(g) else None for g in gradients])

    call = _implement(
        forward_op,
        forward,
        fake_forward,
        save,
        differentiate,
        recorded=lambda *arguments: (*arguments[:-1], True),
        returned=lambda output: output[0],
    )
    call_backward = _implement(backward_op, backward, fake_backward, save_again, differentiate_again)
    if problems:
        torch.library.register_vmap(f"sdw::{op}", vmapped_forward, lib=library)
        torch.library.register_vmap(f"sdw::{op}_backward", vmapped_backward, lib=library)
    return call


def _bare(results: list[Any]) -> Any:
    """As an op returns several results, or one."""
    return tuple(results) if len(results) > 1 else results[0]


def _several(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _implement(
    op: Any,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    recorded: Callable[..., Any] = lambda *arguments: arguments,
    returned: Callable[[Any], Any] = lambda output: output,
) -> Callable[..., Any]:
    """Registers an op of `library`: what it computes, its shapes, and its derivative; returns how to call it.

    What `torch.library.register_autograd` makes of a derivative fails under torch.func; a function of a single level,
    which PyTorch has for that, does not. `recorded` are the arguments with which the op runs where it is recorded,
    and `returned` is what a caller sees of its output.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        # The function turns gradients off, for levels of torch.func below this one, too: on again for them.
        with _AutoDispatchBelowAutograd(), torch.enable_grad(), _set_fwd_grad_enabled(True):
            output = op(*recorded(*arguments))
        save(ctx, arguments, output)
        return output

    def forward_alone(ctx: Any, *arguments: Any) -> Any:
        output = compute(*recorded(*arguments))
        save(ctx, arguments, output)
        return returned(output)

    def refuse(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op.name()} has no forward-mode derivative (jvp, jacfwd, hessian); use torch.func.vjp"
        )

    def function(forward: Callable[..., Any]) -> Any:
        rules = {"forward": forward, "backward": differentiate, "jvp": refuse}
        made: Any = type(op._opname, (_SingleLevelFunction,), {name: staticmethod(f) for name, f in rules.items()})
        return made.apply

    apply, apply_alone = function(forward), function(forward_alone)

    def autograd(*arguments: Any) -> Any:
        if _is_recorded(arguments):
            with enable_single_level_autograd_function():
                return apply(*arguments)
        with _AutoDispatchBelowAutograd():
            return op(*arguments)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _alone(arguments):
            return returned(op(*arguments))
        return apply_alone(*arguments) if _is_recorded(arguments) else returned(compute(*arguments))

    library.impl(op._opname, compute, "CompositeExplicitAutograd")
    library.impl(op._opname, autograd, "Autograd")
    torch.library.register_fake(op.name(), fake, lib=library)
    return call


def _alone(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd at most looks on, no transform, tracer or subclass, so that no dispatcher is needed."""
    if _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0:
        return False
    return _PLAIN.issuperset(map(type, arguments))


_PLAIN = {Tensor, Parameter, list, tuple, int, float, bool, str}


def _is_recorded(arguments: tuple[Any, ...]) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def check_constant(op: str, **asked: bool) -> None:
    """Raises ValueError where a gradient is asked for that the op does not have."""
    names = [name for name, gradient in asked.items() if gradient]
    if names:
        raise ValueError(
            f"{op} is not differentiable in {', '.join(names)}; pass {names[0]}.detach(), or write the loss in plain "
            "PyTorch if you need that gradient"
        )
