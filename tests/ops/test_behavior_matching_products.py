"""behavior_matching of many rows on a GPU: PyTorch's products in chunks of rows, which the CPU can do, too."""

import importlib

import pytest
import torch
from oracle import equal, random_problem, relative_error, weighted_loss
from torch import Tensor

from sdw_fast.ops import behavior_matching

module = importlib.import_module("sdw_fast.ops.behavior_matching")  # the package has the function by that name
HEADS = ["tanh", "identity", "softmax"]
WIDTHS = (5, 20, 9, 3)
MANY = module.ROWS_FOR_PRODUCTS


@pytest.fixture
def chunks(monkeypatch):
    """backend="cuda" takes CPU tensors and PyTorch's products, fewer than 9 rows a chunk; the rows of each."""
    monkeypatch.setattr(module, "resolve_backend", lambda op, backend, tensors: backend)
    monkeypatch.setattr(module, "ROWS_FOR_PRODUCTS", 1)
    monkeypatch.setattr(module, "CHUNK", 8 * sum(WIDTHS))
    rows, add_chunk = [], module._add_chunk

    def recorded(head, params, states, *rest):
        rows.append(len(states))
        return add_chunk(head, params, states, *rest)

    monkeypatch.setattr(module, "_add_chunk", recorded)
    return rows


SETTINGS_OF_2_9 = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.fixture
def settings():
    """Puts back how PyTorch multiplies."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    if SETTINGS_OF_2_9:
        for owner in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            owner.fp32_precision = "none"


def problem(rows, head="tanh", dtype=torch.float64, seed=0, widths=WIDTHS, device="cpu"):
    """params, states, targets, weights; every third weight is zero, with a target of NaN."""
    states, targets, params = random_problem(widths, rows, seed, head=head)
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    weights[1::3], targets[1::3] = 0, torch.nan
    data = [x.to(device, dtype) for x in (states, targets, weights)]
    return [p.to(device, dtype).requires_grad_() for p in params], *data


def results(case, **options):
    loss = behavior_matching(*case, **options)
    return [loss.detach(), *torch.autograd.grad(loss, case[0])]


def exact(case, head):
    params, *data = case
    params, (states, targets, weights) = (
        [p.detach().double().requires_grad_() for p in params],
        (x.double() for x in data),
    )
    loss = weighted_loss(params, states, targets.where(weights[:, None] != 0, 0), weights, head)
    return [loss.detach(), *torch.autograd.grad(loss, params)]


def check(actual, expected, tolerance):
    assert relative_error(actual[:1], expected[:1]) < tolerance
    assert relative_error(actual[1:], expected[1:]) < tolerance


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_chunks_agree_with_float64(chunks, rows, head, dtype, tolerance):
    case = problem(rows, head, dtype, seed=rows)
    check(results(case, head=head, backend="cuda"), exact(case, head), tolerance)
    assert sum(chunks) == rows
    assert max(chunks) <= 8


def test_a_single_layer(chunks):
    case = problem(40, widths=(3, 2))
    check(results(case, backend="cuda"), exact(case, "tanh"), 1e-12)


def test_problems_side_by_side_are_those_apart(chunks):
    cases = [problem(20, dtype=torch.float32, seed=seed) for seed in range(3)]
    params = [torch.stack(p).detach().requires_grad_() for p in zip(*(case[0] for case in cases), strict=True)]
    data = [torch.stack(tensors) for tensors in zip(*(case[1:] for case in cases), strict=True)]
    losses = behavior_matching(params, *data, backend="cuda")
    gradients = torch.autograd.grad(losses.sum(), params)
    with torch.no_grad():
        assert torch.equal(behavior_matching(params, *data, backend="cuda"), losses)
    for r, case in enumerate(cases):
        assert equal([losses[r], *(g[r] for g in gradients)], results(case, backend="cuda"))


def test_autocast_changes_nothing(chunks):
    case = problem(20, dtype=torch.float32)
    expected = results(case, backend="cuda")
    with torch.autocast("cpu"):
        assert equal(results(case, backend="cuda"), expected)


def test_a_second_derivative_is_refused(chunks):
    params, *data = problem(20)
    loss = behavior_matching(params, *data, backend="cuda")
    gradient = torch.autograd.grad(loss, params, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        gradient.sum().backward()


def test_a_full_gpu_is_a_memory_error_that_says_what_to_do(chunks, monkeypatch):
    def full(*arguments) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, "_add_chunk", full)
    params, *data = problem(20, dtype=torch.float32)
    with pytest.raises(MemoryError, match=r"behavior_matching: CUDA out of memory.*; use a narrower policy"):
        behavior_matching(params, *data, backend="cuda")


@pytest.mark.parametrize("rows", [8, 9])
def test_the_number_of_rows_decides(cuda_on_cpu, chunks, rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS_FOR_PRODUCTS", 9)
    case = problem(rows, dtype=torch.float32)
    check(results(case, precision="ieee", backend="cuda"), exact(case, "tanh"), 2e-6)
    assert sum(chunks) == (rows if rows == 9 else 0)


def set_nothing():
    pass


def set_for_products():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_for_all():
    torch.backends.fp32_precision = "tf32"


def set_as_before_torch_2_9():
    torch.set_float32_matmul_precision("medium")


@pytest.mark.skipif(not SETTINGS_OF_2_9, reason="PyTorch has had these settings since 2.9")
@pytest.mark.parametrize("user", [set_nothing, set_for_products, set_for_all, set_as_before_torch_2_9])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_precision_is_ours_inside_and_the_users_again(chunks, settings, user, precision, fails, monkeypatch):
    user()
    before = settings.fp32_precision
    seen, add_chunk = [], module._add_chunk

    def watched(*arguments) -> Tensor:
        seen.append(settings.fp32_precision)
        if fails:
            raise MemoryError
        return add_chunk(*arguments)

    monkeypatch.setattr(module, "_add_chunk", watched)
    params, *data = problem(20, dtype=torch.float32)
    try:
        behavior_matching(params, *data, precision=precision, backend="cuda")
    except MemoryError:
        assert fails
    assert set(seen) == {precision}
    assert settings.fp32_precision == before
    if user is set_as_before_torch_2_9:
        assert torch.get_float32_matmul_precision() == "medium"
    if user is set_for_all:  # still followed
        torch.backends.fp32_precision = "ieee"
        assert settings.fp32_precision == "ieee"


@pytest.mark.parametrize("kernel", ["cuda"], indirect=True)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [MANY - 1, MANY, 3 * MANY + 1])
def test_gpu_agrees_with_float64(kernel, settings, rows, head, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", MANY * (17 + 64 + 64 + 6))
    case = problem(rows, head, torch.float32, widths=(17, 64, 64, 6), device=kernel.device)
    expected = exact(case, head)
    found = {}
    # Whatever the user has set. An error of rounding that switches a unit off in one row of so many changes little.
    for precision, user, tolerance in (("ieee", "tf32", 1e-4), ("tf32", "ieee", 2e-2)):
        settings.fp32_precision = user
        found[precision] = results(case, head=head, precision=precision, backend="cuda")
        check(found[precision], expected, tolerance)
    assert not equal(found["ieee"], found["tf32"])


@pytest.mark.parametrize("kernel", ["cuda"], indirect=True)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_gpu_has_the_same_bits_each_time_and_side_by_side(kernel, precision):
    options = {"precision": precision, "backend": "cuda"}
    # Odd numbers of rows and parameters: the second problem starts where nothing is aligned.
    cases = [problem(MANY + 1, "tanh", torch.float32, seed, (17, 64, 64, 3), kernel.device) for seed in range(2)]
    params = [torch.stack(p).detach().requires_grad_() for p in zip(*(case[0] for case in cases), strict=True)]
    data = [torch.stack(tensors) for tensors in zip(*(case[1:] for case in cases), strict=True)]
    for _ in range(3):
        losses = behavior_matching(params, *data, **options)
        gradients = torch.autograd.grad(losses.sum(), params)
        for r, case in enumerate(cases):
            assert equal([losses[r], *(g[r] for g in gradients)], results(case, **options))


@pytest.mark.parametrize("kernel", ["cuda"], indirect=True)
def test_gpu_waits_for_nothing_and_holds_a_chunk(kernel, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1 << 26)
    case = problem(1_000_000, dtype=torch.float32, widths=(17, 256, 256, 6), device=kernel.device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 1 << 30  # all activations of all rows would be two
