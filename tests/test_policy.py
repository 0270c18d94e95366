import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast.distill import DistillConfig
from sdw_fast.policy import _cholesky_qr, orthogonal_parameters


def make_set(n: int = 20, config: dict | None = None, low: float = -1.0, high: float = 1.0) -> sdw.SyntheticDataset:
    rng = np.random.default_rng(1)
    observations = rng.normal(2, 3, size=(n, 4)).astype(np.float32)
    return sdw.SyntheticDataset(
        observations=observations,
        actions=((high - low) / 2 * np.tanh(observations[:, :2] / 3) + (high + low) / 2).astype(np.float32),
        normalizer=sdw.Normalizer.fit(observations),
        action_low=np.full(2, low, np.float32),
        action_high=np.full(2, high, np.float32),
        config=config or {},
    )


@pytest.mark.parametrize("sizes", [(3, 5), (11, 256, 256, 3), (7, 3, 9, 1)])
def test_orthogonal_parameters_have_orthogonal_rows_or_columns(sizes: tuple[int, ...]) -> None:
    params = orthogonal_parameters(sizes, gain=2.0, generator=torch.Generator().manual_seed(0))
    for weight, bias, fan_in, fan_out in zip(params[0::2], params[1::2], sizes[:-1], sizes[1:], strict=True):
        assert weight.shape == (fan_out, fan_in)
        assert weight.is_contiguous()
        gram = weight.T @ weight if fan_out >= fan_in else weight @ weight.T
        torch.testing.assert_close(gram, 4.0 * torch.eye(min(fan_in, fan_out)), atol=1e-4, rtol=0)
        assert not bias.any()


def test_orthogonal_parameters_of_several_generators() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    together = orthogonal_parameters((4, 8, 2), gain=1.5, generator=generators)
    for run, seed in enumerate((3, 4)):
        alone = orthogonal_parameters((4, 8, 2), gain=1.5, generator=torch.Generator().manual_seed(seed))
        for a, b in zip(together, alone, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a[run], b)


@pytest.mark.parametrize("shape", [(1, 1), (256, 17), (3, 64, 64)])
def test_cholesky_qr_is_the_qr_with_positive_diagonal(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(x.double())
    expected = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    torch.testing.assert_close(_cholesky_qr(x).double(), expected, rtol=0, atol=1e-6)


def test_cholesky_qr_of_an_almost_singular_matrix_is_orthogonal() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] = x[:, 6] * (1 + 1e-7)
    q = _cholesky_qr(x).double()
    torch.testing.assert_close(q.T @ q, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-6)


def test_orthogonal_parameters_follow_their_generator() -> None:
    first, same, other = (
        orthogonal_parameters((4, 8, 2), gain=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


def test_policy_by_hand() -> None:
    # one layer: a = center + half · tanh(w · (s − mean)/scale + b), bounds [0, 4]: center 2, half 2
    policy = sdw.MLPPolicy(
        [torch.tensor([[2.0]]), torch.tensor([0.5])],
        mean=np.array([1.0]),
        scale=np.array([2.0]),
        action_low=np.array([0.0]),
        action_high=np.array([4.0]),
    )
    expected = 2 + 2 * np.tanh(2.0 * (3.0 - 1.0) / 2.0 + 0.5)
    assert float(policy(torch.tensor([3.0])).detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_behavior_clone_is_full_batch_sgd(momentum: float) -> None:
    synthetic = make_set()
    policy = sdw.behavior_clone(synthetic, steps=7, lr=0.2, momentum=momentum, hidden=(9, 5), gain=1.5, seed=3)
    sizes = (4, 9, 5, 2)
    params = orthogonal_parameters(sizes, gain=1.5, generator=torch.Generator().manual_seed(3))
    params = [p.double().requires_grad_() for p in params]
    states = torch.as_tensor(synthetic.normalized_observations).double()
    targets = torch.as_tensor(synthetic.normalized_actions).double()
    optimizer = torch.optim.SGD(params, lr=0.2, momentum=momentum)
    for _ in range(7):
        optimizer.zero_grad()
        hidden = torch.relu(states @ params[0].T + params[1])
        hidden = torch.relu(hidden @ params[2].T + params[3])
        (torch.tanh(hidden @ params[4].T + params[5]) - targets).square().mean().backward()
        optimizer.step()
    for trained, expected in zip(policy.parameters(), params, strict=True):
        torch.testing.assert_close(trained.double(), expected.detach(), atol=1e-5, rtol=1e-5)


def test_behavior_clone_learns_and_respects_bounds() -> None:
    synthetic = make_set(n=64, low=-0.4, high=0.4)
    policy = sdw.behavior_clone(synthetic, steps=400, hidden=(64, 64))
    with torch.no_grad():
        predicted = policy(torch.as_tensor(synthetic.observations)).numpy()
    assert np.abs(predicted).max() <= 0.4
    assert np.abs(predicted - synthetic.actions).mean() < 0.05


def test_behavior_clone_of_a_set_without_settings_takes_the_defaults_of_a_distillation() -> None:
    bare, configured = make_set(), make_set(config=DistillConfig().to_dict())
    for a, b in zip(sdw.behavior_clone(bare).parameters(), sdw.behavior_clone(configured).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("own", "momentum"), [({"inner_momentum": 0.7}, 0.7), ({}, 0.0)])
def test_behavior_clone_takes_the_run_s_own_settings(own: dict[str, float], momentum: float) -> None:
    # Settings without momentum are of a set that was distilled before there was any.
    config = {"hidden": [6], "inner_steps": 3, "inner_lr": 0.05, "gain": 1.0, **own}
    policy = sdw.behavior_clone(make_set(config=config))
    same = sdw.behavior_clone(make_set(), hidden=(6,), steps=3, lr=0.05, momentum=momentum, gain=1.0)
    assert [p.shape for p in policy.parameters()] == [(6, 4), (6,), (2, 6), (2,)]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), same.parameters(), strict=True))


def test_divergence_is_an_error() -> None:
    with pytest.raises((FloatingPointError, ValueError), match=r"diverged|finite"):
        sdw.behavior_clone(make_set(), steps=50, lr=1e30)
