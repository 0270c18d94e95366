"""The map of density weights: its table from rows made by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.studies import density_map


def row(policies: list[float], ensemble: float) -> dict[str, Any]:
    diversity = {"error": 0.01234, "coverage": 0.5, "participation_ratio": 5.0}
    return {"policies": policies, "ensemble": ensemble, **diversity}


def test_leads_are_taken_seed_by_seed_and_averaged_over_points() -> None:
    found = {}
    for number, point in enumerate(density_map.points("hopper")):
        for seed, lead in ((0, 1.0 + number), (1, 3.0 + number)):
            found[seed, point, "av-pbc"] = row([40.0, 60.0], 70.0)
            found[seed, point, "sdw"] = row([50.0 + lead], 70.0 - lead)
    del found[1, ("hopper", 1.0, 0), "sdw"]  # the last point has one seed
    lines = density_map.results_table(found).splitlines()
    assert lines[2] == "| hopper | 0% | 3 | 50.0 ± 0.0 (2) | 2.0 ± 1.0 (2) | -2.0 ± 1.0 (2) | 0.0123 | 0.50 | 5.0 |"
    assert lines[13] == "| hopper | 100% | all | 50.0 (1) | 12.0 (1) | -12.0 (1) | 0.0123 | 0.50 | 5.0 |"
    # (1 + 12) / 2, of the seed that has all points
    assert lines[14] == "| hopper | mean |  |  | 6.5 (1) | -6.5 (1) |  |  |  |"
    assert lines[-1] == "| halfcheetah | mean |  |  | missing | missing |  |  |  |"
