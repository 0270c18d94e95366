"""A teacher's file: `.safetensors` with the weights, and how they are wired in the metadata. Nothing is ever unpickled.

The package's own networks are described in the file and made anew from it. Of any other module the file holds the
state dict alone: the code that makes it must come from the user, never from a file. (A `torch.export` program holds
that too, but PyTorch unpickles parts of one.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sdw_fast.files import description_in, read_safetensors, reading, to_json, write_safetensors
from sdw_fast.networks import MLP, MinCritic, below, refuse_non_finite
from sdw_fast.units import Units

if TYPE_CHECKING:
    from sdw_fast.teacher import Teacher

FORMAT = "sdw_fast.teacher/2"
_CORL_HINT = " A CORL checkpoint is read by Teacher.from_corl(path, mean, std)"


def write_teacher(path: str | os.PathLike[str], teacher: Teacher, *, half: bool) -> None:
    """See `Teacher.save`."""
    actor, critic = teacher.actor, teacher.critic
    description: dict[str, Any] = {"format": FORMAT}
    networks: dict[str, nn.Module]
    if isinstance(actor, MLP) and isinstance(critic, MinCritic | None):
        critics = [] if critic is None else [cast("MLP", network) for network in critic.networks]
        own = {"actor": actor, **{f"critic{i}": network for i, network in enumerate(critics, start=1)}}
        networks = dict(own)
        description |= {
            "networks": {name: network.sizes for name, network in own.items()},
            "activations": {"hidden": "relu", "actor_output": "tanh", "critic_output": "linear"},
        }
    else:
        parts = {"actor": actor, **({} if critic is None else {"critic": critic})}
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"a teacher is saved by the weights of its torch modules, and its {name} is {type(part).__name__}"
                )
        networks = cast("dict[str, nn.Module]", parts)
        description["modules"] = {name: type(part).__qualname__ for name, part in parts.items()}
    tensors = {
        f"{name}.{key}": _stored(tensor, half=half)
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    description |= {"units": teacher.units and teacher.units.to_dict(), "provenance": teacher.provenance}
    write_safetensors(path, tensors, {"teacher": to_json(description)})


def _stored(tensor: Tensor, *, half: bool) -> Tensor:
    kind = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", kind, copy=True).contiguous()  # a copy: modules may share what files may not


def read_teacher(path: str | os.PathLike[str], factory: Callable[[], Teacher] | None) -> dict[str, Any]:
    """Teacher's arguments from a file; see `Teacher.load`."""
    path = Path(path)
    with reading(path, "teacher file", hint=_CORL_HINT):
        tensors, metadata = read_safetensors(path)
        description = description_in(metadata, "teacher", "Teacher.save", FORMAT)
        units = description["units"] and Units.from_dict(description["units"])
        rest = {"units": units, "provenance": description["provenance"]}
        if "modules" not in description:
            return {**_described(description["networks"], tensors), **rest}
        modules = dict(description["modules"])
    if factory is None:
        raise ValueError(
            f"{path} holds the weights of modules of yours ({', '.join(modules.values())}), not the code that makes "
            "them: name a function that returns a teacher of such modules, Teacher.load(path, factory=function) or "
            "--teacher-factory module:function"
        )
    return {**_filled(factory(), modules, tensors, path), **rest}


def _described(sizes: dict[str, list[int]], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Actor and critic of the package's own networks."""
    weights = {key: tensor.float() for key, tensor in tensors.items()}
    networks = {
        name: MLP.from_state(widths, below(weights, name), tanh=name == "actor").requires_grad_(False)
        for name, widths in sizes.items()
    }
    refuse_non_finite(networks)
    actor = networks.pop("actor")
    return {"actor": actor, "critic": MinCritic(list(networks.values())) if networks else None}


def _filled(made: Teacher, modules: dict[str, str], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Actor and critic of the user's teacher, with the weights of the file."""
    parts = {name: getattr(made, name, None) for name in modules}
    for name, part in parts.items():
        try:
            if not isinstance(part, nn.Module):
                raise TypeError(f"it is {type(part).__name__}, no torch module")
            part.load_state_dict(below(tensors, name))
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the {name} that the factory made is not the one in {path}: {reason}") from error
    refuse_non_finite(cast("dict[str, nn.Module]", parts))
    return {"critic": None, **parts}
