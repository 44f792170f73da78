"""Sources and jobs of the checkpoint writer's tests, also for several ranks and for processes that are killed."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from growth_megatron.checkpoint.folder.manifest import read_identified_manifest
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.checkpoint.torch_dist.writer import WriteResult, write_checkpoint
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import GrowthMegatronError
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import Region, TensorSpec
from tests.checkpoint.written import PREFIXES, extra_states, geometry, manifest_of

MEGATRON_MODEL = {"num_layers": 2}
COMMON: dict[str, Any] = {"iteration": 100, "optimizer": {"param_groups": [{"step": 100.0}]}}


class ComputedSource:
    """Tensors of a model whose every element is a function of its key and position; weights bfloat16, state float32.

    ``fault`` is (key, row, what): at that row the values turn ``nan`` or ``inf``, or the read raises.
    """

    def __init__(self, model: ModelConfig, fault: tuple[str, int, Any] | None = None, pause_s: float = 0.0) -> None:
        self._shapes = {prefix + key: shape for prefix in PREFIXES for key, shape in tensor_shapes(model).items()}
        self._fault, self._pause_s = fault, pause_s
        self.reads: list[tuple[str, int]] = []

    def keys(self) -> list[str]:
        return list(self._shapes)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._shapes[key], torch.bfloat16 if key[:9] != "optimizer" else torch.float32)

    def read(self, key: str, region: Region) -> torch.Tensor:
        self.reads.append((key, region[0].start))
        time.sleep(self._pause_s)
        shape = self._shapes[key]
        start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "little") % 997
        values = torch.zeros([part.stop - part.start for part in region])
        for axis, part in enumerate(region):
            index = torch.arange(part.start, part.stop).view([-1 if n == axis else 1 for n in range(len(shape))])
            values += (index * (31, 17)[axis] + start) % 1009
        if self._fault is not None and self._fault[0] == key and region[0].start <= self._fault[1] < region[0].stop:
            if isinstance(self._fault[2], BaseException):
                raise self._fault[2]
            values[self._fault[1] - region[0].start] = float(self._fault[2])
        return values.to(self.spec(key).dtype)


def assert_holds(checkpoint: Path, source: Any) -> None:
    """The checkpoint has the tensors of ``source``, bit for bit, and no others."""
    stored = DistCheckpoint(checkpoint)
    assert set(stored.keys()) == set(source.keys())
    for key in source.keys():
        assert stored.spec(key) == source.spec(key)
        expected = source.read(key, tuple(slice(0, size) for size in source.spec(key).shape))
        assert torch.equal(stored.read(key), expected), key


def write(target: Path, source: Any = None, model: ModelConfig | None = None, **options: Any) -> WriteResult:
    """A checkpoint of ``ComputedSource`` in many small chunks and files, unless ``options`` say otherwise."""
    model = model or geometry(3)
    options = {"fingerprint": "job", "chunk_bytes": 200, "file_bytes": 4000, **options}
    objects = extra_states(model)
    return write_checkpoint(
        source or ComputedSource(model), target, manifest_of(model), COMMON, objects=objects, **options
    )


def write_on_ranks(cases: dict[str, Any]) -> dict[str, Any]:
    """What came of each case on this rank; a case is ``target`` and, if any, a ``fault`` (rank, key, row, what)."""
    import torch.distributed as dist

    outcomes = {}
    for name, case in cases.items():
        rank, key, row, what = case.get("fault", (None,) * 4)
        fault = (
            (key, row, RuntimeError("no such luck") if what == "raise" else what) if rank == dist.get_rank() else None
        )
        source = ComputedSource(geometry(3), fault, pause_s=0.002)
        outcomes[name] = _outcome(Path(case["target"]), source)
    return outcomes


def _outcome(target: Path, source: ComputedSource) -> dict[str, Any]:
    reported: list[tuple[int, int]] = []
    try:
        result = write(target, source, progress=lambda done, in_all: reported.append((done, in_all)))
    except (GrowthMegatronError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}", "reads": source.reads}
    return {
        "manifest": read_identified_manifest(result.path)[1],
        "written": result.bytes_written,
        "resumed": result.bytes_resumed,
        "reads": source.reads,
        "first": reported[0],
        "last": reported[-1],
    }


def train_write_load(folder: str, layouts: dict[str, Any]) -> None:
    """Train at TP2, write the checkpoint again as ``folder/written``, load that at ``layouts`` and save it anew."""
    from growth_megatron.checkpoint.folder.manifest import read_manifest
    from growth_megatron.checkpoint.torch_dist.reader import read_common
    from tests.workers import load_and_save_all, save_at

    save_at({"tensor_parallel_size": 2}, f"{folder}/run", MEGATRON_MODEL, steps=2)
    saved = Path(folder) / "run" / "checkpoints" / "step_00000002"
    source = DistCheckpoint(saved)
    write_checkpoint(
        source,
        Path(folder) / "written",
        read_manifest(saved),
        read_common(saved),
        objects={key: source.read_object(key) for key in source.object_keys()},
        fingerprint="again",
        chunk_bytes=3000,
        file_bytes=100_000,
    )
    written = f"{folder}/written"
    load_and_save_all(
        [
            {"source": written, "target": f"{folder}/{name}", "layout": layout, "model": MEGATRON_MODEL}
            for name, layout in layouts.items()
        ]
    )


def main() -> None:
    """``write_jobs TARGET OPTIONS``: one attempt, in a process of its own that may be killed."""
    options = json.loads(sys.argv[2])
    model = geometry(**options.pop("model"))
    write(Path(sys.argv[1]), ComputedSource(model, pause_s=options.pop("pause_s")), model, **options)


if __name__ == "__main__":
    main()
