"""Networks: the orthogonal draw, the multilayer perceptron, twin critics, and how a user's network is asked."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from sdw_fast.networks import (
    MLP,
    MinCritic,
    ask,
    batched_cholesky_qr,
    below,
    cholesky_qr,
    evaluating,
    orthogonal_parameters,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The orthogonal draw


@pytest.mark.parametrize("sizes", [(3, 5), (11, 256, 256, 3), (7, 3, 9, 1)])
def test_orthogonal_parameters_have_orthogonal_rows_or_columns(sizes: tuple[int, ...]) -> None:
    params = orthogonal_parameters(sizes, gain=2.0, generators=[generator()])
    assert len(params) == 2 * (len(sizes) - 1)
    for (weight,), (bias,), (fan_in, fan_out) in zip(params[0::2], params[1::2], pairwise(sizes), strict=True):
        assert weight.shape == (fan_out, fan_in)
        assert weight.is_contiguous()
        assert weight.dtype == bias.dtype == torch.float32
        gram = weight.T @ weight if fan_out >= fan_in else weight @ weight.T
        torch.testing.assert_close(gram, 4.0 * torch.eye(min(fan_in, fan_out)), atol=1e-4, rtol=0)
        assert bias.shape == (fan_out,)
        assert not bias.any()


def test_orthogonal_parameters_of_several_generators() -> None:
    together = orthogonal_parameters((4, 8, 2), gain=1.5, generators=[generator(3), generator(4)])
    for run, seed in enumerate((3, 4)):
        alone = orthogonal_parameters((4, 8, 2), gain=1.5, generators=[generator(seed)])
        for a, b in zip(together, alone, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a[run], b[0])


def test_orthogonal_parameters_follow_their_generator() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        orthogonal_parameters((4, 8, 2), gain=1.0, generators=[generator(seed)]) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_orthogonal_draws_are_uniform() -> None:
    """An entry of a uniform orthogonal matrix has mean 0: a QR without the signs has a first column of one sign."""
    draws = torch.stack([orthogonal_parameters((3, 3), gain=1.0, generators=[generator(s)])[0][0] for s in range(400)])
    torch.testing.assert_close(draws.mean(0), torch.zeros(3, 3), atol=0.12, rtol=0)
    torch.testing.assert_close(draws.square().mean(0), torch.full((3, 3), 1 / 3), atol=0.06, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (256, 17), (3, 64, 64)])
def test_cholesky_qr_is_the_qr_with_positive_diagonal(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=generator())
    q, r = torch.linalg.qr(x.double())
    expected = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    torch.testing.assert_close(cholesky_qr(x).double(), expected, rtol=0, atol=1e-6)


def test_cholesky_qr_of_an_almost_singular_matrix_is_orthogonal() -> None:
    x = torch.randn(64, 64, generator=generator())
    x[:, 5] = x[:, 6] * (1 + 1e-7)
    q = cholesky_qr(x).double()
    torch.testing.assert_close(q.T @ q, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-6)


def test_layers_in_one_batch_are_as_alone() -> None:
    shapes = [(256, 17), (256, 256), (300, 230), (64, 64), (256, 6), (1, 1), (40, 40)]
    layers = [torch.randn(2, *shape, generator=generator()) for shape in shapes]
    for normal, q in zip(layers, batched_cholesky_qr(layers), strict=True):
        assert q.shape == normal.shape
        torch.testing.assert_close(q, cholesky_qr(normal.double()), rtol=0, atol=1e-9)


# Multilayer perceptrons


@pytest.mark.parametrize("tanh", [False, True])
def test_mlp_by_hand(tanh: bool) -> None:
    params = [torch.tensor(x) for x in ([[1.0, -1.0], [2.0, 0.0]], [0.0, -1.0], [[0.5, -0.25]], [0.1])]
    network = MLP.of(params, tanh=tanh)
    output = network(torch.tensor([[3.0, 1.0], [0.0, 1.0]]))  # hidden (2, 5) and (0, 0)
    expected = torch.tensor([[0.5 * 2 - 0.25 * 5 + 0.1], [0.1]])
    torch.testing.assert_close(output, expected.tanh() if tanh else expected)
    assert network.sizes == [2, 2, 1]


def test_mlp_copies_its_parameters_and_draws_nothing() -> None:
    params = [p[0] for p in orthogonal_parameters((3, 4, 2), gain=1.0, generators=[generator()])]
    before = torch.random.get_rng_state()
    network = MLP.of(params, tanh=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    kept = [p.clone() for p in params]
    params[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), kept, strict=True))
    assert all(p.requires_grad for p in network.parameters())  # a user may train it on


def test_mlp_refuses_the_state_of_another_network() -> None:
    state = MLP([3, 4, 2], tanh=True).state_dict()
    assert MLP.from_state([3, 4, 2], state, tanh=True).sizes == [3, 4, 2]
    with pytest.raises(RuntimeError, match="size mismatch"):
        MLP.from_state([3, 5, 2], state, tanh=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        MLP.from_state([3, 4, 2, 2], state, tanh=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        MLP.from_state([3, 4], {**state, "0.weight": torch.ones(4, 3)}, tanh=True)


def test_min_critic_takes_the_smaller_value() -> None:
    up = MLP.of([torch.tensor([[1.0, 0.0]]), torch.zeros(1)], tanh=False)  # Q = s
    down = MLP.of([torch.tensor([[0.0, -1.0]]), torch.zeros(1)], tanh=False)  # Q = −a
    states, actions = torch.tensor([[1.0], [-3.0]]), torch.tensor([[2.0], [0.5]])
    assert MinCritic([up, down])(states, actions).tolist() == [-2.0, -3.0]
    assert MinCritic([up])(states, actions).tolist() == [1.0, -3.0]


def test_below_takes_the_tensors_of_one_network() -> None:
    tensors = {"critic1.0.weight": torch.ones(1), "critic10.0.weight": torch.zeros(1), "critic1x": torch.zeros(1)}
    assert below(tensors, "critic1") == {"0.weight": tensors["critic1.0.weight"]}


# Users' networks


def test_evaluating_puts_every_part_back_even_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    network[1].eval()
    modes = [part.training for part in network.modules()]

    def interrupted() -> None:
        with evaluating(network, network.forward, None, torch.tanh, lambda x: x):
            assert not any(part.training for part in network.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [part.training for part in network.modules()] == modes == [True, True, False, False]


def test_ask_moves_inputs_to_where_the_weights_lie() -> None:
    network = nn.Bilinear(2, 3, 4, device="meta")
    for function in (network, network.forward):
        assert ask(function, torch.ones(5, 2), torch.ones(5, 3)).device.type == "meta"
    assert ask(torch.add, torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert ask(nn.Identity(), torch.ones(1)).tolist() == [1]
