"""Where unrolled_bc's CUDA kernels find everything and who computes what: csrc/cuda/unrolled_bc_schedule.h."""

import pytest


def schedule(emulated, resident, **options):
    """What is decided for a problem on a device that holds so many blocks, and the bytes of the workspace."""
    problem = emulated.UnrolledBCOptions(ieee=False, keep_tape=True, head="tanh", **options)
    return emulated.unrolled_bc_schedule(problem, resident), emulated.unrolled_bc_cuda_workspace(problem)


@pytest.mark.parametrize(
    ("widths", "rows", "problems", "resident", "groups", "members", "parts"),
    [
        ((17, 256, 256, 256, 6), 256, 1, 132, 1, 128, 8),
        ((17, 256, 256, 256, 6), 256, 1, 120, 1, 120, 4),  # as an H200 holds of clusters; 56 blocks help with weights
        ((17, 256, 256, 256, 6), 256, 2, 132, 2, 64, 4),
        ((17, 256, 256, 256, 6), 256, 4, 132, 4, 32, 2),
        ((17, 256, 256, 256, 6), 256, 8, 132, 8, 16, 1),
        ((17, 256, 256, 256, 6), 256, 20, 132, 8, 16, 1),
        ((17, 64, 64, 6), 256, 1, 132, 1, 32, 2),
        ((17, 256, 6), 5000, 2, 132, 1, 132, 1),
        ((17, 256, 6), 1, 300, 132, 132, 1, 1),
    ],
)
def test_groups_fill_the_device(emulated, widths, rows, problems, resident, groups, members, parts):
    options = {"rows": rows, "widths": widths, "steps": 1, "window": 1, "momentum": 0.0, "recompute": False}
    plan, _ = schedule(emulated, resident, problems=problems, **options)
    assert tuple(plan[name] for name in ("groups", "members", "parts_of_a_team")) == (groups, members, parts)


def test_tiles_hold_a_warps_operand_in_one_line_after_another(emulated):
    places = sorted(emulated.tiled(row, column, 48) for row in range(64) for column in range(48))
    assert places == list(range(64 * 48))
    for lane in range(32):
        assert emulated.tiled(40 + lane // 4, 16 + lane % 4 * 4, 48) == 4 * 512 + 128 + 4 * lane


@pytest.mark.parametrize("resident", [1, 5, 132])
@pytest.mark.parametrize(
    ("widths", "rows", "problems"),
    [((1, 1), 1, 1), ((17, 256, 256, 256, 6), 256, 8), ((376, 100, 33, 300, 17), 1000, 3), ((5, 7, 3), 50, 40)],
)
def test_every_tile_has_one_owner_and_every_number_its_place(emulated, widths, rows, problems, resident):
    options = {"rows": rows, "widths": widths, "steps": 9, "window": 7, "momentum": 0.9, "recompute": True}
    plan, workspace = schedule(emulated, resident, problems=problems, **options)
    assert sorted(plan["rows"]) == list(range(-(-rows // 16)))
    assert plan["groups"] * plan["members"] <= resident
    padded_rows = -(-rows // 32) * 32
    theta_end = pass_end = flat_end = 0
    for i, layer in enumerate(plan["layers"]):
        height, width = layer["out_padded"], layer["in_padded"]
        owned = [(row, column) for l, row, column in plan["weights"] if l == i and row < height and column < width]
        assert sorted(owned) == [(row, column) for row in range(0, height, 32) for column in range(0, width, 32)]
        assert width == -(-widths[i] // 32) * 32
        assert height == -(-widths[i + 1] // 32) * 32
        assert (layer["flat"], layer["weights"], layer["h"]) == (flat_end, theta_end, pass_end)
        assert layer["biases"] == theta_end + 3 * height * width
        assert layer["delta"] == pass_end + 2 * padded_rows * height
        flat_end += widths[i + 1] * (widths[i] + 1)
        theta_end = -(-(layer["biases"] + height) // 32) * 32
        pass_end = layer["delta"] + 2 * padded_rows * height
    assert (plan["flat"], plan["theta"], plan["pass"]) == (flat_end, theta_end, pass_end)
    inputs, outputs = plan["layers"][0]["in_padded"], plan["layers"][-1]["out_padded"]
    assert (plan["length"], plan["segments"]) == (3, 3)
    sizes = [2 * inputs, outputs, 4 * theta_end, 3 * pass_end, theta_end, 6 * theta_end]
    sizes += [theta_end, theta_end, pass_end]
    sizes = [size * padded_rows if i < 2 else size for i, size in enumerate(sizes)]
    sizes += [padded_rows * width for width in (inputs, outputs, outputs)]
    assert plan["parts"][0] == 0
    for begin, end, size in zip(plan["parts"][:-1], plan["parts"][1:], sizes, strict=True):
        assert end - begin == -(-size // 32) * 32
    assert workspace == 4 * problems * (plan["parts"][-1] + 32)
