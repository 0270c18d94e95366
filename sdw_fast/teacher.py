"""The teacher (π*, Q) that gives every objective but `dbc` its targets and value weights: train, load, save."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from tqdm import tqdm

from sdw_fast.data import Normalizer, TransitionDataset, normalize_actions
from sdw_fast.version import __version__

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torchrl.objectives import LossModule, SoftUpdate

Array = TypeVar("Array", np.ndarray, Tensor)

FORMAT = "sdw_fast.teacher/1"
BATCH_ROWS = 16_384  # rows per forward pass: 256-wide activations stay near 16 MB however many states are asked for
DEAD_ROWS = 100  # from this many rows on, outputs that are all the same are taken for a fault, not for a coincidence


class MLP(nn.Sequential):
    """A ReLU network of linear layers; `sizes` holds the widths from input to output, `tanh` squashes the output."""

    def __init__(self, sizes: Sequence[int], *, tanh: bool) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers[-1:] = [nn.Tanh()] if tanh else []
        super().__init__(*layers)
        self.sizes = list(sizes)


class MinCritic(nn.Module):
    """Q(s, a) = min_j Q_j(s, a), the pessimistic reading of twin critics (TD3, Fujimoto et al. 2018)."""

    def __init__(self, networks: Sequence[MLP]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Maps (B, D) normalized states and (B, A) actions to (B,) values."""
        inputs = torch.cat([states, actions], dim=-1)
        return torch.cat([network(inputs) for network in self.networks], dim=-1).amin(dim=-1)


class Teacher:
    """A near-optimal policy π* and its value function Q, in the environment's own units.

    Args:
        actor: any callable (nn.Module, function) from states (B, D) to deterministic actions (B, A), float32 tensors.
        critic: any callable from states (B, D) and actions (B, A) to values (B,) or (B, 1): min over twin critics if
            there are two. None leaves a teacher that serves `pbc`; `av-pbc` and `sdw` weight by Q and need one.
        normalizer: applied to the states before either callable sees them; None passes raw states.
        action_bounds: (low, high), each (A,), of callables that act and value in [−1, 1]: the teacher maps the actor's
            output to them, and the critic's input back. None leaves actions as they are.
        provenance: where the teacher came from, any JSON-serializable dict; kept in the saved file.

    Raises:
        TypeError: actor or critic is not callable.
        ValueError: the bounds are not finite (A,) arrays with low < high.
    """

    def __init__(
        self,
        actor: Callable[[Tensor], Tensor],
        critic: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        normalizer: Normalizer | None = None,
        action_bounds: tuple[ArrayLike, ArrayLike] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        for name, function in (("actor", actor), ("critic", critic)):
            if not callable(function) and not (name == "critic" and function is None):
                raise TypeError(f"{name} must be a callable on tensors, got {type(function).__name__}")
        self.actor = actor
        self.critic = critic
        self.normalizer = normalizer
        self.action_normalizer: Normalizer | None = None
        if action_bounds is not None:
            low, high = (np.asarray(bound, dtype=np.float32) for bound in action_bounds)
            self.action_normalizer = Normalizer(mean=(high + low) / 2, scale=(high - low) / 2)
        self.provenance = dict(provenance or {})

    def actions(self, states: Array) -> Array:
        """Returns the deterministic actions π*(s).

        Args:
            states: (M, D) raw states, a NumPy array or a tensor; any M, worked through in batches.

        Returns:
            (M, A) float32 actions in the environment's units: an array for an array, a tensor on the states' device for
            a tensor.

        Raises:
            ValueError: the states are not a finite (M, D) array, or the teacher is dead: its actions are not finite,
                or 100 and more different states all get the same action.
        """
        actions = self._map(self.actor, "actions", states)
        return actions if self.action_normalizer is None else self.action_normalizer.denormalize(actions)

    def values(self, states: Array, actions: Array) -> Array:
        """Returns Q(s, a), the smaller of the two values where the teacher has twin critics.

        Args:
            states: (M, D) raw states, a NumPy array or a tensor; any M, worked through in batches.
            actions: (M, A) actions in the environment's units, of the same kind as the states.

        Returns:
            (M,) float32 values in the units of the rewards that the critic was trained on: an array for an array, a
            tensor on the states' device for a tensor.

        Raises:
            ValueError: the teacher has no critic, the inputs are not finite matrices of as many rows, or the teacher is
                dead: its values are not finite, or 100 and more different pairs all get the same value.
        """
        if self.critic is None:
            raise ValueError(
                "this teacher has no critic, so it has no values Q(s, a). The objectives 'av-pbc' and 'sdw' weight "
                "states by Q: give them a teacher with one (Teacher(actor=..., critic=...), train_teacher, or a CORL "
                "checkpoint that holds critic1 or critic_1), or use objective 'pbc', which needs actions only."
            )
        if len(states) != len(actions):
            raise ValueError(f"states and actions must have as many rows, got {len(states)} and {len(actions)}")
        if self.action_normalizer is not None:
            actions = self.action_normalizer.normalize(actions)
        return self._map(self.critic, "values", states, actions)

    def save(self, path: str | os.PathLike[str], *, half: bool = False) -> None:
        """Writes the networks as `.safetensors`, with architecture, normalization and provenance in the metadata.

        The file appears whole or not at all. `half` stores 16-bit weights, which halves the file; the teacher that is
        loaded from it computes in float32 with the rounded weights.

        Raises:
            TypeError: the actor or critic is not one of this module's networks (as made by `train_teacher`, `load` or
                `from_corl`); an arbitrary callable has no file format.
        """
        path = Path(path)
        if not isinstance(self.actor, MLP) or not isinstance(self.critic, MinCritic | None):
            raise TypeError(
                "only networks made by train_teacher, Teacher.load or Teacher.from_corl can be saved; this teacher's "
                f"actor is {type(self.actor).__name__} and its critic {type(self.critic).__name__}"
            )
        networks = {"actor": self.actor, **_critics(self.critic)}
        tensors = {
            f"{name}.{key}": tensor.detach().to("cpu", torch.float16 if half else torch.float32).contiguous()
            for name, network in networks.items()
            for key, tensor in network.state_dict().items()
        }
        description = {
            "format": FORMAT,
            "networks": {name: network.sizes for name, network in networks.items()},
            "activations": {"hidden": "relu", "actor_output": "tanh", "critic_output": "linear"},
            "normalizer": _described(self.normalizer),
            "action_normalizer": _described(self.action_normalizer),
            "provenance": self.provenance,
        }
        metadata = {"teacher": json.dumps(description)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            written = Path(folder) / path.name
            written.write_bytes(serialize(tensors, metadata))  # save_file would make a file only its owner can read
            os.replace(written, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Teacher:
        """Reads a teacher that `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is not a `.safetensors` file, or holds something other than a teacher.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no teacher file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete .safetensors file ({error}): copy it again if it was cut short, or read a "
                "CORL checkpoint with Teacher.from_corl(path, mean, std)"
            ) from error
        try:
            description = json.loads(metadata["teacher"])
            if description["format"] != FORMAT:
                raise ValueError(f"its format is {description['format']!r}")
            networks = {
                name: _loaded_mlp(sizes, tanh=name == "actor", state=_below(tensors, name))
                for name, sizes in description["networks"].items()
            }
            actor = networks.pop("actor")
            normalizer, action_normalizer = (
                stored and Normalizer(mean=np.asarray(stored["mean"]), scale=np.asarray(stored["scale"]))
                for stored in (description["normalizer"], description["action_normalizer"])
            )
            provenance = description["provenance"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is a .safetensors file but holds no teacher as Teacher.save writes it ({FORMAT}): {error!r}"
            ) from error
        critic = MinCritic(list(networks.values())) if networks else None
        teacher = cls(actor, critic, normalizer=normalizer, provenance=provenance)
        teacher.action_normalizer = action_normalizer
        return teacher

    @classmethod
    def from_corl(cls, path: str | os.PathLike[str], mean: Sequence[float], std: Sequence[float]) -> Teacher:
        """Reads a checkpoint of CORL's TD3+BC, IQL, CQL or Cal-QL, the format of the OBD authors' own teachers.

        Args:
            path: the `.pt` file. Only tensors and plain containers are unpickled (`weights_only=True`), and the
                one-number module `Scalar` of CQL, for which an empty stand-in is allowed.
            mean: (D,) mean of the training dataset's states, which the file does not hold.
            std: (D,) standard deviation of the same; the networks see (s − mean) / (std + 1e-3), as CORL does.

        Returns:
            A teacher that takes raw states. Its action is the mean action tanh(μ(s)), for environments whose actions
            lie in [−1, 1]; its value is the minimum over the critics in the file. A file with no critic gives a teacher
            that serves `pbc` only.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, would run code of its own, has no actor of a known layout, or mean and
                std do not fit its networks.
        """
        path = Path(path)
        checkpoint = _load_checkpoint(path)
        try:
            actor, critics = _corl_networks(checkpoint)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        center, spread = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
        size = actor.sizes[0]
        if center.shape != (size,) or spread.shape != (size,):
            raise ValueError(
                f"{path} holds an actor of {size} state dimensions; mean and std must be ({size},) arrays, got "
                f"{center.shape} and {spread.shape}"
            )
        if not (np.isfinite(center).all() and np.isfinite(spread).all() and (spread >= 0).all()):
            raise ValueError("mean and std of the states must be finite, and std not negative")
        normalizer = Normalizer(mean=center, scale=spread + np.float32(1e-3))
        provenance = {"source": "CORL checkpoint", "file": path.name}
        return cls(actor, MinCritic(critics) if critics else None, normalizer=normalizer, provenance=provenance)

    @torch.no_grad()
    def _map(self, function: Callable[..., Tensor], what: str, *inputs: Array) -> Array:
        """Applies the actor or the critic to (M, ·) inputs batch by batch, and refuses the output of a dead network."""
        tensors = [
            x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"])) for x in inputs
        ]
        for tensor in tensors:
            if tensor.ndim != 2:
                raise ValueError(f"expected matrices (rows, dimensions), got shape {tuple(tensor.shape)}")
        size = self._state_size()
        if size is not None and tensors[0].shape[1] != size:
            raise ValueError(f"this teacher takes states of {size} dimensions, got {tensors[0].shape[1]}")
        device = tensors[0].device
        weights = next(function.parameters(), None) if isinstance(function, nn.Module) else None
        compute = device if weights is None else weights.device
        outputs = []
        for parts in zip(*(tensor.split(BATCH_ROWS) for tensor in tensors), strict=True):
            batch = [part.to(compute, torch.float32) for part in parts]
            if not all(part.isfinite().all() for part in batch):
                raise ValueError("the teacher was given states or actions with NaN or infinite numbers")
            if self.normalizer is not None:
                batch[0] = self.normalizer.normalize(batch[0])
            outputs.append(_checked_shape(function(*batch), what, len(batch[0])).to(device, torch.float32))
        output = torch.cat(outputs)
        _refuse_dead(output, tensors, what)
        return output if isinstance(inputs[0], Tensor) else output.cpu().numpy()

    def _state_size(self) -> int | None:
        if isinstance(self.actor, MLP):
            return self.actor.sizes[0]
        return None if self.normalizer is None else len(self.normalizer.mean)


def train_teacher(
    data: TransitionDataset,
    algorithm: Literal["td3bc", "iql"] = "td3bc",
    *,
    steps: int = 100_000,
    seed: int = 0,
    alpha: float = 2.5,
    expectile: float = 0.7,
    temperature: float = 3.0,
    progress: bool = True,
) -> Teacher:
    """Trains a teacher on a dataset by offline RL, with torchrl's losses (`pip install "sdw_fast[teacher]"`).

    TD3+BC (Fujimoto and Gu, NeurIPS 2021) or IQL (Kostrikov et al., ICLR 2022): actor and twin critics of two hidden
    layers of 256 ReLU units, batches of 256, Adam at 3e-4, discount 0.99, target networks moved by 0.005 a step, states
    normalized by the dataset's own normalizer. Runs on the CPU; these networks are small enough for one or two cores.

    Args:
        data: transitions with next observations and known action bounds.
        algorithm: "td3bc" or "iql".
        steps: gradient steps of the critic (TD3+BC moves the actor every second one).
        seed: seeds initialization and batches: same seed, machine and thread count, same bits. The global random
            state of PyTorch is left as it was.
        alpha: TD3+BC only: weight of Q against cloning; larger trusts the critic more.
        expectile: IQL only: the expectile of V, in (0.5, 1); larger is more optimistic.
        temperature: IQL only: inverse temperature β of the advantage weights exp(β·A), on rewards scaled to a mean
            magnitude of 1.
        progress: show a progress bar with losses and the mean of Q.

    Returns:
        The teacher, with its values in the units of the dataset's rewards and its provenance filled in.

    Raises:
        ImportError: torchrl is not installed.
        ValueError: an unknown algorithm, a parameter out of range, no next observations, unknown action bounds, or
            training ended in a dead teacher (see `Teacher.actions`).
        FloatingPointError: the losses stopped being finite.
    """
    if algorithm not in ("td3bc", "iql"):
        raise ValueError(f"algorithm must be 'td3bc' or 'iql', got {algorithm!r}")
    if steps < 1 or alpha <= 0 or temperature <= 0 or not 0.5 <= expectile < 1:
        raise ValueError(
            "needed: steps >= 1, alpha > 0, temperature > 0 and expectile in [0.5, 1); got "
            f"steps={steps}, alpha={alpha}, temperature={temperature}, expectile={expectile}"
        )
    try:
        from torchrl.objectives import SoftUpdate, ValueEstimators
    except ImportError as error:
        raise ImportError('train_teacher needs torchrl: pip install "sdw_fast[teacher]"') from error

    reward_scale = _reward_scale(data) if algorithm == "iql" else 1.0
    transitions = _transitions(data, reward_scale)
    sizes = data.observations.shape[1], data.actions.shape[1]
    with torch.random.fork_rng(devices=[]):  # TD3's target noise comes from the global generator
        torch.manual_seed(seed)
        loss = _td3bc_loss(*sizes, alpha) if algorithm == "td3bc" else _iql_loss(*sizes, expectile, temperature)
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        targets = SoftUpdate(loss, tau=0.005)
        update = _td3bc_update(loss, targets) if algorithm == "td3bc" else _iql_update(loss, targets, steps)
        with tqdm(range(1, steps + 1), desc=f"training the teacher ({algorithm})", disable=not progress) as bar:
            for step in bar:
                batch = transitions[torch.randint(len(data), (256,))]
                losses = update(batch, step)
                if step % 200 == 0 or step == steps:
                    _show(bar, losses, _trained_networks(loss, sizes, reward_scale)[1], batch)

    actor, critic = _trained_networks(loss, sizes, reward_scale)
    settings = {"alpha": alpha} if algorithm == "td3bc" else {"expectile": expectile, "temperature": temperature}
    teacher = Teacher(
        actor,
        critic,
        normalizer=data.normalizer,
        action_bounds=data.action_bounds,
        provenance={
            "algorithm": algorithm,
            **settings,
            "steps": steps,
            "seed": seed,
            "env_id": data.env_id,
            "dataset": data.name,
            "dataset_hash": data.content_hash,
            "transitions": len(data),
            "sdw_fast": __version__,
            "torch": torch.__version__,
        },
    )
    sample = data.observations[:: max(1, len(data) // 10_000)]
    teacher.values(sample, teacher.actions(sample))  # raises here, not in a later run, if training killed a network
    return teacher


def _reward_scale(data: TransitionDataset) -> float:
    """Scales rewards to a mean magnitude of 1, which the temperature of IQL is tuned to.

    On locomotion this is within a fifth of the authors' own scaling (returns that span 1,000 in 1,000 steps); short
    episodes are served as well.
    """
    magnitude = float(np.abs(data.rewards).mean())
    return 1.0 / magnitude if magnitude > 0 else 1.0


def _transitions(data: TransitionDataset, reward_scale: float) -> TensorDict:
    """The dataset as one tensordict of normalized states and actions."""
    from tensordict import TensorDict

    if data.next_observations is None:
        raise ValueError(
            "training a teacher needs next observations, and this dataset has none: load it from a source that holds "
            "them, or pass a trained teacher (Teacher.load, Teacher.from_corl)"
        )
    rows = [len(data)]
    following = TensorDict(
        {
            "observation": torch.from_numpy(data.normalizer.normalize(data.next_observations)),
            "reward": torch.from_numpy(data.rewards * np.float32(reward_scale)).unsqueeze(-1),
            "terminated": torch.from_numpy(data.terminations).unsqueeze(-1),
            "done": torch.from_numpy(data.terminations | data.truncations).unsqueeze(-1),
        },
        rows,
    )
    observations = torch.from_numpy(data.normalized_observations)
    actions = torch.from_numpy(normalize_actions(data.actions, *data.action_bounds))
    return TensorDict({"observation": observations, "action": actions, "next": following}, rows)


def _td3bc_loss(states: int, actions: int, alpha: float) -> LossModule:
    from tensordict.nn import TensorDictModule
    from torchrl.objectives import TD3BCLoss

    actor = TensorDictModule(MLP([states, 256, 256, actions], tanh=True), ["observation"], ["action"])
    return TD3BCLoss(actor, _q_networks(states, actions), bounds=(-1.0, 1.0), alpha=alpha, loss_function="l2")


def _iql_loss(states: int, actions: int, expectile: float, temperature: float) -> LossModule:
    from tensordict.nn import TensorDictModule
    from torchrl.modules import IndependentNormal, ProbabilisticActor
    from torchrl.objectives import IQLLoss

    actor = ProbabilisticActor(
        TensorDictModule(_GaussianActor(states, actions), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    value = TensorDictModule(MLP([states, 256, 256, 1], tanh=False), ["observation"], ["state_value"])
    networks = _q_networks(states, actions)
    return IQLLoss(actor, networks, value, loss_function="l2", expectile=expectile, temperature=temperature)


def _q_networks(states: int, actions: int) -> list[Any]:
    from tensordict.nn import TensorDictModule

    return [TensorDictModule(_Q(states, actions), ["observation", "action"], ["state_action_value"]) for _ in range(2)]


class _Q(nn.Module):
    """One critic with the two-argument call that torchrl makes."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.network = MLP([states + actions, 256, 256, 1], tanh=False)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.network(torch.cat([states, actions], dim=-1))


class _GaussianActor(nn.Module):
    """IQL's policy: mean tanh(MLP(s)), and one learned standard deviation per action, the same in all states."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.network = MLP([states, 256, 256, actions], tanh=True)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.network(states)
        return mean, self.log_std.clamp(-5.0, 2.0).exp().expand_as(mean)


def _td3bc_update(loss: LossModule, targets: SoftUpdate) -> Callable[[TensorDict, int], dict[str, Tensor]]:
    """Returns one step of TD3+BC: the critics every time, actor and target networks every second time."""
    actor_optimizer, critic_optimizer = _adam(loss.actor_network_params), _adam(loss.qvalue_network_params)
    losses: dict[str, Tensor] = {}

    def update(batch: TensorDict, step: int) -> dict[str, Tensor]:
        losses["critic"], _ = loss.qvalue_loss(batch)
        _descend(losses["critic"], critic_optimizer)
        if step % 2 == 0:
            losses["actor"], _ = loss.actor_loss(batch)
            _descend(losses["actor"], actor_optimizer)
            targets.step()
        return losses

    return update


def _iql_update(loss: LossModule, targets: SoftUpdate, steps: int) -> Callable[[TensorDict, int], dict[str, Tensor]]:
    """Returns one step of IQL: all three losses at once, each with gradients for its own networks only."""
    actor_optimizer = _adam(loss.actor_network_params)
    critic_optimizer = _adam(loss.qvalue_network_params, loss.value_network_params)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(actor_optimizer, steps)

    def update(batch: TensorDict, step: int) -> dict[str, Tensor]:
        result = loss(batch)
        losses = {"critic": result["loss_qvalue"], "value": result["loss_value"], "actor": result["loss_actor"]}
        _descend(sum(losses.values(), torch.zeros(())), actor_optimizer, critic_optimizer)
        schedule.step()
        targets.step()
        return losses

    return update


def _adam(*parameters: Any) -> torch.optim.Adam:
    leaves = [leaf for group in parameters for leaf in group.values(include_nested=True, leaves_only=True)]
    return torch.optim.Adam(leaves, lr=3e-4, fused=True)


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _show(bar: tqdm, losses: dict[str, Tensor], critic: MinCritic, batch: TensorDict) -> None:
    """Writes losses and the batch's mean Q into the progress bar; stops a run that has diverged."""
    with torch.no_grad():
        shown = {name: float(value) for name, value in losses.items()}
        shown["Q"] = float(critic(batch["observation"], batch["action"]).mean())
    if not np.isfinite(list(shown.values())).all():
        raise FloatingPointError(
            f"the teacher's training diverged at step {bar.n + 1}: {shown}; check the rewards' scale"
        )
    bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)


def _trained_networks(loss: LossModule, sizes: tuple[int, int], reward_scale: float) -> tuple[MLP, MinCritic]:
    """Copies actor and critics out of torchrl's loss; values are brought back to the dataset's reward units."""
    actor = _loaded_mlp([sizes[0], 256, 256, sizes[1]], tanh=True, state=_mlp_state(loss.actor_network_params))
    critics = []
    for index in range(2):
        state = _mlp_state(loss.qvalue_network_params[index])
        for key in ("4.weight", "4.bias"):  # the last layer is linear: scaling it scales Q
            state[key] = state[key] / reward_scale
        critics.append(_loaded_mlp([sum(sizes), 256, 256, 1], tanh=False, state=state))
    return actor, MinCritic(critics)


def _mlp_state(parameters: Any) -> dict[str, Tensor]:
    """State dict of the one MLP inside torchrl's nested parameters, whatever wraps it ("module.0.network.2.weight")."""
    flat = parameters.data.flatten_keys(".").items()
    return {".".join(key.split(".")[-2:]): value.clone() for key, value in flat if key.endswith((".weight", ".bias"))}


def _loaded_mlp(sizes: Sequence[int], *, tanh: bool, state: Mapping[str, Tensor]) -> MLP:
    """An MLP with the given weights, frozen; made without drawing an initialization from the random generator."""
    with torch.device("meta"):
        network = MLP(sizes, tanh=tanh)
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False)


def _described(normalizer: Normalizer | None) -> dict[str, list[float]] | None:
    return None if normalizer is None else {"mean": normalizer.mean.tolist(), "scale": normalizer.scale.tolist()}


def _critics(critic: Callable[..., Tensor] | None) -> dict[str, MLP]:
    networks = list(critic.networks) if isinstance(critic, MinCritic) else []
    return {f"critic{index}": cast("MLP", network) for index, network in enumerate(networks, start=1)}


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under `name.`, with that prefix taken off."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _checked_shape(output: Tensor, what: str, rows: int) -> Tensor:
    """Holds a callable to its contract: (rows, A) actions; (rows,) or (rows, 1) values, which become (rows,)."""
    if what == "values" and output.shape == (rows, 1):
        output = output.squeeze(1)
    if output.ndim != (1 if what == "values" else 2) or len(output) != rows:
        wanted = f"({rows},)" if what == "values" else f"({rows}, action dimensions)"
        raise ValueError(f"the teacher's {what} for {rows} states must have shape {wanted}, got {tuple(output.shape)}")
    return output


def _refuse_dead(output: Tensor, inputs: Sequence[Tensor], what: str) -> None:
    """Raises on outputs that are not finite, or the same for many different inputs."""
    finite = output.isfinite()
    if not finite.all():
        bad = int((~finite).reshape(len(output), -1).any(dim=1).sum())
        raise ValueError(f"dead teacher: its {what} are NaN or infinite for {bad} of {len(output)} states")
    if len(output) < DEAD_ROWS or all((x == x[0]).all() for x in inputs):
        return
    spread = (output.amax(dim=0) - output.amin(dim=0)).max()
    if spread <= 1e-6 * output.abs().max():
        raise ValueError(
            f"dead teacher: its {what} are the same ({output[0].tolist()}) for all {len(output)} states. Was it "
            "trained, and are the states in the environment's own units?"
        )


# CORL's one-number module, under the name that its training scripts pickle it with. The stand-in only receives the
# pickled attributes; nothing of it is used, because a multiplier of the log-std does not move the mean action.
_CORL_SCALAR = type("Scalar", (), {"__module__": "__main__"})


def _load_checkpoint(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([_CORL_SCALAR]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a CORL checkpoint: it is truncated, no PyTorch file, or pickles more than "
            f"tensors and plain containers, which is never unpickled ({error})"
        ) from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("actor"), Mapping):
        held = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"{path} is no CORL checkpoint: it has no state dict 'actor' (it holds {held})")
    return checkpoint


def _corl_networks(checkpoint: Mapping[str, Any]) -> tuple[MLP, list[MLP]]:
    """Actor and critics of a CORL checkpoint; a Gaussian actor becomes the network of its mean."""
    actor_state = checkpoint["actor"]
    if any(key.startswith("base_network.") for key in actor_state):  # CQL, Cal-QL: outputs (mean, log-std)
        layers = _linear_layers(_below(actor_state, "base_network"))
        weight, bias = layers[-1]
        layers[-1] = weight[: len(weight) // 2], bias[: len(bias) // 2]
    elif any(key.startswith("net.") for key in actor_state):  # TD3+BC; IQL, whose log-std is a parameter beside the net
        layers = _linear_layers(_below(actor_state, "net"))
    else:
        raise ValueError(
            "unknown actor layout: expected base_network.* (CQL, Cal-QL) or net.* (TD3+BC, IQL), got "
            f"{sorted(actor_state)}. Wrap such a network yourself: Teacher(actor=..., critic=...)"
        )
    actor = _mlp_of(layers, tanh=True)
    states = [checkpoint[key] for key in ("critic1", "critic_1", "critic2", "critic_2") if key in checkpoint]
    if "qf" in checkpoint:  # IQL keeps both critics in one module
        states = [_below(checkpoint["qf"], name) for name in ("q1", "q2")]
    critics = [_mlp_of(_linear_layers(state), tanh=False) for state in states]
    inputs = actor.sizes[0] + actor.sizes[-1]
    for critic in critics:
        if critic.sizes[0] != inputs or critic.sizes[-1] != 1:
            raise ValueError(f"a critic maps {critic.sizes[0]} to {critic.sizes[-1]}, the actor asks for {inputs} to 1")
    return actor, critics


def _linear_layers(state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of the linear layers in a state dict, which keeps the order of the modules."""
    unknown = [key for key in state if not key.endswith((".weight", ".bias")) or state[key].ndim > 2]
    layers = [(state[key], state[f"{key.removesuffix('.weight')}.bias"]) for key in state if key.endswith(".weight")]
    if unknown or not layers or any(weight.ndim != 2 for weight, _ in layers):
        raise ValueError(f"expected linear layers only (ReLU between them), got {list(state)}")
    return layers


def _mlp_of(layers: Sequence[tuple[Tensor, Tensor]], *, tanh: bool) -> MLP:
    sizes = [layers[0][0].shape[1], *(len(bias) for _, bias in layers)]
    state = {}
    for index, (weight, bias) in enumerate(layers):
        state[f"{2 * index}.weight"], state[f"{2 * index}.bias"] = weight.float(), bias.float()
    return _loaded_mlp(sizes, tanh=tanh, state=state)
