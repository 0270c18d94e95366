"""A campaign of attacks: each trial in a process that may die or hang, counted, and added to those of earlier calls.

An attack is made ready in a folder of its own and then tried by number: the same seed and number, the same trial. A
trial that returns None is clean. What it returns else says what was silently wrong. An exception, or the end of its
process, is a crash; one that takes longer than the attack's patience hangs, and its process is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Trial = Callable[[int], str | None]
OUTCOMES = ("clean", "silent", "crashed", "hung")
_READY = "ready"
_START = 600.0  # seconds in which a worker is ready on a loaded machine
_SHOWN = 5  # of what was not clean, kept with a result


class NoMoreTrials(Exception):
    """The attack has no trial of this number, and none of a higher one."""


@dataclasses.dataclass(frozen=True)
class Attack:
    """What is tried, how often in a whole campaign, and how long one trial may take.

    Attributes:
        foreign: Whether the file attacked is of another program, in a container without checksums.
        environment: Makes the worker's variables, in a folder.
    """

    name: str
    prepare: Callable[[Path, int], Trial]
    trials: int
    patience: float = 120.0
    foreign: bool = False
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}


def work(attack: Attack, seed: int, numbers: Iterable[int], folder: Path, deadline: float, report: IO[str]) -> None:
    """What a worker does: a line when it is ready, then one a trial, none of which begins after the deadline."""
    # Where it is, when it hangs; of its children too, whose standard error may be elsewhere.
    faulthandler.register(signal.SIGUSR1, os.dup(2))
    trial = attack.prepare(folder, seed)
    print(_READY, file=report, flush=True)
    for number in numbers:
        if time.monotonic() > deadline:
            return
        try:
            said = trial(number)
            outcome = "clean" if said is None else "silent"
        except NoMoreTrials:
            outcome, said = "end", None
        except BaseException as error:
            outcome, said = "crashed", f"{type(error).__name__}: {error}"
        print(json.dumps({"number": number, "outcome": outcome, "said": said}), file=report, flush=True)


def outcomes(attack: Attack, seed: int, numbers: range, deadline: float) -> Iterator[dict[str, Any]]:
    """Tries an attack by these numbers until the deadline, in workers that are started anew when they die."""
    first = numbers.start
    while first < numbers.stop and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory(prefix="sdw_torture_", ignore_cleanup_errors=True) as folder:
            for result in _of_one_worker(attack, seed, range(first, numbers.stop), Path(folder), deadline):
                if result["outcome"] == "end":
                    return
                first = result["number"] + 1
                yield result


def _of_one_worker(
    attack: Attack, seed: int, numbers: range, folder: Path, deadline: float
) -> Iterator[dict[str, Any]]:
    reading, writing = os.pipe()
    options = {"worker": attack.name, "seed": seed, "numbers": f"{numbers.start}:{numbers.stop}", "deadline": deadline}
    options |= {"report": writing, "folder": folder}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent), *(f"--{name}={value}" for name, value in options.items())],
        pass_fds=[writing],
        env={**os.environ, **attack.environment(folder)},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors").open("w"),
        start_new_session=True,  # so that its children can be killed with it
    )
    os.close(writing)
    number = numbers.start
    try:
        with open(reading, encoding="utf-8") as report:
            lines = _lines(report)
            if lines(_START) != _READY:
                raise RuntimeError(f"{attack.name} did not start: {(folder / 'errors').read_text()[-2000:]}")
            while number < numbers.stop:
                line = lines(attack.patience)
                if line is None:
                    os.killpg(process.pid, signal.SIGUSR1)
                    time.sleep(1.0)
                    said = f"over {attack.patience} s: {(folder / 'errors').read_text()[-2000:]}"
                    yield {"number": number, "outcome": "hung", "said": said}
                    return
                if not line:
                    if process.wait() == 0:  # the deadline
                        return
                    said = f"the process ended: {process.returncode} {(folder / 'errors').read_text()[-300:]}"
                    yield {"number": number, "outcome": "crashed", "said": said}
                    return
                yield json.loads(line)
                number += 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(file: IO[str]) -> Callable[[float], str | None]:
    """The next line of a pipe within so many seconds: "" at its end, None where it does not come."""
    held = b""

    def line(seconds: float) -> str | None:
        nonlocal held
        end = time.monotonic() + seconds
        while b"\n" not in held:
            if not select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            if not (block := os.read(file.fileno(), 1 << 16)):
                return ""
            held += block
        found, held = held.split(b"\n", 1)
        return found.decode()

    return line


def campaign(attacks: list[Attack], seed: int, minutes: float, results: Path) -> None:
    """Tries every attack for its share of the time, from the number on that earlier calls with this seed came to."""
    start = time.monotonic()
    for position, attack in enumerate(attacks):
        before = [line for line in read_results(results) if (line["attack"], line["seed"]) == (attack.name, seed)]
        first = sum(line["tried"] for line in before)
        if any(line["complete"] for line in before):
            continue
        now = time.monotonic()
        share = (start + 60 * minutes - now) / (len(attacks) - position)
        counts: Counter[str] = Counter()
        shown: list[dict[str, Any]] = []
        for result in outcomes(attack, seed, range(first, attack.trials), now + share):
            counts[result["outcome"]] += 1
            if result["outcome"] != "clean" and len(shown) < _SHOWN:
                shown.append(result)
        line = {"attack": attack.name, "seed": seed, "tried": counts.total()}
        line |= {outcome: counts[outcome] for outcome in OUTCOMES}
        line["complete"] = time.monotonic() < now + share  # it ended by itself
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "seconds": round(time.monotonic() - now), "not_clean": shown}) + "\n")
        print(json.dumps(line), flush=True)


def read_results(path: Path) -> list[dict[str, Any]]:
    """A line for each attack and call."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(attacks: list[Attack], results: list[dict[str, Any]]) -> str:
    """What was counted in all calls, a row an attack, in Markdown."""
    rows = [("attack", "tried", *OUTCOMES, "to its end"), ("---", *["---:"] * 5, "---")]
    for attack in attacks:
        lines = [line for line in results if line["attack"] == attack.name]
        if lines:
            counts = [sum(line[name] for line in lines) for name in ("tried", *OUTCOMES)]
            ended = "yes" if any(line["complete"] for line in lines) else "no"
            rows.append((attack.name + (" (foreign)" if attack.foreign else ""), *map("{:,}".format, counts), ended))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
