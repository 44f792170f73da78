"""A source of global tensors written as a Hugging Face LlamaForCausalLM, one block of rows in memory at a time.

Owns: the values that are exported, the division into files, the streaming, the commit of the folder.
Does not own: which rows go where (``checkpoint.huggingface.layout``), config.json (``checkpoint.huggingface.config``),
tokenizer files (``checkpoint.huggingface.tokenizer``).

The order of the source leads: each region of it is read once and its rows written to their places in the files, so that
a fused tensor is not read again for each of its parts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.commit import begin_folder, temporary_path
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.target import check_new, check_room
from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME, config_of_geometry
from growth_megatron.checkpoint.huggingface.layout import huggingface_shapes, row_ranges
from growth_megatron.checkpoint.huggingface.reader import INDEX_NAME, SINGLE_NAME, HuggingFaceCheckpoint
from growth_megatron.checkpoint.huggingface.safetensors_file import DTYPES, FileLayout, lay_out, tensor_bytes
from growth_megatron.checkpoint.huggingface.tokenizer import TokenizerFiles, tokenizer_files
from growth_megatron.checkpoint.torch_dist.chunk_planner import refuse_non_finite
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.words import listed
from growth_megatron.errors import CheckpointError
from growth_megatron.model.architecture import EMBEDDING, tensor_shapes
from growth_megatron.model.tensors import MASTER_PREFIX, Region, TensorSource, TensorSpec, whole

SHARD_BYTES = 5_000_000_000

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class ExportResult:
    """What was written; ``dtype`` is the embedding's, ``tokenizer`` says where its files came from."""

    path: Path
    files: tuple[str, ...]
    dtype: torch.dtype
    tokenizer: str | None
    bytes_written: int
    seconds: float


class ExportedWeights:
    """The weights of a source as they are exported: as stored, or cast to ``dtype`` from their float32 masters.

    Raises:
        CheckpointError: from the constructor, if the source does not hold the tensors of ``geometry``.
    """

    def __init__(self, source: TensorSource, geometry: ModelConfig, dtype: torch.dtype | None) -> None:
        self._source, self._dtype = source, dtype
        self._shapes = tensor_shapes(geometry)
        stored = set(source.keys())
        wrong = [f"{key} is missing" for key in self._shapes if key not in stored]
        wrong += [
            f"{key} is of {source.spec(key).dtype}"
            for key in self._shapes
            if key in stored and source.spec(key).dtype not in DTYPES.values()
        ]
        wrong += [
            f"{key} is {source.spec(key).shape}, not {shape}"
            for key, shape in self._shapes.items()
            if key in stored and tuple(source.spec(key).shape) != shape
        ]
        if wrong:
            raise CheckpointError(f"the source does not hold this model: {listed(wrong)}")
        self._from = {
            key: MASTER_PREFIX + key if self._is_cast(key) and MASTER_PREFIX + key in stored else key
            for key in self._shapes
        }

    def keys(self) -> list[str]:
        """All tensors of the model, in its order."""
        return list(self._shapes)

    def spec(self, key: str) -> TensorSpec:
        """Global shape, and the type that is written."""
        return TensorSpec(self._shapes[key], self._dtype or self._source.spec(key).dtype)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region``, of its shape, as they are written.

        Raises:
            CheckpointError: a value that ``dtype`` cannot hold.
        """
        stored = self._source.read(self._from[key], region)
        values = stored.to(self.spec(key).dtype)
        if values.dtype == torch.float16 != stored.dtype and not torch.equal(values.isfinite(), stored.isfinite()):
            raise CheckpointError(f"{key} holds values beyond 65504, which float16 cannot hold; export as bfloat16")
        return values

    def _is_cast(self, key: str) -> bool:
        return self._dtype is not None and self._dtype != self._source.spec(key).dtype


def export_huggingface(
    source: TensorSource,
    geometry: ModelConfig,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    files: FileOperations | None = None,
    progress: Callable[[int, int], None] | None = None,
    source_is_sound: Callable[[], None] | None = None,
) -> ExportResult:
    """Write ``source`` as the new Hugging Face folder ``target``; it appears whole or not at all.

    Args:
        dtype: of the weights; default: as they are stored. Another one is cast from the float32 masters, if there are.
        shard_bytes: tensors of at most this many bytes share a file; a larger tensor has one of its own.
        tokenizer: a SentencePiece model, or a Hugging Face folder whose tokenizer files are copied; default: those of
            the source, if it is such a folder.
        progress: called with the bytes written and all of them.
        source_is_sound: called before the commit; raises if what was read is not what was saved.

    Raises:
        CheckpointError: before anything is written, if the target exists, space is short, the source does not hold this
            model, transformers has no such model, or the tokenizer does not fit; later, if writing fails.
        GrowthError: a value is not finite.
    """
    started = time.monotonic()
    files = files or FileOperations()
    if tokenizer is None and isinstance(source, HuggingFaceCheckpoint):
        tokenizer = source.path
    weights = ExportedWeights(source, geometry, dtype)
    shards = plan_files(weights, geometry, shard_bytes)
    chosen = tokenizer_files(tokenizer, geometry)
    documents = _documents(weights, geometry, shards, chosen)
    total = sum(shard.size_bytes for shard in shards)
    check_new(target)
    left = temporary_path(target)
    reusable = sum(path.stat().st_size for path in left.iterdir() if path.is_file()) if left.is_dir() else 0
    check_room(target, total + sum(map(len, documents.values())) - reusable)
    try:
        folder = begin_folder(target, files)
        try:
            _write(weights, geometry, shards, folder, progress)
            for name, content in documents.items():
                files.write(folder / name, content)
            for name, path in chosen.copied.items():
                files.copy(path, folder / name)
            if source_is_sound is not None:
                source_is_sound()
            for shard in shards:
                files.sync_file(folder / shard.name)
            files.sync_directory(folder)
            files.rename(folder, target)
            files.sync_directory(target.absolute().parent)
        except Exception:
            if folder.exists():  # it may be large
                files.remove_tree(folder)
            raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}{where}") from None
    written = [path for path in target.iterdir() if path.is_file()]
    return ExportResult(
        path=target,
        files=tuple(sorted(path.name for path in written)),
        dtype=weights.spec(EMBEDDING.name).dtype,
        tokenizer=chosen.origin,
        bytes_written=sum(path.stat().st_size for path in written),
        seconds=time.monotonic() - started,
    )


def plan_files(weights: TensorSource, geometry: ModelConfig, shard_bytes: int) -> list[FileLayout]:
    """The tensors in the model's order, divided into files of at most ``shard_bytes`` (or of one tensor)."""
    if shard_bytes < 1:
        raise CheckpointError(f"files of {shard_bytes} bytes hold nothing; give at least 1")
    dtypes = {part.name: weights.spec(key).dtype for key in weights.keys() for part in row_ranges(geometry, key)}
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, shape in huggingface_shapes(geometry).items():
        spec = TensorSpec(shape, dtypes[name])
        if groups[-1] and size + tensor_bytes(spec) > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += tensor_bytes(spec)
    if len(groups) == 1:
        return [lay_out(SINGLE_NAME, groups[0])]
    count = len(groups)
    return [lay_out(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _documents(
    weights: ExportedWeights, geometry: ModelConfig, shards: Sequence[FileLayout], tokenizer: TokenizerFiles
) -> dict[str, bytes]:
    """The small files by name."""
    dtype = weights.spec(EMBEDDING.name).dtype
    ids = tokenizer.ids
    generation = {"_from_model_config": True, "bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    documents = {
        CONFIG_NAME: _json(config_of_geometry(geometry, dtype, ids)),
        "generation_config.json": _json({name: value for name, value in generation.items() if value is not None}),
    }
    if len(shards) > 1:
        shapes = huggingface_shapes(geometry)
        places = {name: shard.name for shard in shards for name in shard.offsets}
        total = sum(shard.size_bytes - len(shard.header) for shard in shards)
        parameters = sum(math.prod(shape) for shape in shapes.values())
        metadata = {"total_parameters": parameters, "total_size": total}
        documents[INDEX_NAME] = _json({"metadata": metadata, "weight_map": places})
    return {**documents, **tokenizer.written}


def _write(
    weights: ExportedWeights,
    geometry: ModelConfig,
    shards: Sequence[FileLayout],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(shard.size_bytes - len(shard.header) for shard in shards)
    places: dict[str, tuple[Path, int]] = {}
    for shard in shards:
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.size_bytes)
        places |= {name: (folder / shard.name, offset) for name, offset in shard.offsets.items()}
    done = 0
    for key in weights.keys():
        spec = weights.spec(key)
        parts = row_ranges(geometry, key)
        rows = sum(part.rows for part in parts)  # without those that pad the vocabulary
        row_bytes = math.prod(spec.shape[1:]) * spec.dtype.itemsize
        count = max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, rows, count):
            stop = min(start + count, rows)
            region = (slice(start, stop), *whole(spec.shape[1:]))
            block = weights.read(key, region)
            refuse_non_finite(key, region, block)
            content = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
            position = 0
            for part in parts:
                first, last = max(start, position), min(stop, position + part.rows)
                if first < last:
                    path, offset = places[part.name]
                    values = content[(first - start) * row_bytes : (last - start) * row_bytes]
                    _write_at(path, offset + (first - position + part.start) * row_bytes, values)
                position += part.rows
            done += (stop - start) * row_bytes
            if progress is not None:
                progress(done, total)
    if done != total:
        raise AssertionError(f"{done} bytes were written, the files have room for {total}")


def _write_at(path: Path, offset: int, content: memoryview) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        while content:
            content = content[file.write(content) :]


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
