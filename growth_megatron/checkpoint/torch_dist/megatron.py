"""A checkpoint that megatron-core or Megatron-LM wrote, as one of this library: geometry, progress, names.

Owns: what tensors and Megatron-LM's own arguments say of the model, which optimizer formats can be taken over, the new
``.metadata`` over the same data files.
Does not own: reading (``checkpoint.torch_dist.reader``), writing the checkpoint (``commands.import_megatron``).

What tensors cannot tell (heads, RoPE, epsilon, sequence length) is in ``args`` of ``common.pt`` where Megatron-LM saved
it, and asked for where it did not. Arguments are read as data: nothing is unpickled freely.
"""

from __future__ import annotations

import dataclasses
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from growth_megatron.checkpoint.folder.manifest import Manifest, library_version
from growth_megatron.checkpoint.torch_dist.optimizer_groups import fresh_common
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.config.words import listed
from growth_megatron.errors import CheckpointError
from growth_megatron.model import architecture
from growth_megatron.model.architecture import (
    LAYER_PREFIX,
    layer_key,
    split_layer_key,
    stateless_objects,
    tensor_shapes,
)
from growth_megatron.model.tensors import MASTER_PREFIX, MOMENT_PREFIXES, Region, TensorSpec, split_state_key

SETTINGS = ("num_attention_heads", "head_dim", "rope_base", "norm_epsilon", "sequence_length", "vocab_size", "init_std")
"""What may be given where the checkpoint does not say it."""

_OPTIMIZER = "optimizer."
_PLAIN_MASTER_PREFIX = "optimizer.state.fp32_param."
"""megatron-core's name where the optimizer is not the distributed one."""
_ARGUMENTS = {
    "num_attention_heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "rope_base": ("rotary_base",),
    "norm_epsilon": ("norm_epsilon", "layernorm_epsilon"),
    "sequence_length": ("seq_length", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
    "init_std": ("init_method_std",),
}
_REQUIRED = ("num_attention_heads", "rope_base", "norm_epsilon", "sequence_length")
_ALLOWED: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "num_experts": None,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
}
"""Megatron-LM's arguments by which a model is one of this library's."""
_REMEDY = "save it again with --dist-ckpt-optim-fully-reshardable, or take the weights alone with --weights-only"


class MegatronCheckpoint:
    """The checkpoint in ``path``, seen as one of this library.

    Attributes:
        tensors: as stored.
        geometry, manifest, common: those of the imported checkpoint; stage and stage step are 0, so that whichever
            configuration goes on from it begins with its first stage, while step, samples, tokens and FLOPs count on.
        has_optimizer: whether masters and moments go along.

    Raises:
        CheckpointError: from the constructor; another model than this library's, something that neither tensors nor
            arguments nor ``settings`` say, or optimizer state in a form that fits one layout alone.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, weights_only: bool = False) -> None:
        self.path, self.tensors = path, DistCheckpoint(path)
        common = read_common(path)
        given = common.get("args")
        arguments = vars(given) if isinstance(given, Namespace) else {}
        self._shapes = {key: self.tensors.spec(key).shape for key in self.tensors.keys()}
        self.geometry = _geometry(path, self._shapes, arguments, settings)
        self._check_weights()
        self.has_optimizer = not weights_only and any(key.startswith(_OPTIMIZER) for key in self._stored())
        if self.has_optimizer:
            self._check_optimizer(common)
        self.manifest = _manifest(self.geometry, common, arguments)
        self.common = fresh_common()
        if self.has_optimizer:
            for group in self.common["optimizer"]["optimizer"]["param_groups"]:
                group["step"] = _adam_step(common.get("optimizer"), self.manifest.step)

    def metadata(self, objects_file: str, empty_object: bytes) -> bytes:
        """``.metadata`` of the imported checkpoint over the same data files.

        Byte objects become those that this library's model looks for, all of them ``empty_object``, alone in
        ``objects_file``.
        """
        source = self.tensors.metadata
        result = Metadata({}, None, {}, StorageMeta(), source.version)
        for target, key in self._sources().items():
            entry = source.state_dict_metadata[key]
            assert isinstance(entry, TensorStorageMetadata)
            result.state_dict_metadata[target] = dataclasses.replace(entry)
            for number, chunk in enumerate(entry.chunks):
                stored = source.storage_data[MetadataIndex(key, chunk.offsets)]
                result.storage_data[MetadataIndex(target, chunk.offsets, number)] = stored
        for name in self._object_names():
            result.state_dict_metadata[name] = BytesStorageMetadata()
            result.storage_data[MetadataIndex(name)] = _StorageInfo(objects_file, 0, len(empty_object))
        if source.planner_data:
            result.planner_data = {key: (key,) for key in result.state_dict_metadata}
        return pickle.dumps(result)

    def weights(self) -> Weights:
        """The weights alone, as a source."""
        return Weights(self.tensors, self.geometry)

    def _stored(self) -> dict[str, TensorStorageMetadata]:
        """Tensors by their stored name."""
        entries = self.tensors.metadata.state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def _sources(self) -> dict[str, str]:
        """Name in the imported checkpoint -> stored name, of every tensor."""
        stored = self._stored()
        names = {key.replace(_PLAIN_MASTER_PREFIX, MASTER_PREFIX, 1): key for key in stored}
        for key, entry in stored.items():
            # An optimizer in float32 keeps no masters: the weights are.
            if not key.startswith(_OPTIMIZER) and entry.properties.dtype == torch.float32:
                names.setdefault(MASTER_PREFIX + key, key)
        return names

    def _object_names(self) -> list[str]:
        names = stateless_objects(self.geometry)
        if not self.tensors.is_stacked:
            return names
        stacked = []
        for name in names:
            parts = split_layer_key(name)
            assert parts is not None
            key = LAYER_PREFIX + parts[1].rpartition("/")[0]
            stacked.append(f"{key}/shard_{parts[0]}_{self.geometry.num_layers}")
        return stacked

    def _check_weights(self) -> None:
        expected = tensor_shapes(self.geometry)
        found = {key: shape for key, shape in self._shapes.items() if not key.startswith(_OPTIMIZER)}
        wrong = [f"{key} is missing" for key in expected if key not in found]
        wrong += [f"{key} is no tensor of such a model" for key in found if key not in expected]
        wrong += [
            f"{key} is {found[key]}, not {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ]
        if wrong:
            raise CheckpointError(f"{self.path} is not a model this library has: {listed(wrong)}")

    def _check_optimizer(self, common: Mapping[str, Any]) -> None:
        state = common.get("optimizer")
        kind = state.get("param_state_sharding_type") if isinstance(state, dict) else None
        stored, names = self._stored(), self._sources()
        weights = [key for key in stored if not key.startswith(_OPTIMIZER)]
        odd = [key for key in names if key.startswith(_OPTIMIZER) and not split_state_key(key)[0]]
        if odd or kind not in (None, "fully_reshardable"):
            named = f"of the form {kind}" if kind else f"under names such as {odd[0]}"
            raise CheckpointError(
                f"{self.path} holds its optimizer state {named}, which fits one layout alone; {_REMEDY}"
            )
        for prefix in (MASTER_PREFIX, *MOMENT_PREFIXES):
            for key in weights:
                source = names.get(prefix + key)
                if source is None:
                    raise CheckpointError(f"{self.path} lacks {prefix}{key}; {_REMEDY}")
                if stored[source].size != stored[key].size:
                    raise CheckpointError(
                        f"{self.path} holds {source} flattened ({list(stored[source].size)}); {_REMEDY}"
                    )


class Weights:
    """The model's tensors of a checkpoint, without any optimizer state, as a ``TensorSource``."""

    def __init__(self, tensors: DistCheckpoint, geometry: ModelConfig) -> None:
        self._tensors, self._keys = tensors, list(tensor_shapes(geometry))

    def keys(self) -> list[str]:
        """Names of the weights, in the model's order."""
        return list(self._keys)

    def spec(self, key: str) -> TensorSpec:
        """Shape and type as stored."""
        return self._tensors.spec(key)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region``, of its shape, as stored."""
        return self._tensors.read(key, region)


def _geometry(
    path: Path, shapes: Mapping[str, tuple[int, ...]], arguments: Mapping[str, Any], settings: Mapping[str, Any]
) -> ModelConfig:
    if problems := [
        f"{name} is {arguments[name]!r}, allowed: {allowed!r}"
        for name, allowed in _ALLOWED.items()
        if name in arguments and arguments[name] != allowed
    ]:
        raise CheckpointError(f"{path} is not a model this library has: {listed(problems)}")

    def shape(row: architecture.Row) -> tuple[int, ...]:
        key = layer_key(0, row.name) if row in architecture.IN_LAYER else row.name
        if key not in shapes:
            raise CheckpointError(f"{path} holds no {key}; is it a LLaMA of megatron-core?")
        return shapes[key]

    def has(row: architecture.Row) -> bool:
        return row.name in shapes or layer_key(0, row.name) in shapes

    said = {**_said(arguments), **settings}
    (vocabulary, hidden), into_heads = shape(architecture.EMBEDDING), shape(architecture.PROJECTION)[1]
    if "num_attention_heads" not in said and said.get("head_dim"):
        said["num_attention_heads"] = into_heads // said["head_dim"]
    if missing := [name for name in _REQUIRED if name not in said]:
        without = "" if arguments else "it has no args in common.pt; "
        example = " ".join(f"{name}=..." for name in missing)
        raise CheckpointError(f"{path} does not say {', '.join(missing)}: {without}add --set {example}")
    head_dim = max(1, into_heads // max(1, said["num_attention_heads"]))
    layers = [parts[0] for key in shapes if (parts := split_layer_key(key)) is not None]
    scaled = arguments.get("use_rope_scaling")
    fields: dict[str, Any] = {
        **said,
        "num_layers": 1 + max(layers),
        "hidden_size": hidden,
        "head_dim": head_dim,
        "num_query_groups": (shape(architecture.QKV)[0] - into_heads) // (2 * head_dim),
        "ffn_hidden_size": shape(architecture.FC2)[1],
        "vocab_size": said.get("vocab_size", vocabulary),
        "vocab_multiple": _vocabulary_multiple(said.get("vocab_size", vocabulary), vocabulary),
        "rope_scaling": {"type": "llama3", "factor": arguments.get("rope_scaling_factor", 8.0)} if scaled else None,
        "tie_embeddings": not has(architecture.OUTPUT),
        "attention_bias": has(architecture.QKV_BIAS),
        "qk_norm": has(architecture.Q_NORM),
    }
    try:
        return ModelConfig(**fields)
    except ValueError as error:  # pydantic's errors are ValueErrors
        raise CheckpointError(f"{path}: tensors and settings make no model: {' '.join(str(error).split())}") from None


def _said(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that Megatron-LM's arguments give."""
    said = {}
    for name, theirs in _ARGUMENTS.items():
        values = [arguments[argument] for argument in theirs if arguments.get(argument) is not None]
        if values:
            said[name] = values[0]
    return said


def _vocabulary_multiple(size: int, padded: int) -> int:
    """A power of two, at most 128 where that will do, to a multiple of which ``size`` is padded to ``padded``."""
    multiple = padded & -padded
    while multiple > 128 and -(-size // (multiple // 2)) * (multiple // 2) == padded:
        multiple //= 2
    return multiple


def _manifest(geometry: ModelConfig, common: Mapping[str, Any], arguments: Mapping[str, Any]) -> Manifest:
    samples = int(arguments.get("consumed_train_samples") or 0)
    return Manifest(
        library_version=library_version(),
        step=int(common.get("iteration") or arguments.get("iteration") or 0),
        stage=0,
        stage_step=0,
        consumed_samples=samples,
        consumed_tokens=samples * geometry.sequence_length,
        flops=float(common.get("num_floating_point_operations_so_far") or 0.0),
        geometry=geometry,
        layout=ParallelConfig(),
        world_size=1,
    )


def _adam_step(state: Any, fallback: int) -> int:
    """Adam's step as the optimizer's part of ``common.pt`` has it."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "common_step" or (key == "step" and value is not None):
                return int(value)
        state = list(state.values())
    if isinstance(state, list):
        for item in state:
            if (found := _adam_step(item, -1)) >= 0:
                return found
    return fallback
