"""`make torture`: every attack for its share of an hour, and one table.

    python tests/faults [--minutes 60] [--seed 0] [--only NAME …] [--out FILE]

Results are appended to FILE, and a later call with the same seed goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "ops"), str(HERE.parents[1])]

import concurrency  # noqa: E402
import disks  # noqa: E402
import kills  # noqa: E402
import memory  # noqa: E402
import mutations  # noqa: E402
import restarts  # noqa: E402
import soak  # noqa: E402
from campaign import campaign, read_results, table, work  # noqa: E402

ATTACKS = [
    attack for module in (mutations, kills, memory, concurrency, disks, soak, restarts) for attack in module.ATTACKS
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of all attacks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="attacks whose names hold one of these words")
    parser.add_argument("--out", type=Path, default=Path("torture.jsonl"), help="results, appended")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--numbers", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        [attack] = [attack for attack in ATTACKS if attack.name == options.worker]
        numbers = range(*map(int, options.numbers.split(":")))
        with open(options.report, "w", encoding="utf-8") as report:
            work(attack, options.seed, numbers, options.folder, options.deadline, report)
        return
    chosen = [attack for attack in ATTACKS if any(word in attack.name for word in options.only)]
    campaign(chosen, options.seed, options.minutes, options.out)
    results = read_results(options.out)
    print(table(ATTACKS, results))
    for line in results:
        for trial in line["not_clean"]:
            print(f"{line['attack']}, seed {line['seed']}:", *trial.values())


if __name__ == "__main__":
    main()
