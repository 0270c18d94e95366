"""`sdw-fast`: a thin shell over the package's functions. Settings become options by themselves: `sdw_fast.options`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import sdw_fast as sdw
from sdw_fast import run as runs
from sdw_fast.adapters import named_factory
from sdw_fast.config import PRESETS, DistillConfig, TeacherConfig
from sdw_fast.density import DensityWeights
from sdw_fast.disk import check_writable, naming, replacing
from sdw_fast.diversity import diversity
from sdw_fast.files import one_sentence, to_json
from sdw_fast.folder import find_runs, read_metrics, read_run
from sdw_fast.options import refuse_unused, settings_of
from sdw_fast.ranks import process_group

_TRACEBACK = "SDW_FAST_TRACEBACK"  # set: errors are shown with where they arose

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Offline behavior distillation: condense an offline RL dataset into a few hundred state-action pairs.",
    epilog="Exit status: 0 done; 1 an error, told in one sentence on standard error (with where it arose, if the "
    f"variable {_TRACEBACK} is set); 2 a wrong command line; 130 interrupted by Ctrl-C.",
)

Dataset = Annotated[
    str, typer.Argument(metavar="DATASET", help="Minari id, D4RL-style .hdf5, .npz, .parquet, .csv or .arrow")
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]


def _importable(env: str | None) -> str | None:
    """Lets module:Env-v0 find a module of the user's in the working directory, which a script does not search."""
    if env is not None and ":" in env and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return env


Env = Annotated[
    str | None,
    typer.Option(
        callback=_importable,
        help="Gymnasium id, or module:Env-v0 to import the module first; default: the environment recorded.",
    ),
]
Mapped = Annotated[
    bool,
    typer.Option("--mapped", help="Keep the columns of a Minari dataset or .hdf5 on disk, for more than memory holds."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Shows what a user can mend as one sentence, without a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except BrokenPipeError:  # `| head`: the command line's own business
        raise
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        typer.secho(f"error: {one_sentence(error)}", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        typer.secho(str(interrupt) or "interrupted", fg="yellow", err=True)
        raise typer.Exit(130) from interrupt


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.secho(f"warning: {message}", fg="yellow", err=True)


def _say(what: object) -> None:
    """Prints a line. What a full disk refuses is dropped: Python would try it again at its end, and exit with 120."""
    try:
        with naming("standard output"):
            typer.echo(what)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _say(to_json(values, indent=2))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        _say(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def _show_version(wanted: bool) -> None:
    if wanted:
        with _readable_errors():
            _say(f"sdw-fast {sdw.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: `sdw-fast info --json`")
def info(as_json: Json = False) -> None:
    """Print what is installed and what is used."""
    with _readable_errors():
        _show(sdw.show_config("dicts") or {}, as_json)


@app.command(epilog="Example: `sdw-fast collect hopper/medium --steps 100000 --seed 0`")
def collect(
    name: Annotated[
        str,
        typer.Argument(
            help="ENV/QUALITY: halfcheetah, hopper, walker2d / medium, mixture, medium-replay, expert, medium-expert"
        ),
    ],
    steps: Annotated[
        int | None, typer.Option(help="Transitions to collect. [100000; of medium-replay, until the learner is medium]")
    ] = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset if it exists.")] = False,
) -> None:
    """Make the local Minari dataset sdw/ENV/QUALITY-v0 by shipped policies, or medium-replay by training a learner."""
    with _readable_errors():
        _say(sdw.collect(name, steps=steps, seed=seed, overwrite=overwrite))


@app.command(
    "train-teacher",
    epilog="Example: `sdw-fast train-teacher hopper/medium --algorithm td3bc --steps 100000 --out teacher.safetensors`",
)
@settings_of(TeacherConfig)
def train_teacher(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="Where to write the teacher (.safetensors).")],
    mapped: Mapped = False,
    **settings: Any,
) -> None:
    """Train a teacher (policy and Q) on a dataset by offline RL; the same command goes on with an interrupted one."""
    with _readable_errors():
        refuse_unused(TeacherConfig(**settings), settings)
        check_writable(out)
        sdw.train_teacher(sdw.load_dataset(dataset, mapped=mapped), out=out, **settings)
        _say(out)


@app.command(epilog="Example: `sdw-fast density hopper/medium --k 10 --out logd.npy`")
@settings_of(DistillConfig, "density_method", "k", "tau", "ess", "clip", "seed")
def density(
    dataset: Dataset,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the log-densities (.npy); the picture goes beside it.")
    ] = None,
    mapped: Mapped = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Estimate every state's log-density, and show the dataset's diversity and the weights it leads to."""
    with _readable_errors():
        config = DistillConfig(**settings)
        refuse_unused(config, settings)
        if out is not None:
            check_writable(out)
        data = sdw.load_dataset(dataset, mapped=mapped)
        options = {"k": config.k} if config.density_method == "knn" else {"seed": config.seed}
        logd = sdw.log_density(data, config.density_method, progress=not as_json, **options)
        weights = sdw.density_weights(
            logd, tau=config.tau, ess=config.ess if config.tau is None else None, clip=config.clip
        )
        values = asdict(diversity(data, config.k)) | weights.to_dict()
        if out is not None:
            values |= _write_density(out, data, logd, weights, config)
        _show(values, as_json)


def _write_density(
    out: Path, data: sdw.TransitionDataset, logd: np.ndarray, weights: DensityWeights, config: DistillConfig
) -> dict[str, str]:
    from sdw_fast import plots

    with replacing(out) as temporary, temporary.open("wb") as file:
        np.save(file, logd)
    states = data.normalized_observations()
    plots.save(plots.plot_density(states, logd, weights, seed=config.seed), out.with_suffix(".png"))
    plots.save(plots.plot_tau(logd, clip=config.clip, chosen=weights.tau), out.with_suffix(".tau.png"))
    return {
        "log_density": str(out),
        "picture": str(out.with_suffix(".png")),
        "tau_picture": str(out.with_suffix(".tau.png")),
    }


@app.command(
    epilog="Example: `sdw-fast distill hopper/medium --teacher teacher.safetensors --steps 2000 --out runs/hopper`"
)
@settings_of(DistillConfig)
def distill(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Minari id, .hdf5, .npz, .parquet, .csv or .arrow")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Teacher (.safetensors); objective dbc needs none.")] = None,
    teacher_factory: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function of yours that returns a teacher, or with --teacher the modules for the file's weights.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; no other option is needed.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}. [default]")] = None,
    env: Env = None,
    mapped: Mapped = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [cpu]")] = None,
    n_runs: Annotated[
        int | None, typer.Option(help="Distill this many sets side by side, seeds from --seed on; see OUT/run-000, …")
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Distill a dataset into a synthetic set; interrupted runs continue with --resume to the same result."""
    with _readable_errors():
        if resume is not None:
            fixed: dict[str, Any] = {"DATASET": dataset, "--teacher": teacher, "--out": out, "--preset": preset}
            fixed |= {"--device": device, "--n-runs": n_runs, "--env": env, "--mapped": mapped or None}
            given = [name for name, value in fixed.items() if value is not None]
            if given:
                raise ValueError(f"--resume takes {', '.join(given)} from the run in {resume}: leave it out")
            source, saved = read_run(resume)
            config = DistillConfig.from_dict({**saved.to_dict(), **settings})
            out = resume
        elif dataset is None or out is None:
            raise ValueError("give DATASET and --out RUN for a new run, or --resume RUN to continue one")
        else:
            config = DistillConfig.preset(preset or "default", **settings)
            refuse_unused(config, settings)
            if teacher is not None and config.objective == "dbc" and config.init != "top-q":
                raise ValueError("--teacher would have no effect: objective dbc asks none. Leave it out")
            source = {
                "dataset": _absolute(dataset),
                "teacher": teacher and _absolute(teacher),
                "device": device or "cpu",
                "n_runs": n_runs,
                "env": env,
                "mapped": mapped,
            }
        with process_group() as first:
            loaded = _teacher(source.get("teacher"), teacher_factory)
            data = sdw.load_dataset(
                source["dataset"], env_id=_importable(source.get("env")), mapped=source.get("mapped", False)
            )
            distiller = runs.new_distiller(
                data, loaded, config, device=source.get("device") or "cpu", n_runs=source.get("n_runs")
            )
            runs.run(distiller, out, source=source)
            figures = {"sets": distiller.n_runs, "pairs": config.size, "steps": distiller.iteration}
            if first:
                _show({"run": str(out), **figures}, as_json)


def _teacher(path: str | None, factory: str | None) -> sdw.Teacher | None:
    """The teacher of a file, of a function of the user's, or of both: the file's weights in the function's modules."""
    function = None if factory is None else named_factory(factory)
    if path is not None:
        return sdw.Teacher.load(path, factory=function)
    return None if function is None else function()


def _absolute(source: str | Path) -> str:
    """A file's absolute path, so that a run resumes from any folder; a Minari id as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else str(source)


@app.command(epilog="Example: `sdw-fast evaluate runs/hopper/best.npz --env Hopper-v5 --episodes 10 --json`")
def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Synthetic set (RUN/best.npz), or policy (.safetensors)")
    ],
    env: Env = None,
    episodes: Annotated[int, typer.Option(help="Episodes to run, in all.")] = 10,
    clones: Annotated[
        int | None, typer.Option(help="Policies to train on a set, from different initializations. [5]")
    ] = None,
    ensemble: Annotated[
        int | None, typer.Option(help="Members of each policy, which acts by their mean action. [1]")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first policy and episode; below 2^30 none of those that chose best.npz.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train policies on a synthetic set by behavior cloning, or take a saved one, and run them in the environment."""
    with _readable_errors():
        if file.suffix == ".safetensors":
            given = [name for name, value in {"--clones": clones, "--ensemble": ensemble}.items() if value is not None]
            if given:
                raise ValueError(f"{' and '.join(given)} would have no effect: {file} is one trained policy")
            result = sdw.evaluate(sdw.MLPPolicy.load(file), env, episodes=episodes, seed=seed)
        else:
            pairs = sdw.SyntheticDataset.load(file)
            if clones is not None and pairs.gives_one_policy:
                raise ValueError(f"--clones would have no effect: {file} was distilled for one initialization")
            clones = min(5, episodes) if clones is None else clones
            members = 1 if ensemble is None else ensemble
            result = sdw.evaluate_synthetic(pairs, env, clones=clones, ensemble=members, episodes=episodes, seed=seed)
        _show(result.to_dict(), as_json)


Runs = Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs; of several sets, all of them.")]


@app.command(epilog="Example: `sdw-fast plot runs/hopper runs/walker2d --out curves.png`")
def plot(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The picture. [RUN/metrics.png of one run, metrics.png of several]")
    ] = None,
) -> None:
    """Draw the learning curves of runs into one picture."""
    with _readable_errors():
        from sdw_fast import plots

        path = _beside(runs, out, "metrics.png")
        plots.save(plots.plot_metrics({name: read_metrics(run) for name, run in find_runs(runs).items()}), path)
        _say(path)


@app.command(epilog="Example: `sdw-fast report runs/hopper runs/walker2d --out report.html`")
def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The page. [RUN/report.html of one run, report.html of several]")
    ] = None,
) -> None:
    """Write one HTML page about runs: settings, curves, weights, states, returns and what to do about bad ones."""
    with _readable_errors():
        from sdw_fast.report import write_report

        path = _beside(runs, out, "report.html")
        write_report(runs, path)
        _say(path)


def _beside(runs: list[Path], out: Path | None, name: str) -> Path:
    """Where a picture or page of runs goes: into the run, or where there are several, into the working directory."""
    return out or (runs[0] / name if len(runs) == 1 else Path(name))


if __name__ == "__main__":
    app()
