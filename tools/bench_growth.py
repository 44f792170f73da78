"""What a growth costs, against copying the same bytes, a plain streaming script and mergekit, on this machine.

    python tools/bench_growth.py                                all of it: some minutes, 8 GiB of disk under --directory
    python tools/bench_growth.py --only link plan               parts of it, by name
    python tools/bench_growth.py --mergekit VENV/bin/mergekit-yaml   with the peer, from an environment of its own
    python tools/bench_growth.py --quick                        seconds: shows that it runs, measures nothing

Everything is compared in turn in one session, sources out of the page cache, flushes to the disk counted; medians of
--repeats turns. What is measured:

1. `link`: 6 -> 24 layers of a full training state through new metadata over linked files: seconds, bytes written.
2. `depth`: the same with every byte written (--materialize), against `cp` and fsync of the target's files.
3. `width`: hidden size, heads and ffn doubled, with and without noise, against a script that grows and saves one whole
   tensor after the other.
4. `memory`: peak anonymous memory of `width` beyond the imports, and the same at twice the layers.
5. `plan`: `grow --plan` of a 70B checkpoint's metadata, the whole command.
6. `peer`: mergekit's passthrough and `grow hf:A hf:B` on the same weights, whole commands.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from growth_megatron.checkpoint.folder.manifest import FileEntry, Manifest, library_version, write_manifest
from growth_megatron.checkpoint.huggingface.writer import export_huggingface
from growth_megatron.checkpoint.origin import fresh_objects
from growth_megatron.checkpoint.torch_dist.optimizer_groups import fresh_common
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.checkpoint.torch_dist.writer import write_checkpoint
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.config.units import format_bytes
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import STATE_PREFIXES, Region, TensorSpec, whole

Figures = dict[str, Any]

LIMITS = {
    "link_seconds": 1.0,
    "link_written_bytes": 1e6,
    "depth_to_copy": 1.5,
    "width_to_streamer": 1.3,
    "noise_to_streamer": 2.5,
    "memory_bytes": 2 * 64 * 2**20,
    "plan_seconds": 3.0,
}
PARTS = ("link", "depth", "width", "memory", "plan", "peer")
SMALL = {"vocab_size": 8192, "sequence_length": 512}
DEPTH = ModelConfig(num_layers=6, hidden_size=768, num_attention_heads=12, ffn_hidden_size=2304, **SMALL)
WIDTH = ModelConfig(num_layers=8, hidden_size=512, num_attention_heads=8, ffn_hidden_size=1408, **SMALL)
LARGE = ModelConfig(
    num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28672, vocab_size=32000
)
TINY = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "vocab_size": 256}


class RandomState:
    """A trained model's weights, masters and moments, as far as a benchmark can tell."""

    def __init__(self, model: ModelConfig) -> None:
        self._shapes = {prefix + key: shape for prefix in STATE_PREFIXES for key, shape in tensor_shapes(model).items()}

    def keys(self) -> list[str]:
        return list(self._shapes)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._shapes[key], torch.float32)

    def read(self, key: str, region: Region) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{key}{region[0]}".encode()))
        return torch.rand([part.stop - part.start for part in region], generator=generator)


def manifest_of(model: ModelConfig) -> Manifest:
    return Manifest(
        library_version=library_version(),
        step=1000,
        stage=0,
        stage_step=1000,
        consumed_samples=0,
        consumed_tokens=0,
        flops=0.0,
        geometry=model,
        layout=ParallelConfig(),
        world_size=1,
    )


def write_source(folder: Path, model: ModelConfig) -> Path:
    write_checkpoint(
        RandomState(model),
        folder,
        manifest_of(model),
        fresh_common(),
        objects=fresh_objects(model),
        fingerprint="bench",
    )
    return folder


def make_cold(folder: Path) -> None:
    """Put the files of ``folder`` out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Callable[[], Any], source: Path, target: Path | None = None) -> float:
    """Seconds of ``action`` from a cold source, the target removed before."""
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)
    os.sync()
    make_cold(source)
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def in_turn(actions: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action, all in turn, the order turned round every time."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(actions[name]())
    return seconds


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bench_link(root: Path, model: ModelConfig, repeats: int) -> Figures:
    source, target = write_source(root / "source", model), root / "linked"
    plan = plan_growth(model, model.model_copy(update={"num_layers": 4 * model.num_layers}), GrowthConfig())
    written = []

    def grow() -> None:
        written.append(grow_checkpoint(source, target, plan, "carry").bytes_written)

    seconds = [timed(grow, source, target) for _ in range(repeats)]
    numel = sum(math.prod(shape) for shape in tensor_shapes(plan.target_geometry).values())
    return {
        "source_bytes": tree_bytes(source),
        "target_bytes_if_written": 16 * numel,
        "seconds": median(seconds),
        "written_bytes": max(written),
    }


def bench_depth(root: Path, model: ModelConfig, repeats: int) -> Figures:
    source, target, copy = write_source(root / "source", model), root / "written", root / "copy"
    plan = plan_growth(model, model.model_copy(update={"num_layers": 4 * model.num_layers}), GrowthConfig())
    kept = root / "kept"
    grow_checkpoint(source, kept, plan, "carry", materialize=True)

    def copy_files() -> None:
        subprocess.run(["cp", "-r", str(kept), str(copy)], check=True)
        for path in copy.rglob("*"):
            with open(path if path.is_file() else os.devnull, "rb") as file:
                os.fsync(file.fileno()) if path.is_file() else None

    seconds = in_turn(
        {
            "grow": lambda: timed(
                lambda: grow_checkpoint(source, target, plan, "carry", materialize=True), source, target
            ),
            "copy": lambda: timed(copy_files, kept, copy),
        },
        repeats,
    )
    return {
        "target_bytes": tree_bytes(kept),
        "seconds": seconds,
        "ratio": median(seconds["grow"]) / median(seconds["copy"]),
    }


def widened(model: ModelConfig, **options: Any) -> GrowthPlan:
    factors = {
        key: 2 * getattr(model, key)
        for key in ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    }
    return plan_growth(model, model.model_copy(update=factors), GrowthConfig(operator="split", **options))


def stream(source: Path, target: Path, plan: GrowthPlan) -> None:
    """The plain script: one whole tensor after the other, indexed, scaled and saved; one file, flushed at the end."""
    checkpoint = DistCheckpoint(source)
    target.mkdir()
    with open(target / "data", "wb") as file:
        for rule in plan.rules:
            for prefix in STATE_PREFIXES:
                key = f"{prefix}{rule.source}"
                values = checkpoint.read(key, whole(checkpoint.spec(key).shape))
                for number, axis in enumerate(rule.axes):
                    if axis.index_tensor is not None:
                        values = values.index_select(number, axis.index_tensor)
                    if axis.scale_tensor is not None:
                        shape = [-1 if other == number else 1 for other in range(values.dim())]
                        values = values * axis.scale_tensor.float().view(shape)
                torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())


def bench_width(root: Path, model: ModelConfig, repeats: int) -> Figures:
    source, target, plain = write_source(root / "narrow", model), root / "wide", root / "plain"
    plan, noisy = widened(model), widened(model, cancelling_noise=0.1)
    seconds = in_turn(
        {
            "grow": lambda: timed(lambda: grow_checkpoint(source, target, plan, "carry"), source, target),
            "noise": lambda: timed(lambda: grow_checkpoint(source, target, noisy, "carry"), source, target),
            "streamer": lambda: timed(lambda: stream(source, plain, plan), source, plain),
        },
        repeats,
    )
    base = median(seconds["streamer"])
    return {
        "target_bytes": tree_bytes(target),
        "seconds": seconds,
        "ratio": median(seconds["grow"]) / base,
        "noise_ratio": median(seconds["noise"]) / base,
    }


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def peak_of(source: Path, target: Path, noise: float) -> int:
    """Peak anonymous memory of a width growth in this process, beyond what it had before."""
    model = DistCheckpoint(source)
    del model
    plan = widened(ModelConfig.model_validate_json((source / "model.json").read_text()), cancelling_noise=noise)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    grow_checkpoint(source, target, plan, "carry")
    done.set()
    watcher.join()
    return peak - before


def bench_memory(root: Path, model: ModelConfig) -> Figures:
    result: Figures = {}
    for name, factor in (("", 1), ("_at_twice_the_layers", 2)):
        deep = model.model_copy(update={"num_layers": factor * model.num_layers})
        source = write_source(root / f"memory{factor}", deep)
        (source / "model.json").write_text(deep.model_dump_json())
        command = [sys.executable, __file__, "--peak-of", str(source), str(root / f"peak{factor}")]
        result[f"peak_bytes{name}"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def write_metadata(folder: Path, model: ModelConfig, tensor_parallel_size: int = 8) -> Path:
    """A checkpoint's metadata and manifest without its data: all that ``grow --plan`` reads."""
    folder.mkdir(parents=True)
    metadata = Metadata({}, None, {}, StorageMeta(), "1.0.0")
    names: dict[str, int] = {}
    for prefix in STATE_PREFIXES:
        dtype = torch.float32 if prefix else torch.bfloat16
        for key, shape in tensor_shapes(model).items():
            parts = tensor_parallel_size if len(shape) == 2 else 1
            rows = shape[0] // parts
            chunks = []
            for part in range(parts):
                offsets = torch.Size((part * rows, *[0] * (len(shape) - 1)))
                sizes = torch.Size((rows, *shape[1:]))
                name, length = f"__{part}_0.distcp", dtype.itemsize * math.prod(sizes) + 1024
                start = names.get(name, 0)
                metadata.storage_data[MetadataIndex(prefix + key, offsets, part)] = _StorageInfo(name, start, length)
                names[name] = start + length
                chunks.append(ChunkStorageMetadata(offsets, sizes))
            entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
            metadata.state_dict_metadata[prefix + key] = entry
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    files = {name: FileEntry(size_bytes=size, sha256="0" * 64) for name, size in names.items()}
    write_manifest(folder, manifest_of(model).model_copy(update={"files": files}))
    return folder


def bench_plan(root: Path, model: ModelConfig, repeats: int) -> Figures:
    source = write_metadata(root / "large", model)
    depth = f"num_layers={2 * model.num_layers}"
    width = f"hidden_size={2 * model.hidden_size}"
    seconds: dict[str, float] = {}
    for name, settings in (("link", [depth]), ("write", [depth, width, "shares=uneven"])):
        command = [sys.executable, "-m", "growth_megatron", "grow", str(source), "--plan", "--json", "--set", *settings]
        runs = [
            timed(lambda line=command: subprocess.run(line, check=True, stdout=subprocess.DEVNULL), source)  # type: ignore[misc]
            for _ in range(repeats)
        ]
        seconds[name] = median(runs)
    imports = [sys.executable, "-c", "import growth_megatron.commands.growth"]
    seconds["imports"] = median([timed(lambda: subprocess.run(imports, check=True), source) for _ in range(repeats)])
    return {"metadata_bytes": (source / ".metadata").stat().st_size, "seconds": seconds}


def bench_peer(root: Path, model: ModelConfig, mergekit: str | None, repeats: int) -> Figures:
    if mergekit is None:
        return {"skipped": "give --mergekit PATH of mergekit-yaml, installed in an environment of its own"}
    source, ours, theirs = root / "hf", root / "hf_ours", root / "hf_mergekit"
    export_huggingface(RandomState(model), model, source, dtype=torch.bfloat16, tokenizer=None)
    part = f"  - sources: [{{model: {source}, layer_range: [0, {model.num_layers}]}}]\n"
    recipe = root / "passthrough.yaml"
    recipe.write_text("slices:\n" + 4 * part + "merge_method: passthrough\ndtype: bfloat16\n")
    grow = [sys.executable, "-m", "growth_megatron", "grow", f"hf:{source}", f"hf:{ours}"]
    grow += ["--set", f"num_layers={4 * model.num_layers}"]
    merge = [mergekit, str(recipe), str(theirs), "--no-copy-tokenizer", "--lazy-unpickle"]
    hidden = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def run(command: list[str], target: Path) -> float:
        def action() -> None:
            subprocess.run(command, **hidden)  # type: ignore[call-overload]
            os.sync()  # mergekit does not flush

        return timed(action, source, target)

    seconds = in_turn({"grow": lambda: run(grow, ours), "mergekit": lambda: run(merge, theirs)}, repeats)
    return {
        "target_bytes": tree_bytes(ours),
        "seconds": seconds,
        "ratio": median(seconds["grow"]) / median(seconds["mergekit"]),
    }


def table(figures: Figures) -> list[str]:
    """Figures against their limits."""
    rows: list[tuple[str, str, str]] = []
    if link := figures.get("link"):
        size = format_bytes(link["target_bytes_if_written"])
        rows.append((f"link: seconds, 6 -> 24 layers, {size} of target", f"{link['seconds']:.3f}", "<= 1"))
        rows.append(("link: bytes written", format_bytes(link["written_bytes"]), "<= 1 MB"))
    if depth := figures.get("depth"):
        size = format_bytes(depth["target_bytes"])
        rows.append((f"depth: every byte of {size} written / cp + fsync", f"{depth['ratio']:.2f}", "<= 1.5"))
    if width := figures.get("width"):
        size = format_bytes(width["target_bytes"])
        rows.append((f"width: x2 to {size} / plain streaming script", f"{width['ratio']:.2f}", "<= 1.3"))
        rows.append(("width: with cancelling noise / the script without", f"{width['noise_ratio']:.2f}", "<= 2.5"))
    if memory := figures.get("memory"):
        rows.append(("memory: peak anonymous beyond imports", format_bytes(memory["peak_bytes"]), "<= 128 MiB"))
        rows.append(("memory: at twice the layers", format_bytes(memory["peak_bytes_at_twice_the_layers"]), "flat"))
    if plan := figures.get("plan"):
        for name, text in (("link", "x2 depth"), ("write", "x2 depth and width")):
            rows.append((f"plan: {text} of a 70B model, whole command, s", f"{plan['seconds'][name]:.2f}", "<= 3"))
        rows.append(("plan: of that imports, s", f"{plan['seconds']['imports']:.2f}", ""))
    if peer := figures.get("peer"):
        text = f"{peer['ratio']:.2f}" if "ratio" in peer else peer["skipped"]
        rows.append(("peer: grow hf: / mergekit passthrough, whole commands", text, ""))
    first = max(len(row[0]) for row in rows)
    second = max(len(row[1]) for row in rows)
    return [f"{name.ljust(first)}  {value.rjust(second)}  {limit}".rstrip() for name, value, limit in rows]


def measure(options: argparse.Namespace, root: Path) -> Figures:
    tiny = TINY if options.quick else {}
    depth, width = (
        ModelConfig(**{**model.model_dump(exclude={"num_query_groups", "head_dim"}), **tiny})
        for model in (DEPTH, WIDTH)
    )
    repeats = 1 if options.quick else options.repeats
    measures: dict[str, Callable[[Path], Figures]] = {
        "link": lambda folder: bench_link(folder, depth, repeats),
        "depth": lambda folder: bench_depth(folder, depth, repeats),
        "width": lambda folder: bench_width(folder, width, repeats),
        "memory": lambda folder: bench_memory(folder, width),
        "plan": lambda folder: bench_plan(folder, LARGE, repeats),
        "peer": lambda folder: bench_peer(folder, depth, options.mergekit, repeats),
    }
    figures: Figures = {"limits": LIMITS, "repeats": repeats, "cpu_count": os.cpu_count()}
    for name in options.only or PARTS:
        folder = root / name
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures[name] = measures[name](folder)
        shutil.rmtree(folder, ignore_errors=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns, of which the median counts; default: %(default)s"
    )
    parser.add_argument("--directory", help="where to write; default: a temporary folder")
    parser.add_argument("--mergekit", metavar="PATH", help="mergekit-yaml, from an environment of its own")
    parser.add_argument("--output", metavar="FILE", help="all figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    parser.add_argument("--peak-of", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_of(Path(options.peak_of[0]), Path(options.peak_of[1]), 0.1))
        return
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench_growth_") as name:
        figures = measure(options, Path(name))
    print("\n".join(table(figures)))
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
