"""Micro-batches: what each rank gets, and that a step's samples do not depend on the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from growth_megatron.config.schema import DataConfig
from growth_megatron.data.dataset import build_train_dataset, build_validation_dataset
from growth_megatron.data.loader import BatchLoader, validation_batches
from growth_megatron.errors import ConfigError, DataError

LENGTH = 32


def run(data: DataConfig, cache: Path, size: int, steps: list[int], micro: int = 2, batch: int = 8):
    """Tokens of the given steps at a data-parallel size, micro-batches in the order of the step."""
    stream = build_train_dataset(data, LENGTH, 1, cache)
    loaders = [BatchLoader(stream, micro, batch, rank, size) for rank in range(size)]
    result = []
    for step in steps:
        ranks = [loader.micro_batches(step * batch) for loader in loaders]
        result.append([ranks[rank][j]["tokens"] for j in range(len(ranks[0])) for rank in range(size)])
    for loader in loaders:
        loader.close()
    return result


def test_a_steps_micro_batches_do_not_depend_on_the_data_parallel_size(blended: DataConfig, tmp_path: Path) -> None:
    expected = run(blended, tmp_path, 1, [0, 1, 2, 3])
    for size in (2, 4):
        for step, reference in zip(run(blended, tmp_path, size, [0, 1, 2, 3]), expected, strict=True):
            assert len(step) == len(reference) == 4
            assert all(torch.equal(a, b) for a, b in zip(step, reference, strict=True))


def test_samples_do_not_depend_on_the_micro_batch_size(blended: DataConfig, tmp_path: Path) -> None:
    small, large = (run(blended, tmp_path, 2, [3], micro=micro)[0] for micro in (1, 4))
    assert torch.equal(torch.cat(small), torch.cat(large))


def test_restarts_jumps_and_reading_ahead_change_nothing(blended: DataConfig, tmp_path: Path) -> None:
    reference = run(blended, tmp_path, 2, [0, 1, 2, 3, 4])
    resumed = run(blended, tmp_path, 2, [3, 4])
    jumping = run(blended, tmp_path, 2, [4, 1, 2, 2, 0])
    for got, wanted in [
        *zip(resumed, reference[3:], strict=True),
        (jumping[0], reference[4]),
        (jumping[3], reference[2]),
    ]:
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_batches_are_stacked_samples_of_the_stream(blended: DataConfig, tmp_path: Path) -> None:
    stream = build_train_dataset(blended, LENGTH, 1, tmp_path)
    with BatchLoader(stream, 3, 12, 1, 2) as loader:
        assert loader.num_micro_batches == 2
        assert loader.sample_indices(100) == [[103, 104, 105], [109, 110, 111]]
        batches = loader.micro_batches(100)
    assert set(batches[0]) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert torch.equal(batches[1]["labels"][2], stream[111]["labels"])
    assert batches[0]["tokens"].shape == (3, LENGTH)


def test_an_error_while_reading_ahead_reaches_the_caller() -> None:
    class Broken:
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index >= 4:
                raise DataError("the disk is gone")
            return {"tokens": torch.tensor([index])}

    with BatchLoader(Broken(), 1, 4, 0, 1) as loader:
        assert [batch["tokens"].item() for batch in loader.micro_batches(0)] == [0, 1, 2, 3]
        with pytest.raises(DataError, match="disk is gone"):
            loader.micro_batches(4)


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="global_batch_size 6 is not a multiple of micro_batch_size 2 x"):
        BatchLoader([], 2, 6, 0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [1, 8, 13])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_validation_counts_every_sample_once_and_all_ranks_alike(
    blended: DataConfig, tmp_path: Path, samples: int, size: int
) -> None:
    held_out = build_validation_dataset(blended, LENGTH, samples, tmp_path)
    assert held_out is not None
    ranks = [list(validation_batches(held_out, 2, rank, size)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch["tokens"].shape == (2, LENGTH) for batches in ranks for batch in batches)
    weighted = sum((batch["tokens"] * batch["loss_mask"]).sum().item() for batches in ranks for batch in batches)
    assert sum(batch["loss_mask"].sum().item() for batches in ranks for batch in batches) == samples * LENGTH
    assert weighted == sum(held_out[index]["tokens"].sum().item() for index in range(samples))
