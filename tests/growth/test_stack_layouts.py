"""A stacked checkpoint holds its source's layers bit by bit, whatever layout wrote it and whatever layout reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.plan import plan_depth
from growth_megatron.model.architecture import LAYER_PREFIX
from growth_megatron.model.tensors import MOMENT_PREFIXES, split_state_key
from tests.ranks import run_ranks
from tests.workers import SMALL

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1x1": (1, {}),
    "TP2": (2, {"tensor_parallel_size": 2}),
    "PP2": (2, {"pipeline_parallel_size": 2}),
    "TP2xPP2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}
BASE = {**SMALL, "num_layers": 2}
GROWN = {**SMALL, "num_layers": 4}
POLICIES = ("carry", "reset")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained base, saved at each layout."""
    folder = tmp_path_factory.mktemp("sources")
    for ranks in (1, 2, 4):
        names = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
        cases = [
            {"layout": LAYOUTS[name][1], "directory": str(folder / name), "model": BASE, "steps": 3} for name in names
        ]
        run_ranks("tests.workers:save_all_at", ranks, {"cases": cases})
    return {name: folder / name / "checkpoints" / "step_00000003" for name in LAYOUTS}


@pytest.fixture(scope="module")
def grown(sources: dict[str, Path]) -> dict[tuple[str, str], Path]:
    """Each base grown under each policy."""
    plan = plan_depth(ModelConfig(**BASE), ModelConfig(**GROWN), stack_layers(2, 4))
    results = {}
    for name, source in sources.items():
        for policy in POLICIES:
            target = source.parent / f"grown_{policy}"
            result = grow_checkpoint(source, target, plan, policy)
            assert result.bytes_copied == 0
            assert result.bytes_written < 200_000
            results[name, policy] = target
    return results


@pytest.fixture(scope="module")
def reloaded(
    grown: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], tuple[Path, list[Any]]]:
    """Each grown checkpoint loaded at each layout and saved from there; also what one step moved, by rank."""
    folder = tmp_path_factory.mktemp("reloaded")
    results: dict[tuple[str, str, str], tuple[Path, list[Any]]] = {}
    for ranks in (1, 2, 4):
        keys: list[tuple[str, str, str]] = []
        cases: list[dict[str, Any]] = []
        for target, (size, layout) in LAYOUTS.items():
            for (source, policy), path in grown.items():
                if size != ranks or (policy == "reset" and source != "TP2"):  # the policy does not see the layout
                    continue
                copy = folder / f"{source}_{policy}_{target}"
                keys.append((source, policy, target))
                cases.append({"layout": layout, "model": GROWN, "source": str(path), "target": str(copy)})
        outcomes = run_ranks("tests.workers:load_and_save_all", ranks, {"cases": cases})
        for number, (key, case) in enumerate(zip(keys, cases, strict=True)):
            results[key] = Path(case["target"]), [outcome[number] for outcome in outcomes]
    return results


def _read(checkpoint: DistCheckpoint, key: str) -> torch.Tensor:
    return checkpoint.read(key, tuple(slice(0, size) for size in checkpoint.spec(key).shape))


def _source_key(key: str, layers: int) -> str:
    prefix, name = split_state_key(key)
    if not name.startswith(LAYER_PREFIX):
        return key
    layer, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    return f"{prefix}{LAYER_PREFIX}{int(layer) % layers}.{rest}"


def _count_equal(target: DistCheckpoint, source: DistCheckpoint, moments: str) -> int:
    count = 0
    for key in target.keys():
        if moments == "skip" and split_state_key(key)[0] in MOMENT_PREFIXES:
            continue
        assert torch.equal(_read(target, key), _read(source, _source_key(key, 2))), key
        count += 1
    return count


def test_grown_weights_masters_and_moments_equal_their_source_layer_at_every_layout(
    sources: dict[str, Path], reloaded: dict[tuple[str, str, str], tuple[Path, list[Any]]]
) -> None:
    checked = 0
    for (source, policy, _), (path, _) in reloaded.items():
        if policy == "carry":
            checked += _count_equal(DistCheckpoint(path), DistCheckpoint(sources[source]), "compare")
    assert checked == 16 * 4 * (4 * 6 + 3)  # layouts x (weight, master, two moments) x tensors of 4 layers and the rest


def test_reset_keeps_the_weights_and_zeroes_both_moments_at_every_layout(
    sources: dict[str, Path], reloaded: dict[tuple[str, str, str], tuple[Path, list[Any]]]
) -> None:
    paths = [(source, path) for (source, policy, _), (path, _) in reloaded.items() if policy == "reset"]
    assert len(paths) == 4
    for source, path in paths:
        target = DistCheckpoint(path)
        _count_equal(target, DistCheckpoint(sources[source]), "skip")
        for key in target.keys():
            if split_state_key(key)[0] in MOMENT_PREFIXES:
                assert not _read(target, key).any(), key


def test_the_sources_moments_are_not_zero(sources: dict[str, Path]) -> None:
    """Else the two tests above could not tell carry from reset."""
    source = DistCheckpoint(sources["PP2"])
    assert all(_read(source, k).any() for k in source.keys() if split_state_key(k)[0] in MOMENT_PREFIXES)


def test_after_growth_every_parameter_is_in_the_optimizer_once_and_moves_in_one_step(
    reloaded: dict[tuple[str, str, str], tuple[Path, list[Any]]],
) -> None:
    for key, (_, ranks) in reloaded.items():
        for outcome in ranks:
            assert outcome["moved"] == outcome["parameters"] > 0, key
            elements, in_optimizer = outcome["in_optimizer"]
            assert elements == in_optimizer, key


def test_layouts_differ_in_how_they_split_the_files(sources: dict[str, Path]) -> None:
    """The layouts above are really different ones on disk."""
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    entries = {name: DistCheckpoint(path).metadata.state_dict_metadata[key] for name, path in sources.items()}
    chunks = {name: len(entry.chunks) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    assert chunks["1x1x1"] == 1
    assert chunks["TP2"] == 2
