"""Behavior cloning unrolled and differentiated: θ_T(S) of T full-batch SGD steps, and the hypergradient through them.

    u_{t+1} = μ u_t + α g_t ,   θ_{t+1} = θ_t − u_{t+1} ,   g_t = ∇_θ L(θ_t)

from u_0 = 0: heavy-ball momentum (Polyak 1964), as torch.optim.SGD's. L is the mean loss of the policy's head
(_head.py), with tanh 1/(N·A) Σ_i ‖π_θ(s_i) − a_i‖². No autograd graph is built. With λ_T = ∂H/∂θ_T and v_T = 0, for t
running down,

    v_t = λ_{t+1} + μ v_{t+1} ,   λ_t = λ_{t+1} − α ∇²L(θ_t) v_t ,
    ∂H/∂(s, a) −= α ∇_{s,a} ⟨g_t, v_t⟩ ,   ∂H/∂α −= ⟨g_t, v_t⟩

and one tangent pass (R-operator, Pearlmutter 1994) along v_t gives all of them: Rx is the derivative of x along v_t.
Without momentum v_t is λ_{t+1}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdw_fast.ops._backend import (
    _C,
    check_precision,
    cuda_stream,
    cuda_workspace,
    resolve_backend,
    views,
    without_autocast,
)
from sdw_fast.ops._head import HEADS, Identity, check_head, one_hot
from sdw_fast.ops._mlp import (
    check_floating,
    check_mlp,
    check_problems,
    check_rows,
    check_tape,
    cut,
    flatten,
    layer_widths,
    learning_rates,
    mlp_activations,
    mlp_deltas,
    side_by_side,
    unflatten,
)
from sdw_fast.ops._registration import Adjoint, register


def unrolled_bc(
    observations: Tensor,
    actions: Tensor,
    params: Iterable[Tensor],
    *,
    steps: int,
    lr: float | Tensor,
    momentum: float = 0.0,
    window: int | None = None,
    head: str = "tanh",
    tape: str = "full",
    precision: str = "tf32",
    backend: str = "auto",
) -> list[Tensor]:
    """Trains a ReLU policy by full-batch behavior cloning and returns its parameters, differentiably.

    Each of `steps` SGD steps descends the mean loss of the policy's head. With z the output of its last layer:

    | head | policy | loss | targets |
    | --- | --- | --- | --- |
    | "tanh" | a = tanh(z) | 1/(N·A) Σ_i ‖a_i − y_i‖² | actions in [-1, 1] |
    | "identity" | a = z | 1/(N·A) Σ_i ‖a_i − y_i‖² | any real numbers |
    | "softmax" | p = softmax(z) | −1/N Σ_i Σ_j y_ij log p_ij | probabilities of A classes, or class numbers |

    Any outer loss of the result can call
    `.backward()`: the gradient (the hypergradient) is exact, computed in closed form, for the tensors that require it.
    It cannot be differentiated a second time. At many steps the training itself is chaotic, so that hypergradients of
    different backends, each right along its own trajectory, may differ.

    R independent problems of one shape (seeds, initializations, datasets) run side by side, in backend "cpu" a thread
    each, in "torch" one after another, when every tensor has a leading dimension R: observations (R, N, D), actions
    (R, N, A), each parameter (R, …), and so each result. `lr` may then be a tensor (R,).

    Args:
        observations: (N, D) states, normalized as the policy shall see them.
        actions: (N, A) targets y. With "softmax" they need not add up to 1; or class numbers from 0 to A − 1, (N,) of
            an integer dtype, which have no gradient.
        params: [W1, b1, W2, b2, …] at the start, in `torch.nn.Linear` layout, W (out, in); depth ≥ 1.
        steps: T ≥ 1, inner SGD steps.
        lr: α, the inner learning rate: a float, or a scalar tensor (of any device) if its gradient is wanted.
        momentum: μ in [0, 1) of the inner steps; 0 is plain SGD.
        window: K: go back through the last K steps only (truncated backpropagation through time), with θ_{T−K}
            and its velocity taken as constants. `params` then receive λ_{T−K}, the gradient for θ_{T−K}, as first-order
            meta-learning takes it. None: all steps, the exact hypergradient.
        head: "tanh", "identity" or "softmax", as above.
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
        MemoryError: a compiled backend's tape would not fit the memory available; see `unrolled_bc_memory`.
    """
    params = list(params)
    check_head("unrolled_bc", head)
    actions = one_hot("unrolled_bc", head, params, actions=actions)
    if batched := isinstance(observations, Tensor) and observations.ndim == 3:
        problems = check_problems("unrolled_bc", params, observations=observations, actions=actions)
        _check_problem(observations[0], actions[0], [param[0] for param in params])
    else:
        problems = 1
        _check_problem(observations, actions, params)
    check_tape(steps, window, tape)
    if not 0 <= momentum < 1:
        raise ValueError(f"unrolled_bc: momentum must be in [0, 1), got {momentum}")
    check_precision("unrolled_bc", precision)
    resolved = resolve_backend("unrolled_bc", backend, [observations, actions, *params])
    data = [learning_rates(lr, observations, batched)]  # (R,)
    data += [tensor if batched else tensor[None] for tensor in (observations, actions)]
    data += [flatten(params, problems)]
    recompute, ieee = tape == "recompute", precision == "ieee"
    options = layer_widths(params), head, steps, window or steps, float(momentum), recompute, ieee, resolved
    trained = _op(*data, *options, False)
    return unflatten(trained, params)


def _check_problem(observations: Tensor, actions: Tensor, params: Sequence[Tensor]) -> None:
    check_floating("unrolled_bc", observations=observations, actions=actions)
    check_rows("unrolled_bc", observations=observations, actions=actions)
    check_mlp("unrolled_bc", params, observations, actions)


class _Schedule(NamedTuple):
    steps: int
    window: int
    momentum: float
    recompute: bool

    def segments(self) -> list[int]:
        """Lengths of the stretches of the window whose tape is held at one time, first to last."""
        length = math.isqrt(self.window - 1) + 1 if self.recompute else self.window
        full, rest = divmod(self.window, length)
        return [length] * full + [rest] * (rest > 0)


class _Step(NamedTuple):
    """What one inner step leaves for its adjoint."""

    params: list[Tensor]  # θ_t
    activations: list[Tensor]  # h_0 … h_{L-1}, and the output
    deltas: list[Tensor]  # δ_1 … δ_L


class _State(NamedTuple):
    """Where the descent stands."""

    theta: list[Tensor]
    velocity: list[Tensor]  # u


class _Descent(NamedTuple):
    """Behavior cloning, step by step."""

    observations: Tensor  # (N, D)
    actions: Tensor  # (N, A)
    alpha: Tensor
    head: Identity
    momentum: float

    def step(self, state: _State) -> tuple[_State, _Step]:
        theta = state.theta
        *activations, z = mlp_activations(theta, self.observations)
        # Output: δ_L = c e∘slope.
        output = self.head.output(z)  # (N, A)
        activations.append(output)
        delta = self.head.delta(self.head.scale(*z.shape) * self.head.error(output, self.actions), output)  # (N, A)
        deltas = [*mlp_deltas(theta, activations, delta)][::-1]
        # Weights: g_l = δ_lᵀ h_{l-1}, and the column sums of δ_l.
        gradients: list[Tensor] = []
        for delta, h in zip(deltas, activations[:-1], strict=True):
            gradients += [delta.t() @ h, delta.sum(0)]  # (out, in), (out,)
        velocity = [self.momentum * u + self.alpha * g for u, g in zip(state.velocity, gradients, strict=True)]
        moved = [param - u for param, u in zip(theta, velocity, strict=True)]
        return _State(moved, velocity), _Step(theta, activations, deltas)

    def record(self, state: _State, length: int) -> list[_Step]:
        steps = []
        for _ in range(length):
            state, step = self.step(state)
            steps.append(step)
        return steps


def _adjoint_step(
    step: _Step, descent: _Descent, adjoint: list[Tensor], direction: list[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """From λ_{t+1} and the direction v to λ_t, α ∇_s⟨g, v⟩ (N, D), α ∇_a⟨g, v⟩ (N, A) and ⟨g, v⟩."""
    theta, activations, deltas = step
    _, actions, alpha, head, _ = descent
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
    # Output: Rδ_L = c curvature∘moved.
    output = activations[-1]
    error = head.error(output, actions)
    moved = head.moved(output, tangents[-1])
    scale = head.scale(*output.shape)
    tangent_delta = scale * head.curvature(output, actions, error) * moved
    lr_gradient = scale * (error * moved).sum()
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
    return result, alpha * tangent_delta, -alpha * scale * moved, lr_gradient


class _TwinTape:
    """One problem in PyTorch; the R-operator, not autograd, differentiates it."""

    def __init__(self, descent: _Descent, schedule: _Schedule) -> None:
        self.descent, self.schedule = descent, schedule
        self.segments: list[tuple[_State, list[_Step], int]] = []  # start, its steps or none: run them again, number

    def train(self, params: list[Tensor], keep: bool) -> list[Tensor]:
        """Returns θ_T; `adjoint` may follow if `keep`."""
        state = _State(params, [torch.zeros_like(param) for param in params])
        for _ in range(self.schedule.steps - self.schedule.window):
            state, _ = self.descent.step(state)
        for length in self.schedule.segments():
            start = state
            recorded = []
            for _ in range(length):
                state, step = self.descent.step(state)
                if keep and not self.schedule.recompute:
                    recorded.append(step)
            if keep:
                self.segments.append((start, recorded, length))
        return state.theta

    def adjoint(self, grad_params: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """From ∂H/∂θ_T to the gradients of α, observations, actions and the parameters at the window's start."""
        observations, actions, momentum = self.descent.observations, self.descent.actions, self.descent.momentum
        adjoint = grad_params
        direction = [torch.zeros_like(grad) for grad in adjoint]
        grad_observations = torch.zeros_like(observations)
        grad_actions = torch.zeros_like(actions)
        grad_lr = observations.new_zeros(())
        for start, recorded, length in reversed(self.segments):
            for step in reversed(recorded or self.descent.record(start, length)):
                direction = [torch.add(a, v, alpha=momentum) for a, v in zip(adjoint, direction, strict=True)]
                adjoint, d_observations, d_actions, d_lr = _adjoint_step(step, self.descent, adjoint, direction)
                grad_observations -= d_observations
                grad_actions -= d_actions
                grad_lr -= d_lr
        return grad_lr, grad_observations, grad_actions, adjoint


def _run_twin(
    schedule: _Schedule,
    widths: list[int],
    head: str,
    lr: Tensor,
    observations: Tensor,
    actions: Tensor,
    params: Tensor,
    keep: bool,
) -> tuple[Tensor, Adjoint]:
    with without_autocast(params.device):
        tapes = [
            _TwinTape(_Descent(*problem, HEADS[head], schedule.momentum), schedule)
            for problem in zip(observations, actions, lr, strict=True)
        ]
        starts = map(list, zip(*cut(params, widths), strict=True))
        ends = [tape.train(start, keep) for tape, start in zip(tapes, starts, strict=True)]

    def adjoint(grad_trained: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        with without_autocast(params.device):
            grads = map(list, zip(*cut(grad_trained.detach(), widths), strict=True))
            *data, ends = zip(*(tape.adjoint(grad) for tape, grad in zip(tapes, grads, strict=True)), strict=True)
            gradients = [*map(torch.stack, data), side_by_side(ends)]
        return [gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)]

    return side_by_side(ends), adjoint


def _run(
    lr: Tensor,  # (R,)
    observations: Tensor,  # (R, N, D)
    actions: Tensor,  # (R, N, A)
    params: Tensor,  # (R, P)
    widths: list[int],
    head: str,
    steps: int,
    window: int,
    momentum: float,
    recompute: bool,
    ieee: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Adjoint | None]:
    """The twin, or the kernels of csrc/cpu/unrolled_bc and csrc/cuda/unrolled_bc.cu. A tape copies its inputs."""
    if backend == "torch":
        lr, observations, actions, params = (t.detach() for t in (lr, observations, actions, params))
        schedule = _Schedule(steps, window, momentum, recompute)
        trained, adjoint = _run_twin(schedule, widths, head, lr, observations, actions, params, keep)
        return trained, adjoint if keep else None
    problems, rows, _ = observations.shape
    options = _C.UnrolledBCOptions(
        problems=problems,
        rows=rows,
        widths=widths,
        steps=steps,
        window=window,
        head=head,
        momentum=momentum,
        keep_tape=keep,
        recompute=recompute,
        ieee=ieee,
    )
    trained = params.new_empty(params.shape)
    s, a, start, rates, end = views(observations, actions, params, lr, trained)
    if backend == "cpu":
        tape = _C.unrolled_bc_cpu(options, s, a, start, rates, end)
    else:
        advice = "a smaller window or fewer rows need less"
        advice += "" if recompute else ", and so does tape=recompute"
        with cuda_stream(observations) as stream:
            size = _C.unrolled_bc_cuda_workspace(options)
            workspace = cuda_workspace("unrolled_bc", size, observations.device, advice)
            tape = _C.unrolled_bc_cuda(options, s, a, start, rates, end, workspace, stream)
    if tape is None:
        return trained, None
    shapes = [tensor.shape for tensor in (lr, observations, actions, params)]

    def adjoint_of_tape(grad_trained: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        grad_lr, *gradients = (
            grad_trained.new_empty(shape) if needed else None
            for shape, needed in zip(shapes, [True, *wanted[1:]], strict=True)
        )
        with cuda_stream(grad_trained) as stream:
            end, s, a, start, rates = views(grad_trained, *gradients, grad_lr)
            tape.backward(end, s, a, start, rates, stream)
        return [grad_lr if wanted[0] else None, *gradients]

    return trained, adjoint_of_tape


_op = register(
    "unrolled_bc",
    ["lr", "observations", "actions", "params"],
    "SymInt[] widths, str head, SymInt steps, SymInt window, float momentum, bool recompute, bool ieee, str backend",
    _run,
    result=lambda lr, observations, actions, params, *_: params.new_empty(params.shape),
    differentiable=4,
    once=False,
    second="detach() it, or unroll the steps in plain PyTorch if you need that",
    problems=True,
)
