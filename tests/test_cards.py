"""Objects show themselves in a line and in a table, and are equal where their content is."""

from __future__ import annotations

import copy
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import sdw_fast as sdw
from sdw_fast.cards import Card
from sdw_fast.units import Affine

SMALL = {"hidden": (8, 4), "inner_steps": 2}


class _Tags(HTMLParser):
    """Checks that every tag is closed, and gathers the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_objects_say_what_they_are(bounded_data: sdw.TransitionDataset, small_teacher: sdw.Teacher) -> None:
    pairs = sdw.real_pairs(bounded_data, 7)
    scored = replace(pairs, evaluation={"mean": 1234.5, "std": 6.0, "episodes": 20, "normalized_mean": None})
    cases = [
        (bounded_data, ["TransitionDataset", "Hopper-v5", "400", "11 → 3", bounded_data.content_hash[:8]]),
        (pairs, ["SyntheticDataset", "pairs=7", "Hopper-v5"]),
        (scored, ["return=1234 ± 6 over 20 episodes"]),
        (small_teacher, ["Teacher", "critic=<lambda>"]),
        (sdw.Teacher.pretrained("hopper/medium"), ["Hopper-v5", "11 → 256 → 256 → 3", "min of 2", "iql"]),
        (sdw.behavior_clone(pairs, ensemble=3, **SMALL), ["MLPPolicy", "11 → 8 → 4 → 3", "members=3"]),
        (sdw.DistillConfig(size=9, inner_width=None), ["DistillConfig(size=9, inner_width=none)"]),
    ]
    for thing, expected in cases:
        assert all(part in repr(thing) for part in expected), repr(thing)
        assert len(repr(thing)) < 300
        page = _Tags()
        page.feed(thing._repr_html_())
        assert not page.open
        assert type(thing).__name__ in page.text


def test_text_from_files_is_escaped() -> None:
    card = Card("X", {"name": "<script>alert(1)</script> | b", "size": 12_345, "none": None})
    assert "<script>" not in card.html()
    assert str(card) == "X(name=<script>alert(1)</script> | b, size=12,345)"
    assert "&#124; b" in card.markdown()


def test_datasets_are_equal_by_content(bounded_data: sdw.TransitionDataset) -> None:
    same = replace(bounded_data, name="another name", observations=bounded_data.observations.copy())
    assert same == bounded_data
    assert hash(same) == hash(bounded_data)
    rewards = bounded_data.rewards.copy()
    rewards[3] += 1
    units = replace(bounded_data.units, env_id="Walker2d-v5")
    for other in (replace(bounded_data, rewards=rewards), replace(bounded_data, units=units), "a name"):
        assert other != bounded_data
    assert len({same, bounded_data, replace(bounded_data, rewards=rewards)}) == 2


def test_sets_are_equal_by_pairs_and_units(bounded_data: sdw.TransitionDataset) -> None:
    pairs = sdw.real_pairs(bounded_data, 7)
    same = replace(pairs, config={"steps": 3}, observations=pairs.observations.copy())
    assert same == pairs
    assert hash(same) == hash(pairs)
    assert sdw.real_pairs(bounded_data, 7, seed=1) != pairs
    assert replace(pairs, actions=pairs.actions + 1) != pairs
    assert pairs != 7


def test_configs_and_units_are_equal_by_value() -> None:
    assert sdw.DistillConfig(size=3) == sdw.DistillConfig(size=3) != sdw.DistillConfig()
    assert len({sdw.DistillConfig(size=3), sdw.DistillConfig(size=3)}) == 1
    a, b = (sdw.Units(Affine(np.zeros(2), np.ones(2)), env_id="X-v0") for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != sdw.Units(Affine(np.ones(2), np.ones(2)), env_id="X-v0")


def test_policies_keep_their_identity(bounded_data: sdw.TransitionDataset) -> None:
    policy = sdw.behavior_clone(sdw.real_pairs(bounded_data, 7), **SMALL)
    other = copy.deepcopy(policy)
    assert repr(other) == repr(policy)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert repr(other) != repr(policy)
    assert hash(policy) != hash(other)


def test_a_dataset_card_says_what_was_distilled(bounded_data: sdw.TransitionDataset) -> None:
    pairs = replace(sdw.real_pairs(bounded_data, 7), config={"objective": "sdw", "window": None}, dataset_name="mine")
    card = pairs.dataset_card()
    assert card.startswith("---\nlicense:")
    for part in ("Hopper-v5", "| distilled from | mine |", "| objective | sdw |", "| window | none |"):
        assert part in card


@pytest.mark.parametrize("kind", [sdw.Teacher, sdw.SyntheticDataset])
def test_what_is_not_shipped_is_named(kind: type) -> None:
    with pytest.raises(ValueError, match=r"no (teacher|set) for 'ant/medium' comes with the package; there are \["):
        kind.pretrained("ant/medium")
