"""`sdw-fast`: a thin shell over the package's functions."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

import sdw_fast as sdw
from sdw_fast import plots
from sdw_fast.distill import DistillConfig, Distiller, read_metrics, read_run

_DEFAULTS = DistillConfig()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Offline behavior distillation: condense an offline RL dataset into a few hundred state-action pairs.",
)

Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Minari id, D4RL-style .hdf5, or .npz")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Shows what a user can mend as one sentence, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        typer.secho(str(interrupt) or "interrupted", fg="yellow", err=True)
        raise typer.Exit(130) from interrupt


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        typer.echo(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


@app.command(epilog="Example: `sdw-fast info --json`")
def info(as_json: Json = False) -> None:
    """Print what is installed and what is used."""
    with _readable_errors():
        _show(sdw.config(), as_json)


@app.command(epilog="Example: `sdw-fast collect hopper/medium --steps 100000 --seed 0`")
def collect(
    name: Annotated[
        str,
        typer.Argument(
            help="ENV/QUALITY: halfcheetah, hopper, walker2d / medium, medium-replay, expert, medium-expert"
        ),
    ],
    steps: Annotated[int, typer.Option(help="Transitions to collect.")] = 100_000,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset if it exists.")] = False,
) -> None:
    """Roll out the suite's behavior policies into the local Minari dataset sdw/ENV/QUALITY-v0."""
    with _readable_errors():
        typer.echo(sdw.collect(name, steps=steps, seed=seed, overwrite=overwrite))


@app.command(
    "train-teacher",
    epilog="Example: `sdw-fast train-teacher hopper/medium --algorithm td3bc --steps 100000 --out teacher.safetensors`",
)
def train_teacher(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="Where to write the teacher (.safetensors).")],
    algorithm: Annotated[Literal["td3bc", "iql"], typer.Option(help="Offline RL algorithm.")] = "td3bc",
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 100_000,
    seed: Seed = 0,
) -> None:
    """Train a teacher (policy and Q) on a dataset by offline RL."""
    with _readable_errors():
        teacher = sdw.train_teacher(sdw.load_dataset(dataset), algorithm=algorithm, steps=steps, seed=seed)
        teacher.save(out)
        typer.echo(out)


@app.command(epilog="Example: `sdw-fast density hopper/medium --k 10 --out logd.npy`")
def density(
    dataset: Dataset,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the log-densities (.npy); the picture goes beside it.")
    ] = None,
    method: Annotated[str, typer.Option(help="knn, flow or kde.")] = "knn",
    k: Annotated[int, typer.Option(help="Neighbors of the k-NN estimate.")] = 10,
    tau: Annotated[float | None, typer.Option(help="Exponent of the weights; default: set by --ess.")] = None,
    ess: Annotated[float, typer.Option(help="Effective sample size of the weights.")] = _DEFAULTS.ess,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Estimate every state's log-density, and show the dataset's diversity and the weights it leads to."""
    with _readable_errors():
        data = sdw.load_dataset(dataset)
        options = {"knn": {"k": k}, "flow": {"seed": seed}}.get(method, {})
        logd = sdw.log_density(data, method, progress=not as_json, **options)
        weights = sdw.density_weights(logd, tau=tau, ess=ess if tau is None else None)
        values = asdict(sdw.diversity(data, k)) | weights.to_dict()
        if out is not None:
            values |= _write_density(out, data, logd, weights, seed)
        _show(values, as_json)


def _write_density(
    out: Path, data: sdw.TransitionDataset, logd: np.ndarray, weights: sdw.DensityWeights, seed: int
) -> dict[str, str]:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.npy")
    try:
        np.save(temporary, logd)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    plots.save(plots.plot_density(data.normalized_observations, logd, weights, seed=seed), out.with_suffix(".png"))
    plots.save(plots.plot_tau(logd, chosen=weights.tau), out.with_suffix(".tau.png"))
    return {
        "log_density": str(out),
        "picture": str(out.with_suffix(".png")),
        "tau_picture": str(out.with_suffix(".tau.png")),
    }


@app.command(
    epilog="Example: `sdw-fast distill hopper/medium --teacher teacher.safetensors --steps 2000 --out runs/hopper`"
)
def distill(
    dataset: Annotated[str | None, typer.Argument(metavar="DATASET", help="Minari id, .hdf5 or .npz")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher (.safetensors); objective dbc needs none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; no other option is needed.")
    ] = None,
    objective: Annotated[str, typer.Option(help="dbc, pbc, av-pbc or sdw.")] = _DEFAULTS.objective,
    size: Annotated[int, typer.Option(help="Synthetic pairs.")] = _DEFAULTS.size,
    steps: Annotated[int, typer.Option(help="Outer steps.")] = 2_000,
    inner_steps: Annotated[int, typer.Option(help="Inner steps of behavior cloning.")] = _DEFAULTS.inner_steps,
    inner_lr: Annotated[float, typer.Option(help="Step size of behavior cloning.")] = _DEFAULTS.inner_lr,
    inner_momentum: Annotated[
        float, typer.Option(help="Momentum of behavior cloning; 0 wants a larger --inner-lr.")
    ] = _DEFAULTS.inner_momentum,
    window: Annotated[int | None, typer.Option(help="Differentiate only the last inner steps.")] = None,
    optimizer: Annotated[str, typer.Option(help="Outer optimizer: adam or sgd.")] = _DEFAULTS.optimizer,
    lr: Annotated[float, typer.Option(help="Outer step size.")] = _DEFAULTS.lr,
    batch_size: Annotated[int, typer.Option(help="States an outer step.")] = _DEFAULTS.batch_size,
    init: Annotated[str, typer.Option(help="Start from real pairs: random, kmeans++ or top-q.")] = _DEFAULTS.init,
    tau: Annotated[float | None, typer.Option(help="Exponent of the density; default: set by --ess.")] = None,
    ess: Annotated[float, typer.Option(help="Effective sample size of the density weights.")] = _DEFAULTS.ess,
    checkpoint_every: Annotated[int, typer.Option(help="Outer steps between checkpoints.")] = 100,
    eval_every: Annotated[int, typer.Option(help="Outer steps between evaluations; 0: never.")] = 0,
    eval_episodes: Annotated[int, typer.Option(help="Episodes of an evaluation.")] = 10,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    runs: Annotated[
        int | None, typer.Option(help="Distill this many sets side by side, seeds from --seed on; see RUN/run-000, …")
    ] = None,
    as_json: Json = False,
) -> None:
    """Distill a dataset into a synthetic set; interrupted runs continue with --resume to the same result."""
    with _readable_errors():
        if resume is not None:
            source, config = read_run(resume)
            out, dataset, teacher = resume, source["dataset"], source["teacher"]
            device, runs = source["device"], source.get("runs")
        elif dataset is None or out is None:
            raise ValueError("give DATASET and --out RUN for a new run, or --resume RUN to continue one")
        else:
            config = DistillConfig(
                objective=objective,
                size=size,
                steps=steps,
                inner_steps=inner_steps,
                inner_lr=inner_lr,
                inner_momentum=inner_momentum,
                window=window,
                optimizer=optimizer,
                lr=lr,
                batch_size=batch_size,
                init=init,
                tau=tau,
                ess=ess,
                checkpoint_every=checkpoint_every,
                eval_every=eval_every,
                eval_episodes=eval_episodes,
                seed=seed,
            )
        loaded = sdw.Teacher.load(teacher) if teacher is not None else None
        distiller = Distiller(sdw.load_dataset(dataset), loaded, config, device=device, n_runs=runs)
        source = {
            "dataset": _absolute(dataset),
            "teacher": teacher and _absolute(teacher),
            "device": device,
            "runs": runs,
        }
        distiller.run(out, source=source)
        _show({"run": str(out), "pairs": config.size, "best_return": distiller.best_return}, as_json)


def _absolute(source: str | Path) -> str:
    """A file's absolute path, so that a run resumes from any folder; a Minari id as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else str(source)


@app.command(epilog="Example: `sdw-fast evaluate runs/hopper/best.npz --env Hopper-v5 --episodes 10 --json`")
def evaluate(
    synthetic: Annotated[Path, typer.Argument(metavar="SET", help="Synthetic set (.npz), e.g. RUN/best.npz")],
    env: Annotated[str | None, typer.Option(help="Gymnasium id; default: the set's own.")] = None,
    episodes: Annotated[int, typer.Option(help="Episodes to run, in all.")] = 10,
    clones: Annotated[int, typer.Option(help="Policies to train, from different initializations.")] = 5,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train policies on a synthetic set by behavior cloning and run them in the environment."""
    with _readable_errors():
        pairs = sdw.SyntheticDataset.load(synthetic)
        result = sdw.evaluate_synthetic(pairs, env, clones=min(clones, episodes), episodes=episodes, seed=seed)
        _show(result.to_dict(), as_json)


@app.command(epilog="Example: `sdw-fast plot runs/hopper`")
def plot(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Draw a run's learning curves into RUN/metrics.png."""
    with _readable_errors():
        plots.save(plots.plot_metrics({run.name: read_metrics(run)}), run / "metrics.png")
        typer.echo(run / "metrics.png")


if __name__ == "__main__":
    app()
