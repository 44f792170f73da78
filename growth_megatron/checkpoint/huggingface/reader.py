"""A Hugging Face LLaMA as a source of global tensors.

Owns: finding the files, checking before anything is read that they hold exactly this model, fusing regions on the fly.
Does not own: the correspondence of rows (``checkpoint.huggingface.layout``), the file format
(``checkpoint.huggingface.safetensors_file``), config.json (``checkpoint.huggingface.config``).

Only safetensors are read: the older ``.bin`` files are pickles, which can run any code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.files import expected_in, inside
from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME, geometry_of_config, read_config
from growth_megatron.checkpoint.huggingface.layout import EMBEDDING, OUTPUT, huggingface_shapes, row_ranges
from growth_megatron.checkpoint.huggingface.safetensors_file import DTYPES, SafetensorsFile, StoredTensor
from growth_megatron.config.words import listed
from growth_megatron.errors import CheckpointError
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import Region, TensorSpec, check_region, whole

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pth", "*.pt")
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # older releases stored what follows from the configuration
_COMPARED_ROWS = 1024


class HuggingFaceCheckpoint:
    """config.json and safetensors, in one file or several, as a ``TensorSource`` of megatron-core's names.

    Reading is safe from several threads and takes the memory of the region. The type is the stored one.

    Raises:
        CheckpointError: from the constructor, if the folder does not hold exactly a model of this library; the message
            names everything that is wrong with the configuration, or with the tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        with expected_in(self.path / CONFIG_NAME):
            self.geometry = geometry_of_config(self.config, self.path / CONFIG_NAME)
        self._files = _open_files(self.path)
        self._shapes = tensor_shapes(self.geometry)
        self._check_tensors()
        self._specs = {key: TensorSpec(shape, self._dtype(key)) for key, shape in self._shapes.items()}

    def keys(self) -> list[str]:
        """All tensors by megatron-core's names, in the model's order."""
        return list(self._shapes)

    def spec(self, key: str) -> TensorSpec:
        """Global shape and stored type. Raises CheckpointError for a tensor that is not there."""
        try:
            return self._specs[key]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {key}") from None

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """``region`` of a tensor (default: all of it), of that shape, as megatron-core lays it out.

        Raises:
            CheckpointError: no such tensor, a region outside it, or a file that was cut short meanwhile.
        """
        spec = self.spec(key)
        region = whole(spec.shape) if region is None else region
        check_region(key, spec.shape, region)
        rows, rest = region[0], region[1:]
        out = torch.empty([part.stop - part.start for part in region], dtype=spec.dtype)
        position = 0  # the row of the fused tensor at which the part begins
        for part in row_ranges(self.geometry, key):
            first, last = max(rows.start, position), min(rows.stop, position + part.rows)
            if first < last:
                within = slice(first - position + part.start, last - position + part.start)
                here = out[first - rows.start : last - rows.start]
                self._files[part.name].read_rows(part.name, within, rest, here)
            position += part.rows
        return out

    @property
    def identity(self) -> str:
        """Hash of the configuration and of each file's header, size and time: another model has another one."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(set(self._files.values()), key=lambda file: file.path):
            digest.update(f"{file.path.name} {file.size_bytes} {file.path.stat().st_mtime_ns}\n".encode())
            digest.update(file.header)
        return digest.hexdigest()

    def _stored(self, name: str) -> StoredTensor:
        return self._files[name].tensors[name]

    def _dtype(self, key: str) -> torch.dtype:
        parts = {self._stored(part.name).type_name: part.name for part in row_ranges(self.geometry, key)}
        if len(parts) > 1:
            raise CheckpointError(
                f"{self.path}: {' and '.join(parts.values())} are one tensor of megatron-core but have the types "
                f"{', '.join(parts)}; save the model in one type"
            )
        return DTYPES[next(iter(parts))]

    def _check_tensors(self) -> None:
        expected = huggingface_shapes(self.geometry)
        present = {name for name in self._files if not _BUFFERS.search(name)}
        if self.geometry.tie_embeddings and OUTPUT in present and EMBEDDING in present:
            self._check_tied(expected[EMBEDDING])
            present.remove(OUTPUT)
        problems = []
        if missing := [name for name in expected if name not in present]:
            problems.append(f"lacks {listed(missing, 4, ', ')}")
        if extra := sorted(present - expected.keys()):
            problems.append(f"has {listed(extra, 4, ', ')}, which this model does not have")
        wrong = []
        for name in present & expected.keys():
            stored = self._stored(name)
            if stored.type_name not in DTYPES:
                wrong.append(f"{name} is of type {stored.type_name} (allowed: {', '.join(DTYPES)})")
            elif stored.shape != expected[name]:
                wrong.append(f"{name} is {stored.shape}, {CONFIG_NAME} says {expected[name]}")
        if wrong:
            problems.append(listed(sorted(wrong)))
        if problems:
            hint = "; is tie_word_embeddings missing in config.json?" if missing == [OUTPUT] else ""
            raise CheckpointError(
                f"{self.path} does not hold the model of its {CONFIG_NAME}: {'; '.join(problems)}{hint}"
            )

    def _check_tied(self, shape: tuple[int, ...]) -> None:
        """A tied model may store its output weight too, if it is the embedding."""
        first, second = self._stored(EMBEDDING), self._stored(OUTPUT)
        equal = (
            first.type_name == second.type_name and first.type_name in DTYPES and first.shape == second.shape == shape
        )
        columns = slice(0, shape[1])
        for start in range(0, shape[0] if equal else 0, _COMPARED_ROWS):
            rows = slice(start, min(start + _COMPARED_ROWS, shape[0]))
            parts = [torch.empty(rows.stop - start, shape[1], dtype=DTYPES[first.type_name]) for _ in range(2)]
            for name, part in zip((EMBEDDING, OUTPUT), parts, strict=True):
                self._files[name].read_rows(name, rows, (columns,), part)
            if not torch.equal(*parts):
                equal = False
                break
        if not equal:
            raise CheckpointError(
                f"{self.path}: tie_word_embeddings is true, yet {OUTPUT} differs from {EMBEDDING}; set it to false in "
                f"{CONFIG_NAME} to keep both, or remove {OUTPUT}"
            )


def _open_files(folder: Path) -> Mapping[str, SafetensorsFile]:
    """The file of each stored tensor."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        file = SafetensorsFile(single)
        return dict.fromkeys(file.tensors, file)
    if not index.is_file():
        raise _no_weights(folder)
    places = _read_index(index)
    if absent := sorted({name for name in places.values() if not os.path.isfile(folder / name)}):
        raise CheckpointError(f"{index} names {listed(absent, 4, ', ')}, not in the folder; fetch the missing files")
    files = {name: SafetensorsFile(folder / name) for name in sorted(set(places.values()))}
    if wrong := [name for name, place in places.items() if name not in files[place].tensors]:
        raise CheckpointError(f"{index} says that {wrong[0]} is in {places[wrong[0]]}, but it is not; fetch both again")
    unlisted = {name: file for file in files.values() for name in file.tensors if name not in places}
    return {**unlisted, **{name: files[place] for name, place in places.items()}}


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(place, str) for place in places.values()):
            raise TypeError("weight_map holds something other than file names")
        return {name: inside(place) for name, place in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files ({error}); fetch it again") from None


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return CheckpointError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; fetch the model's safetensors files"
        )
    return CheckpointError(
        f"{folder} holds its weights only as {listed(pickles, 4, ', ')}: pickles, which can run any code, are not "
        'read here. Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW_FOLDER')\""
    )
