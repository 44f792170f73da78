"""A model grown in width and depth is the same, bit by bit, whatever layout wrote its source, how many ranks grew it,
and whatever layout loads it: weights, masters and both moments.

Uneven shares and cancelling noise make every element of it depend on random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growth_megatron.checkpoint.folder.manifest import validate_checkpoint
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import LAYER_PREFIX
from growth_megatron.model.tensors import MOMENT_PREFIXES, STATE_PREFIXES, split_state_key, whole
from tests.growth.width_workers import GROWTH, SEED, STEPS, plan
from tests.ranks import run_ranks

ONE: dict[str, Any] = {}
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
SOURCES: dict[str, tuple[int, dict[str, Any]]] = {"1x1x1": (1, ONE), "TP2": (2, TP2), "PP2": (2, PP2), "DP2": (2, ONE)}
TARGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1x1": (1, ONE),
    "TP2": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, {**PP2, "virtual_pipeline_parallel_size": 2}),
    "TP2xPP2": (4, {**TP2, **PP2}),
}
GROWN_BY = {  # ranks whose growth of each source is loaded at one and four ranks; two load what two ranks grew
    "1x1x1": 2,
    "TP2": 1,
    "PP2": 2,
    "DP2": 1,
}

Values = dict[str, torch.Tensor]


@dataclass
class Checkpoints:
    """Sources by layout, growths by source and number of ranks, growths saved again by source and target."""

    sources: dict[str, Path]
    grown: dict[tuple[str, int], Path]
    reloaded: dict[tuple[str, str], Path] = field(default_factory=dict)
    loads: list[dict[str, float]] = field(default_factory=list)

    def run(self, ranks: int, first: Sequence[dict[str, Any]] = ()) -> None:
        """On so many ranks the jobs ``first``, then the loads at the target layouts of that size."""
        jobs = list(first)
        for (name, target), path in self.reloaded.items():
            size, layout = TARGETS[target]
            if size == ranks:
                grown = self.grown[name, 2 if ranks == 2 else GROWN_BY[name]]
                jobs.append({"source": str(grown), "target": str(path), "layout": layout, "grown": True})
        for outcomes in run_ranks("tests.growth.width_workers:load_save_grow", ranks, {"jobs": jobs}):
            self.loads += outcomes


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("width")
    found = Checkpoints(
        {name: folder / f"source_{name}" for name in SOURCES},
        {(name, ranks): folder / f"grown_{name}_by_{ranks}" for name in SOURCES for ranks in (1, 2)},
        {(name, target): folder / f"{name}_at_{target}" for name in SOURCES for target in TARGETS},
    )
    trained = found.sources["1x1x1"]
    run_ranks("tests.growth.width_workers:train_and_save", 1, {"target": str(trained)})
    copies = [
        {"source": str(trained), "target": str(path), "layout": SOURCES[name][1], "grown": False}
        for name, path in found.sources.items()
        if path != trained
    ]
    growths = [{"source": str(found.sources[name]), "target": str(found.grown[name, 2])} for name in SOURCES]
    found.run(2, copies + growths)
    for name, source in found.sources.items():
        grow_checkpoint(source, found.grown[name, 1], plan(), GROWTH["optimizer_state"])
    found.run(1)
    found.run(4)
    return found


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints) -> Values:
    """The model that one rank trained, seen through the plan."""
    return _values(GrownSource(DistCheckpoint(checkpoints.sources["1x1x1"]), plan(), GROWTH["optimizer_state"]))


def _values(source: Any) -> Values:
    return {key: source.read(key, whole(source.spec(key).shape)) for key in source.keys()}


def _assert_same(found: Values, expected: Values, case: Any) -> None:
    assert found.keys() == expected.keys(), case
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, (case, key)
        assert torch.equal(found[key], value), (case, key)


def test_what_each_layout_gathers_of_each_growth_is_the_same(checkpoints: Checkpoints, reference: Values) -> None:
    assert len(checkpoints.reloaded) == 16
    for case, path in checkpoints.reloaded.items():
        _assert_same(_values(DistCheckpoint(path)), reference, case)


def test_what_one_and_two_ranks_wrote_is_the_same(checkpoints: Checkpoints, reference: Values) -> None:
    for case, path in checkpoints.grown.items():
        assert validate_checkpoint(path, full=True) is None
        _assert_same(_values(DistCheckpoint(path)), reference, case)


def test_the_reference_holds_everything_and_compares_something(reference: Values) -> None:
    """Weights in bfloat16 beside masters that they are not equal to, and moments that are not zero."""
    assert len(reference) == len(STATE_PREFIXES) * (4 * 6 + 3)
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    weight, master = reference[key], reference["optimizer.state.param." + key]
    assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(weight, master.to(torch.bfloat16))
    assert not torch.equal(weight.float(), master)
    new = tuple(f"{LAYER_PREFIX}{layer}." for layer in (1, 3))  # identity layers begin with zero moments
    for key, value in reference.items():
        if key.startswith(MOMENT_PREFIXES):
            assert value.any() != split_state_key(key)[1].startswith(new), key


def test_every_load_has_the_sources_step_and_every_tensor(checkpoints: Checkpoints) -> None:
    assert len(checkpoints.loads) == 4 * (1 + 2 + 2 + 4) + 3 * 2  # and the copies of the source at two ranks
    assert {load["step"] for load in checkpoints.loads} == {float(STEPS)}


def test_negative_control_another_seed_differs(checkpoints: Checkpoints, reference: Values) -> None:
    source = DistCheckpoint(checkpoints.sources["1x1x1"])
    other = _values(GrownSource(source, plan(SEED + 1), GROWTH["optimizer_state"]))
    same = {key for key, value in other.items() if torch.equal(value, reference[key])}
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in same
    assert "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight" not in same


def test_the_sources_are_split_in_different_ways(checkpoints: Checkpoints) -> None:
    """And hold the same values, so that one reference serves."""
    expected = _values(DistCheckpoint(checkpoints.sources["1x1x1"]))
    for name, path in checkpoints.sources.items():
        _assert_same(_values(DistCheckpoint(path)), expected, name)
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    entries = {
        name: DistCheckpoint(path).metadata.state_dict_metadata[key] for name, path in checkpoints.sources.items()
    }
    chunks = {name: len(entry.chunks) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    assert (chunks["1x1x1"], chunks["TP2"]) == (1, 2)
    files = {name: len(list(path.glob("*.distcp"))) for name, path in checkpoints.sources.items()}
    assert files["PP2"] > files["1x1x1"]
