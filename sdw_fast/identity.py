"""Whose state a checkpoint is: what a distillation's bits depend on, compared before it goes on.

What changes the problem is refused. What changes the rounding only (threads, instruction set, PyTorch) is said and
recorded, and the run goes on; targets and weights that a teacher gave under another rounding are known by a sample of
their rows.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from sdw_fast.objectives import OuterProblem
from sdw_fast.ops._backend import _C
from sdw_fast.version import __version__

if TYPE_CHECKING:
    from sdw_fast.distiller import Distiller

# Settings that a checkpoint may differ in: they do not change the steps.
_FREE_SETTINGS = ("eval_every", "eval_clones", "eval_episodes", "checkpoint_every", "tape")
_STATE = {"version", "problem", "sample", "config", "device", "n_runs", "arithmetic", "rounding"}
_STATE |= {"iteration", "observations", "actions", "averages", "optimizer", "generators", "inner_lr", "rough"}
_ROWS = 1024  # of targets and weights, kept in a checkpoint
_ROUNDING = 1e-4  # relative; float32 networks evaluated by other kernels differ by less


def arithmetic(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on beside the program and its input."""
    return {
        "threads": _C.num_threads(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": _C.active_isa(),
        "torch": str(torch.__version__),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def sample(problem: OuterProblem) -> dict[str, torch.Tensor]:
    """Rows of the targets and weights, evenly spread, as they are compared where rounding may have moved them."""
    rows = torch.linspace(0, len(problem) - 1, min(_ROWS, len(problem)), dtype=torch.float64).long().numpy()
    return {name: torch.from_numpy(getattr(problem, name)[rows]) for name in ("targets", "weights")}


def identity(distiller: Distiller, fingerprint: dict[str, str]) -> dict[str, Any]:
    """What a state must share with the distillation that it is loaded into."""
    return {
        "version": __version__,
        "problem": fingerprint,
        "sample": sample(distiller.problem),
        "config": distiller.config.to_dict(),
        "device": distiller.device.type,
        "n_runs": distiller.n_runs,
        "arithmetic": arithmetic(distiller.device),
    }


def refuse_other(state: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError, which names it, where a state is not of the distillation whose own state is given.

    Returns:
        What differs in the rounding only: "threads": [then, now], …
    """
    if not set(state) >= _STATE or state["version"] != own["version"]:
        raise ValueError(
            f"the checkpoint was written by sdw_fast {state.get('version', 'of an unknown version')}, and this is "
            f"{own['version']}: finish that run with the version it was started with, or start it anew"
        )
    before, now = state["arithmetic"], own["arithmetic"]
    rounding = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
    parts = [name for name, digest in own["problem"].items() if state["problem"].get(name) != digest]
    if rounding:
        parts = [name for name in parts if not _agree(state["sample"].get(name), own["sample"].get(name))]
    if parts:
        raise ValueError(
            f"the checkpoint belongs to another problem: its {', '.join(parts)} differ. Was the dataset or the "
            "teacher changed, or its action bounds? Start a new run in another folder"
        )
    free = (*_FREE_SETTINGS, *(["steps"] if own["config"]["schedule"] == "constant" else []))
    new, old = ({**x["config"], "device": x["device"], "n_runs": x["n_runs"]} for x in (own, state))
    differing = [name for name in new | old if name not in free and new.get(name) != old.get(name)]
    if differing:
        hint = '; schedule="constant" leaves the number of steps open' if differing == ["steps"] else ""
        raise ValueError(f"the checkpoint was made with other settings of {differing}{hint}")
    _check_numbers(state, own)
    return rounding


def tell_of_rounding(step: int, rounding: dict[str, Any]) -> None:
    """Warns that a run goes on from a step with what `refuse_other` found to differ."""
    changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in rounding.items())
    warnings.warn(
        f"the run goes on from step {step} with other rounding ({changes}): its result is as good, and not the same "
        "bits",
        stacklevel=3,
    )


def _agree(before: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    if before is None or now is None or before.shape != now.shape:
        return False
    return torch.allclose(before, now, rtol=_ROUNDING, atol=_ROUNDING * float(now.abs().mean()))


def _check_numbers(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises ValueError where a state of this distillation holds what none of its steps can have left."""
    iteration = state["iteration"]
    if not isinstance(iteration, int) or iteration < 0:
        raise ValueError(f"the checkpoint is damaged: it says that {iteration!r} outer steps were taken")
    rates, count = state["inner_lr"], own["n_runs"]
    if len(rates) != count or not all(0 < rate <= own["config"]["inner_lr"] for rate in rates):
        raise ValueError(f"the checkpoint is damaged: it says that inner_lr was {rates!r}")
    if state["rough"].dtype != torch.bool or state["rough"].shape[1:] != (count,):
        raise ValueError("the checkpoint is damaged: its record of unstable steps is not one number a set")
    for name in ("observations", "actions", "averages", "generators"):
        got, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (state[name], own[name]))
        kinds, wanted = ([(tuple(x.shape), x.dtype) for x in tensors] for tensors in (got, expected))
        if kinds != wanted or not all(x.isfinite().all() for x in got):
            raise ValueError(f"the checkpoint is damaged: its {name} must be finite and {wanted}, got {kinds}")
    buffers = [x for kept in state["optimizer"]["state"].values() for x in kept.values()]
    shapes = {own[name].shape for name in ("observations", "actions")}
    if not all(x.shape in shapes for x in buffers if isinstance(x, torch.Tensor) and x.ndim):
        raise ValueError("the checkpoint is damaged: its optimizer belongs to arrays of other shapes")
