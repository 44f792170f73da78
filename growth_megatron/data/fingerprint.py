"""What a run's data are, in a few hashes that travel in its checkpoints.

Owns: the fingerprint and the comparison of two.
Does not own: where it is stored (``checkpoint``) and when it is asked for (``train``).

All bytes count (``contents``). The hashes of size and evenly spread regions beside them are what checkpoints of earlier
versions hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth_megatron.config.schema import DataConfig, DatasetConfig
from growth_megatron.data.contents import contents
from growth_megatron.data.mixture import suffixed, weights
from growth_megatron.data.prepared import open_indexed, regions
from growth_megatron.data.tokenizer import tokenizer_sha256
from growth_megatron.errors import DataError

VERSION = 2
SINCE_VERSION_2 = ("bin_content_sha256", "idx_content_sha256")
INFORMATIVE = ("path", "version")  # kept for the reader: moving files does not change data


def _digest(path: Path, *whole_bytes: int) -> str:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    for part in regions(path, *whole_bytes):
        digest.update(part)
    return digest.hexdigest()


def idx_digest(prefix: str | Path) -> str:
    """Hash of ``PREFIX.idx``, all of it up to 1 GiB (50 million documents)."""
    return _digest(suffixed(prefix, ".idx"), 1 << 30)


def bin_digest(prefix: str | Path) -> str:
    """Hash of the size and parts of ``PREFIX.bin``."""
    return _digest(suffixed(prefix, ".bin"))


def _dataset(entry: DatasetConfig, weight: float, cache_directory: str | Path) -> dict[str, Any]:
    indexed, found = open_indexed(entry.path), contents(entry.path, cache_directory)
    return {
        "path": entry.path,
        "weight": weight,
        "documents": len(indexed),
        "tokens": int(indexed.sequence_lengths.sum()),
        "idx_sha256": idx_digest(entry.path),
        "bin_sha256": bin_digest(entry.path),
        "bin_content_sha256": found.bin_sha256,
        "idx_content_sha256": found.idx_sha256,
    }


def fingerprint(data: DataConfig, sequence_length: int, seed: int, cache_directory: str | Path) -> dict[str, Any]:
    """Everything the token stream and the validation set depend on, ready for JSON.

    Raises: DataError where a file is missing or damaged.
    """
    return {
        "version": VERSION,
        "seed": seed,
        "sequence_length": sequence_length,
        "tokenizer_sha256": tokenizer_sha256(data.tokenizer) if data.tokenizer else None,
        "validation_fraction": data.validation_fraction,
        **{
            name: [_dataset(*pair, cache_directory) for pair in zip(entries, weights(entries), strict=True)]
            for name, entries in (("train", data.train), ("validation", data.validation))
        },
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of a fingerprint by dotted name: ``train[0].weight``."""
    if isinstance(value, Mapping):
        pairs = [(f"{name}.{key}" if name else key, entry) for key, entry in value.items() if key not in INFORMATIVE]
    elif isinstance(value, list):
        pairs = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for pair in pairs for key, leaf in _flat(pair[1], pair[0]).items()}


def fingerprint_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each value that differs; empty where both describe the same data. Paths are not compared."""
    then, now = _flat(saved), _flat(current)
    if saved.get("version") == 1:  # by an earlier version, which did not read everything
        now = {name: value for name, value in now.items() if not name.endswith(SINCE_VERSION_2)}

    if None in (saved.get("tokenizer_sha256"), current.get("tokenizer_sha256")):  # the ids are the same without
        then.pop("tokenizer_sha256", None), now.pop("tokenizer_sha256", None)

    def shown(leaves: dict[str, Any], name: str) -> str:
        if name not in leaves:
            return "absent"
        value = leaves[name]
        return value[:12] if isinstance(value, str) else str(value)

    names = [*then, *(name for name in now if name not in then)]
    return [
        f"data.{name}: {shown(then, name)} in the checkpoint, {shown(now, name)} now"
        for name in names
        if name not in then or name not in now or then[name] != now[name]
    ]


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: str | Path = "PATH") -> None:
    """Refuse to go on with other data than those that ``checkpoint`` was trained on.

    Raises: DataError listing the differences.
    """
    if differences := fingerprint_differences(saved, current):
        raise DataError(
            "the data are not those the checkpoint was trained on:\n  "
            + "\n  ".join(differences)
            + "\nrestore the former data and settings, or begin these data in another run: "
            f"checkpoint.resume={checkpoint} checkpoint.data=new run.directory=NEW"
        )
