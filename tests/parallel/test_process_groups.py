"""A layout makes the groups that are needed and no others: each more is connections from every rank to every other."""

from __future__ import annotations

import pytest

from growth_megatron.parallel.process_groups import _subgroups_of_one_backend, parallel_state
from tests.ranks import run_ranks

CONNECTIONS = [6, 9, 5]


def test_no_layout_makes_groups_for_a_second_backend() -> None:
    """megatron-core's own default adds a data-parallel and an expert group on gloo, and others by layout."""
    layouts = [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
    groups = run_ranks("tests.workers:process_groups_of", 2, {"layouts": layouts})[0]
    assert not [name for made in groups for name in made if "GLOO" in name.upper()]
    parallel = ("TENSOR_MODEL_PARALLEL_GROUP", "PIPELINE_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP")
    assert [[made[name] for name in parallel] for made in groups] == [[1, 1, 2], [2, 1, 1], [1, 2, 1]]
    # Connections of this rank beside the default group's: one to each other member of a group.
    assert [sum(size - 1 for size in made.values()) for made in groups] == CONNECTIONS


def test_subgroups_get_the_devices_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(parallel_state, "create_group", lambda ranks, **options: made.append(options))
    before = parallel_state.create_group
    with _subgroups_of_one_backend("nccl"):
        parallel_state.create_group([0], backend=None, group_desc="TP")
        parallel_state.create_group([0])
        parallel_state.create_group([0], backend="gloo")
    assert [options["backend"] for options in made] == ["nccl", "nccl", "gloo"]
    assert parallel_state.create_group is before
