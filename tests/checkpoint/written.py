"""Small torch_dist checkpoints written by hand, in any chunking and in both forms, without megatron-core."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from growth_megatron.checkpoint.folder.manifest import Manifest, checksum_files, list_files, write_manifest
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.model.architecture import LAYER_PREFIX, tensor_shapes

PREFIXES = ("", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")


def geometry(num_layers: int = 2, **changes: Any) -> ModelConfig:
    """A model of some thousand parameters."""
    fields = {
        "num_layers": num_layers,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 12,
        "vocab_size": 30,
        "vocab_multiple": 16,
        "sequence_length": 8,
    }
    return ModelConfig(**(fields | changes))


def manifest_of(model: ModelConfig, step: int = 100, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "library_version": "test",
        "step": step,
        "stage": 0,
        "stage_step": step,
        "consumed_samples": 4 * step,
        "consumed_tokens": 32 * step,
        "flops": 1.5e9 * step,
        "geometry": model,
        "layout": ParallelConfig(),
        "world_size": 1,
        "data_fingerprint": {"train": [{"documents": 7}]},
        "config_hash": "config",
    }
    return Manifest(**(fields | changes))


def model_tensors(model: ModelConfig, seed: int = 1, optimizer: bool = True) -> dict[str, torch.Tensor]:
    """Distinct random values for every tensor and its optimizer state; weights bfloat16, state float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for prefix in PREFIXES if optimizer else PREFIXES[:1]:
        for key, shape in tensor_shapes(model).items():
            values = torch.randn(shape, generator=generator)
            tensors[prefix + key] = values if prefix else values.bfloat16()
    return tensors


def extra_states(model: ModelConfig) -> dict[str, bytes]:
    name = "self_attention.linear_qkv._extra_state/shard_0_1"
    return {f"{LAYER_PREFIX}{layer}.{name}": f"state {layer}".encode() for layer in range(model.num_layers)}


def stack(tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The same tensors in megatron-core's form with the layers along the first axis."""
    out = {}
    for key, tensor in tensors.items():
        before, prefix, after = key.partition(LAYER_PREFIX)
        number, _, name = after.partition(".")
        if not prefix:
            out[key] = tensor
        elif number == "0":
            per_layer = [tensors[f"{before}{prefix}{layer}.{name}"] for layer in range(num_layers)]
            out[f"{before}{prefix}{name}"] = torch.stack(per_layer)
    return out


def write_distributed(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    objects: Mapping[str, bytes] | None = None,
    parts: int = 1,
    step: float = 100.0,
) -> Path:
    """Write tensors cut into ``parts`` along their first axis (a stacked one: 1 per layer, then along the second)."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = [io.BytesIO(), io.BytesIO()]
    metadata = Metadata({}, None, {}, StorageMeta(), "1.0.0")
    turn = itertools.cycle(range(2))
    for key, data in (objects or {}).items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _append(streams, next(turn), data)
    for key, tensor in tensors.items():
        stacked = LAYER_PREFIX in key and not key.split(LAYER_PREFIX)[1][0].isdigit()
        chunks: list[ChunkStorageMetadata] = []
        for offsets, chunk in _cut(tensor, parts, stacked):
            buffer = io.BytesIO()
            torch.save(chunk.clone(), buffer)
            index = MetadataIndex(key, offsets, len(chunks))
            metadata.storage_data[index] = _append(streams, next(turn), buffer.getvalue())
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
        properties = TensorProperties.create_from_tensor(tensor)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.shape, chunks)
    for number, stream in enumerate(streams):
        (folder / f"__0_{number}.distcp").write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    groups = [{"lr": 1e-3, "wd_mult": wd, "step": step} for wd in (1.0, 0.0)]
    torch.save({"optimizer": {"optimizer": {"param_groups": groups}}, "iteration": 100}, folder / "common.pt")
    return folder


def write_checkpoint(
    folder: Path, model: ModelConfig, manifest: Manifest | None = None, *, stacked: bool = False, parts: int = 1
) -> dict[str, torch.Tensor]:
    """A complete checkpoint with a manifest; returns its tensors, one key per layer."""
    tensors = model_tensors(model)
    stored = stack(tensors, model.num_layers) if stacked else tensors
    write_distributed(folder, stored, extra_states(model), parts)
    manifest = manifest or manifest_of(model)
    files = checksum_files(folder, list_files(folder))
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return tensors


def _cut(tensor: torch.Tensor, parts: int, stacked: bool) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    if stacked:
        return [
            ((layer, *offsets), chunk[None])
            for layer in range(len(tensor))
            for offsets, chunk in _cut(tensor[layer], parts, False)
        ]
    pieces, start = [], 0
    for chunk in tensor.chunk(parts):
        pieces.append(((start, *[0] * (tensor.dim() - 1)), chunk))
        start += len(chunk)
    return pieces


def _append(streams: list[io.BytesIO], number: int, data: bytes) -> _StorageInfo:
    offset = streams[number].tell()
    streams[number].write(data)
    return _StorageInfo(f"__0_{number}.distcp", offset, len(data))
