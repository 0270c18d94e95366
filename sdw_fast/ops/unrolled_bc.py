"""Behavior cloning unrolled and differentiated: θ_T(S) of T full-batch SGD steps, and the hypergradient through them.

    u_{t+1} = μ u_t + α g_t ,   θ_{t+1} = θ_t − u_{t+1} ,   g_t = ∇_θ L(θ_t) ,   L(θ) = 1/(N·A) Σ_i ‖π_θ(s_i) − a_i‖²

from u_0 = 0: heavy-ball momentum (Polyak 1964), as torch.optim.SGD's. No autograd graph is built. With
λ_T = ∂H/∂θ_T and v_T = 0, for t running down,

    v_t = λ_{t+1} + μ v_{t+1} ,   λ_t = λ_{t+1} − α ∇²L(θ_t) v_t ,
    ∂H/∂(s, a) −= α ∇_{s,a} ⟨g_t, v_t⟩ ,   ∂H/∂α −= ⟨g_t, v_t⟩

and one tangent pass (R-operator, Pearlmutter 1994) along v_t gives all of them: Rx is the derivative of x along v_t.
Without momentum v_t is λ_{t+1}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdw_fast import _C
from sdw_fast.ops.backend import check_precision, cuda_stream, cuda_workspace, resolve_backend
from sdw_fast.ops.mlp import check_floating, check_mlp, check_rows, mlp_activations, mlp_deltas, mlp_gradients


def unrolled_bc(
    observations: Tensor,
    actions: Tensor,
    params: Sequence[Tensor],
    *,
    steps: int,
    lr: float | Tensor,
    momentum: float = 0.0,
    window: int | None = None,
    tape: str = "full",
    precision: str = "tf32",
    backend: str = "auto",
) -> list[Tensor]:
    """Trains a ReLU policy with tanh output by full-batch behavior cloning and returns its parameters, differentiably.

    Each of `steps` SGD steps descends 1/(N·A) Σ_i ‖π_θ(s_i) − a_i‖². Any outer loss of the result can call
    `.backward()`: the gradient (the hypergradient) is exact, computed in closed form, for the tensors that require it.
    It cannot be differentiated a second time. At many steps the training itself is chaotic, so that hypergradients of
    different backends, each right along its own trajectory, may differ.

    R independent problems of one shape (seeds, initializations, datasets) run side by side in backend "cuda", one after
    another in the others, when every tensor has a leading dimension R: observations (R, N, D), actions (R, N, A), each
    parameter (R, …), and so each result. `lr` may then be a tensor (R,).

    Args:
        observations: (N, D) states, normalized as the policy shall see them.
        actions: (N, A) targets in [-1, 1].
        params: [W1, b1, W2, b2, …] at the start, in `torch.nn.Linear` layout, W (out, in); depth ≥ 1.
        steps: T ≥ 1, inner SGD steps.
        lr: α, the inner learning rate: a float, or a scalar tensor (of any device) if its gradient is wanted.
        momentum: μ in [0, 1) of the inner steps; 0 is plain SGD.
        window: K: go back through the last K steps only (truncated backpropagation through time), with θ_{T−K}
            and its velocity taken as constants. `params` then receive λ_{T−K}, the gradient for θ_{T−K}, as first-order
            meta-learning takes it. None: all steps, the exact hypergradient.
        tape: "full" keeps every step's parameters and activations for the backward pass; "recompute" keeps
            parameters every ~√K steps and runs each stretch again: the same bits, about √K times less memory, a
            third more time.
        precision: Of the products in backend "cuda": "tf32", operands rounded to 10 bits of mantissa for the tensor
            cores, sums and parameters in float32; or "ieee", float32 throughout. The others compute in the tensors' own
            precision.
        backend: "auto", "cpu", "cuda" or "torch"; "torch" also takes float64.

    Returns:
        The parameters after T steps, in the layout of `params`.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options are not as said.
        MemoryError: a compiled backend's tape would not fit the memory available.
    """
    batched = isinstance(observations, Tensor) and observations.ndim == 3
    if batched:
        _check_batch(observations, actions, params)
        _check_problem(observations[0], actions[0], [param[0] for param in params])
    else:
        _check_problem(observations, actions, params)
    if steps < 1:
        raise ValueError(f"unrolled_bc: steps must be at least 1, got {steps}")
    if window is not None and not 1 <= window <= steps:
        raise ValueError(f"unrolled_bc: window must be between 1 and steps = {steps}, or None, got {window}")
    if tape not in ("full", "recompute"):
        raise ValueError(f"unrolled_bc: tape must be 'full' or 'recompute', got {tape!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"unrolled_bc: momentum must be in [0, 1), got {momentum}")
    check_precision("unrolled_bc", precision)
    resolved = resolve_backend("unrolled_bc", backend, [observations, actions, *params])
    schedule = _Schedule(steps, window or steps, float(momentum), tape == "recompute", precision == "ieee")
    if isinstance(lr, Tensor):
        if lr.numel() != 1 and not (batched and lr.shape == observations.shape[:1]):
            expected = "a float, a scalar tensor or a tensor (R,)" if batched else "a float or a scalar tensor"
            raise ValueError(f"unrolled_bc: lr must be {expected}, got shape {tuple(lr.shape)}")
        lr = lr.reshape(()).to(observations) if lr.numel() == 1 else lr.to(observations)
    elif not math.isfinite(lr):
        raise ValueError(f"unrolled_bc: lr must be finite, got {lr}")
    if resolved == "cuda":
        return _cuda(schedule, lr, observations, actions, params, batched)
    function = {"torch": _TorchUnrolledBC, "cpu": _CPUUnrolledBC}[resolved]
    if not batched:
        return list(function.apply(schedule, lr, observations, actions, *params))
    rates = lr.expand(len(observations)) if isinstance(lr, Tensor) else [lr] * len(observations)
    trained = [
        function.apply(schedule, rates[i], observations[i], actions[i], *(param[i] for param in params))
        for i in range(len(observations))
    ]
    return [torch.stack(tensors) for tensors in zip(*trained, strict=True)]


def _check_batch(observations: Tensor, actions: Tensor, params: Sequence[Tensor]) -> None:
    tensors = {"actions": actions, **{f"params[{i}]": param for i, param in enumerate(params)}}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"unrolled_bc: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.ndim == 0 or tensor.shape[0] != observations.shape[0] or tensor.shape[0] == 0:
            raise ValueError(
                f"unrolled_bc: with observations {tuple(observations.shape)} of {observations.shape[0]} problems, "
                f"{name} must have that leading dimension, at least 1; got shape {tuple(tensor.shape)}"
            )


def _check_problem(observations: Tensor, actions: Tensor, params: Sequence[Tensor]) -> None:
    check_floating("unrolled_bc", observations=observations, actions=actions)
    check_rows("unrolled_bc", observations=observations, actions=actions)
    check_mlp("unrolled_bc", params, observations, actions)


class _Schedule(NamedTuple):
    steps: int
    window: int
    momentum: float
    recompute: bool
    ieee: bool  # backend "cuda" only

    def segments(self) -> list[int]:
        """Lengths of the stretches of the window whose tape is held at one time, first to last."""
        length = math.isqrt(self.window - 1) + 1 if self.recompute else self.window
        full, rest = divmod(self.window, length)
        return [length] * full + [rest] * (rest > 0)


class _Step(NamedTuple):
    """What one inner step leaves for its adjoint."""

    params: list[Tensor]  # θ_t
    activations: list[Tensor]  # h_0 … h_{L-1}, a
    deltas: list[Tensor]  # δ_1 … δ_L


class _TorchUnrolledBC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, schedule: _Schedule, lr: float | Tensor, observations: Tensor, actions: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        alpha = lr.detach() if isinstance(lr, Tensor) else lr
        descent = _Descent(observations, actions, alpha, schedule.momentum)
        state = _State(list(params), [torch.zeros_like(param) for param in params])
        for _ in range(schedule.steps - schedule.window):
            state, _ = descent.step(state)
        ctx.segments = []  # (state at the start, its steps or none: run them again, their number)
        keep = any(ctx.needs_input_grad)
        for length in schedule.segments():
            start = state
            recorded = []
            for _ in range(length):
                state, step = descent.step(state)
                if keep and not schedule.recompute:
                    recorded.append(step)
            if keep:
                ctx.segments.append((start, recorded, length))
        ctx.alpha, ctx.momentum = alpha, schedule.momentum
        ctx.save_for_backward(observations, actions, *params)  # params: to refuse their change in place
        return tuple(state.theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_params: Tensor) -> tuple[Any, ...]:
        observations, actions, *_ = ctx.saved_tensors
        _, needs_lr, needs_observations, needs_actions, *needs_params = ctx.needs_input_grad
        adjoint = list(grad_params)
        direction = [torch.zeros_like(grad) for grad in adjoint]
        descent = _Descent(observations, actions, ctx.alpha, ctx.momentum)
        grad_observations = torch.zeros_like(observations)
        grad_actions = torch.zeros_like(actions)
        grad_lr = observations.new_zeros(())
        for start, recorded, length in reversed(ctx.segments):
            for step in reversed(recorded or descent.record(start, length)):
                direction = [torch.add(a, v, alpha=ctx.momentum) for a, v in zip(adjoint, direction, strict=True)]
                adjoint, d_observations, d_actions, d_lr = _adjoint_step(step, actions, adjoint, direction, ctx.alpha)
                grad_observations -= d_observations
                grad_actions -= d_actions
                grad_lr -= d_lr
        return (
            None,
            grad_lr if needs_lr else None,
            grad_observations if needs_observations else None,
            grad_actions if needs_actions else None,
            *(grad if needed else None for grad, needed in zip(adjoint, needs_params, strict=True)),
        )


class _CPUUnrolledBC(torch.autograd.Function):
    """The kernel of csrc/cpu/unrolled_bc.cpp; the tape copies its inputs and lives as long as the graph."""

    @staticmethod
    def forward(
        ctx: Any, schedule: _Schedule, lr: float | Tensor, observations: Tensor, actions: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        trained = tuple(torch.empty(param.shape) for param in params)
        ctx.tape = _C.unrolled_bc(
            observations.detach().contiguous(),
            actions.detach().contiguous(),
            [param.detach().contiguous() for param in params],
            trained,
            steps=schedule.steps,
            window=schedule.window,
            lr=float(lr),
            momentum=schedule.momentum,
            recompute=schedule.recompute,
            keep_tape=any(ctx.needs_input_grad),
        )
        ctx.shapes = observations.shape, actions.shape
        return trained

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_params: Tensor) -> tuple[Any, ...]:
        _, needs_lr, *needs_data = ctx.needs_input_grad[:4]
        needs_params = ctx.needs_input_grad[4:]
        grad_data = [
            torch.empty(shape) if needed else None for shape, needed in zip(ctx.shapes, needs_data, strict=True)
        ]
        grad_start = [torch.empty(grad.shape) for grad in grad_params] if any(needs_params) else None
        grad_lr = ctx.tape.backward([grad.contiguous() for grad in grad_params], *grad_data, grad_start)
        return (
            None,
            torch.tensor(grad_lr, dtype=torch.float32) if needs_lr else None,
            *grad_data,
            *(grad if needed else None for grad, needed in zip(grad_start or grad_params, needs_params, strict=True)),
        )


def _cuda(
    schedule: _Schedule,
    lr: float | Tensor,
    observations: Tensor,
    actions: Tensor,
    params: Sequence[Tensor],
    batched: bool,
) -> list[Tensor]:
    """All problems' data as the kernel takes it: a row a problem, its parameters one behind the other."""
    problems = len(observations) if batched else 1
    shapes = [param.shape[1:] if batched else param.shape for param in params]
    rates = lr.expand(problems) if isinstance(lr, Tensor) else observations.new_full((problems,), lr)
    trained = _CUDAUnrolledBC.apply(
        schedule,
        [observations.shape[-1], *(shape[0] for shape in shapes[1::2])],
        rates.reshape(problems, 1),
        observations.reshape(problems, -1),
        actions.reshape(problems, -1),
        torch.cat([param.reshape(problems, -1) for param in params], dim=1),
    )
    parts = trained.split([shape.numel() for shape in shapes], dim=1)
    return [part.reshape(*([problems] if batched else []), *shape) for part, shape in zip(parts, shapes, strict=True)]


class _CUDAUnrolledBC(torch.autograd.Function):
    """The kernels of csrc/cuda/unrolled_bc.cu; the workspace holds the tape and lives as long as the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        schedule: _Schedule,
        widths: list[int],
        lr: Tensor,
        observations: Tensor,
        actions: Tensor,
        params: Tensor,
    ) -> Tensor:
        ctx.problem = _C.UnrolledBCCudaProblem(
            problems=len(observations),
            rows=observations.shape[1] // widths[0],
            widths=widths,
            steps=schedule.steps,
            window=schedule.window,
            momentum=schedule.momentum,
            keep_tape=any(ctx.needs_input_grad),
            recompute=schedule.recompute,
            ieee=schedule.ieee,
        )
        ctx.lr = lr.detach().clone(memory_format=torch.contiguous_format)
        ctx.shapes = observations.shape, actions.shape, params.shape
        ctx.again = False
        trained = torch.empty_like(params)
        advice = (
            f"a smaller window or fewer rows need less{'' if schedule.recompute else ', and so does tape=recompute'}"
        )
        with cuda_stream(observations) as stream:
            ctx.workspace = cuda_workspace("unrolled_bc", ctx.problem.workspace, observations.device, advice)
            _C.unrolled_bc_cuda(
                ctx.problem,
                observations.detach().contiguous(),
                actions.detach().contiguous(),
                params.detach().contiguous(),
                ctx.lr,
                trained,
                ctx.workspace,
                stream,
            )
        if not any(ctx.needs_input_grad):
            ctx.workspace = None
        return trained

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_trained: Tensor) -> tuple[Any, ...]:
        grad_lr = torch.empty_like(ctx.lr)
        grad_observations, grad_actions, grad_params = (
            grad_trained.new_empty(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[3:], strict=True)
        )
        with cuda_stream(grad_trained) as stream:
            _C.unrolled_bc_cuda_backward(
                ctx.problem,
                ctx.again,
                grad_trained.contiguous(),
                ctx.lr,
                grad_observations,
                grad_actions,
                grad_params,
                grad_lr,
                ctx.workspace,
                stream,
            )
        ctx.again = True
        return None, None, grad_lr, grad_observations, grad_actions, grad_params


class _State(NamedTuple):
    """Where the descent stands."""

    theta: list[Tensor]
    velocity: list[Tensor]  # u


class _Descent(NamedTuple):
    """Behavior cloning, step by step."""

    observations: Tensor
    actions: Tensor
    alpha: float | Tensor
    momentum: float

    def step(self, state: _State) -> tuple[_State, _Step]:
        activations = mlp_activations(state.theta, self.observations)
        output = activations[-1]  # (N, A)
        output_delta = 2 / output.numel() * (output - self.actions) * (1 - output * output)
        deltas = mlp_deltas(state.theta, activations, output_delta)
        gradients = mlp_gradients(activations, deltas)
        velocity = [self.momentum * u + self.alpha * g for u, g in zip(state.velocity, gradients, strict=True)]
        theta = [param - u for param, u in zip(state.theta, velocity, strict=True)]
        return _State(theta, velocity), _Step(state.theta, activations, deltas)

    def record(self, state: _State, length: int) -> list[_Step]:
        steps = []
        for _ in range(length):
            state, step = self.step(state)
            steps.append(step)
        return steps


def _adjoint_step(
    step: _Step, actions: Tensor, adjoint: list[Tensor], direction: list[Tensor], alpha: float | Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """From λ_{t+1} and the direction v to λ_t, α ∇_s⟨g, v⟩ (N, D), α ∇_a⟨g, v⟩ (N, A) and ⟨g, v⟩."""
    theta, activations, deltas = step
    layers = len(deltas)
    # Forward: Rz_l = Rh_{l-1} W_lᵀ + h_{l-1} V_lᵀ + v_l, masked where the ReLU is off; the observations do not move.
    tangents: list[Tensor] = [torch.zeros_like(activations[0])]  # Rh_l, (N, width)
    for layer in range(layers):
        weight = theta[2 * layer]
        tangent = torch.addmm(direction[2 * layer + 1], activations[layer], direction[2 * layer].t())
        if layer > 0:
            tangent.addmm_(tangents[layer], weight.t())
        if layer < layers - 1:
            tangent *= activations[layer + 1] > 0
        tangents.append(tangent)
    # Output: a = tanh(z), δ_L = c (a − y)(1 − a²), so Rδ_L = c ((1 − a²) Ra − 2 (a − y) a Ra).
    output = activations[-1]
    slope = 1 - output * output
    residual = output - actions
    scale = 2 / actions.numel()
    tangent_output = slope * tangents[-1]
    tangent_delta = scale * (slope - 2 * residual * output) * tangent_output
    lr_gradient = scale * (residual * tangent_output).sum()
    # Backward: Rδ_{l-1} = m_{l-1} ∘ (Rδ_l W_l + δ_l V_l); (Hv)_l = δ_lᵀ Rh_{l-1} + Rδ_lᵀ h_{l-1}.
    result: list[Tensor] = []
    for layer in range(layers - 1, -1, -1):
        curvature = tangent_delta.t() @ activations[layer]
        if layer > 0:
            curvature.addmm_(deltas[layer].t(), tangents[layer])
        bias_curvature = tangent_delta.sum(0)
        result = [
            adjoint[2 * layer] - alpha * curvature,
            adjoint[2 * layer + 1] - alpha * bias_curvature,
            *result,
        ]
        tangent_delta = tangent_delta @ theta[2 * layer]
        tangent_delta.addmm_(deltas[layer], direction[2 * layer])
        if layer > 0:
            tangent_delta *= activations[layer] > 0
    return result, alpha * tangent_delta, -alpha * scale * tangent_output, lr_gradient
