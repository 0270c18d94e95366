"""`python -m benchmarks.summarize`: benchmarks/results/README.md from the JSON files beside it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.table import Row, Table, cells, markdown

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = """# Results

Made by `python -m benchmarks.summarize` from the JSON files here, which hold every sample, the versions and the
commit. Medians; "× ours" is the median over the rounds of the ratio within a round. The machine (two cores of a shared
AMD EPYC, Zen 4, AVX-512, 24 GiB) slows down and speeds up by a factor of two with its neighbors' load, and two threads
suffer more than one: compare rows of one table, not tables.
"""


def table_in_markdown(table: Table) -> str:
    """A table's rows in Markdown; peak memory where it was measured."""
    memory = any(row.peak_bytes is not None for row in table.rows)
    header = ["", "median", "quartiles", "× ours"] + ["peak memory"] * memory
    rows = [cells(row, memory) for row in table.rows]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    return markdown(header, rows)


def section(path: Path) -> str:
    """One JSON file: its heading, title, origin and table."""
    content = json.loads(path.read_text())
    machine = content.pop("machine")
    table = Table(content.pop("title"), [Row(**row) for row in content.pop("rows")], **content)
    origin = f"Commit {machine['commit']}, {machine['date'][:10]}, {machine['threads']['sdw_fast']} threads."
    return f"\n## {path.stem}\n\n{table.title}. {origin}\n\n{table_in_markdown(table)}\n"


def main() -> None:
    sections = [section(path) for path in sorted(RESULTS.glob("*.json"))]
    (RESULTS / "README.md").write_text(HEAD + "".join(sections))


if __name__ == "__main__":
    main()
