"""``growth-megatron grow``: depth growth of a checkpoint by hand, with the plan shown before anything is written.

Owns: what the command line means, the checks before the first write, what is printed.
Does not own: the plan (``growth.plan``), the writing (``growth.alias``).

A checkpoint grown by hand belongs to no configuration yet: whichever one resumes from it begins with its first stage.
So it is written as stage 0, stage step 0, while step, samples, tokens, FLOPs and lineage count on.
"""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

from growth_megatron.checkpoint.describe import compact_layers, locate_checkpoint, model_line
from growth_megatron.checkpoint.manifest import Manifest, read_manifest, validate_checkpoint
from growth_megatron.checkpoint.source import COMMON_NAME, METADATA_NAME, MOMENT_PREFIXES, DistCheckpoint
from growth_megatron.config.cost import parameter_count
from growth_megatron.config.layers import MAX_LAYERS, connection_rate, parse_layers, resolve_layers
from growth_megatron.config.render import format_bytes, format_count
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import CheckpointError, ConfigError, GrowthError
from growth_megatron.growth.alias import GrowthResult, Zeros, grow_checkpoint, grown_metadata
from growth_megatron.growth.plan import check_source_tensors, plan_depth
from growth_megatron.growth.rules import GrowthPlan, check_optimizer_state

ALLOWED_SETTINGS = ("num_layers",)

_STATE_WORDS = {
    "reset": "reset (moments zero, optimizer step 0; float32 masters copied)",
    "carry": "carry (moments and masters of each copied layer, optimizer step kept)",
}


def grow(
    source: Path,
    target: Path,
    *,
    settings: list[str],
    layers: str | None,
    optimizer_state: str,
    seed: int,
    dry_run: bool,
) -> None:
    """Grow the checkpoint ``source`` in depth into the new folder ``target``, and say what is done.

    Args:
        source: a checkpoint, ``RUN/latest``, or a run directory (its newest valid checkpoint).
        settings: ``num_layers=N``; may be empty with ``layers``.
        layers: list of source layers in either notation of ``config.layers``; default: stacking.
        optimizer_state: ``reset`` or ``carry``.
        seed: recorded in the lineage; growth in depth draws no random numbers.
        dry_run: check everything, print the plan, write nothing.

    Raises:
        GrowthError: settings or a layer list that make no growth of this source.
        CheckpointError: the source is not whole, the target exists or cannot be written.
    """
    wanted = _num_layers(settings)
    if wanted is None and layers is None:
        raise GrowthError("say how deep the model is to be: --set num_layers=24, or --layers 0,1,0,1")
    if seed < 0:
        raise GrowthError(f"--seed is {seed}; allowed: 0 or more")
    policy = check_optimizer_state(optimizer_state)
    located = locate_checkpoint(source)
    reason = validate_checkpoint(located.path)
    if reason is not None:
        raise CheckpointError(f"cannot grow {located.path}: {reason}; growth-megatron verify shows what else is there")
    manifest = read_manifest(located.path)
    plan = _plan(manifest.geometry, wanted, layers)
    _check_target(located.path, target)
    lines = [f"passed over: {item.path}: {item.reason}" for item in located.skipped]
    lines += _plan_lines(located.path, target, manifest, plan, policy)
    lines.append(_cost_line(located.path, target, manifest, plan, policy))
    print("\n".join(lines), flush=True)
    if dry_run:
        print("dry run: nothing was written")
        return
    try:
        result = grow_checkpoint(located.path, target, plan, policy, seed=seed, stage=0)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error} ({error.filename})") from None
    print("\n".join(_done_lines(result)))


def _num_layers(settings: Sequence[str]) -> int | None:
    """Value of the setting num_layers, or None without one."""
    found: set[int] = set()
    for setting in settings:
        key, equals, value = setting.partition("=")
        key, value = key.strip(), value.strip()
        if not equals:
            raise GrowthError(f"--set {setting}: not a setting; write key=value, as in num_layers=24")
        if key not in ALLOWED_SETTINGS:
            close = difflib.get_close_matches(key.rsplit(".", 1)[-1], ALLOWED_SETTINGS, 1, 0.7)
            hint = f"did you mean {close[0]}? " if close else ""
            raise GrowthError(
                f"--set {setting}: cannot set {key}; {hint}only the depth can be grown so far, "
                f"allowed: {', '.join(ALLOWED_SETTINGS)}"
            )
        if not (value.isascii() and value.isdigit()) or not 1 <= int(value[:9]) <= MAX_LAYERS or len(value) > 9:
            raise GrowthError(f"--set {setting}: {value!r} is not a number of layers; allowed: 1 to {MAX_LAYERS}")
        found.add(int(value))
    if len(found) > 1:
        raise GrowthError(f"--set gives num_layers more than once ({', '.join(map(str, sorted(found)))}); keep one")
    return next(iter(found), None)


def _plan(geometry: ModelConfig, wanted: int | None, notation: str | None) -> GrowthPlan:
    """The plan of the growth; ``notation`` alone says how many layers there will be."""
    depth = geometry.num_layers
    try:
        if notation is None:
            assert wanted is not None
            if wanted < depth:
                kept = ",".join(map(str, range(wanted)))
                raise GrowthError(
                    f"num_layers={wanted} is less than the source's {depth} layers; nearest possible: "
                    f"num_layers={depth} for stacking. To drop layers, list those to keep, as --layers {kept}"
                )
            chosen = resolve_layers(None, depth, wanted)
        else:
            chosen = parse_layers(notation, depth)
            if wanted is not None and len(chosen) != wanted:
                raise GrowthError(
                    f"--layers {notation} gives {len(chosen)} layers but --set says num_layers={wanted}; "
                    f"leave num_layers out, set it to {len(chosen)}, or change the list"
                )
    except ConfigError as error:
        raise GrowthError(f"--layers: {error}") from None
    return plan_depth(geometry, geometry.model_copy(update={"num_layers": len(chosen)}), chosen)


def _check_target(source: Path, target: Path) -> None:
    """Nothing is there yet, and it can be made."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists; name a new folder, or remove it yourself")
    if target.absolute().resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies within the source {source}; name a folder outside of it")
    above = _existing_parent(target)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written to" if above.is_dir() else "is not a folder"
        raise CheckpointError(f"cannot make {target}: {above} {what}; name another folder")


def _existing_parent(target: Path) -> Path:
    return next(folder for folder in target.absolute().parents if folder.exists())


def _plan_lines(source: Path, target: Path, manifest: Manifest, plan: GrowthPlan, policy: str) -> list[str]:
    assert plan.layers is not None
    before, after = parameter_count(plan.source_geometry), parameter_count(plan.target_geometry)
    rate = 100 * connection_rate(plan.layers)
    return [
        f"source           {source} (step {manifest.step:,}, {manifest.consumed_tokens:,} tokens)",
        f"                 {model_line(plan.source_geometry)}",
        f"target           {target}",
        f"                 {model_line(plan.target_geometry)}",
        f"parameters       {format_count(before.total)} -> {format_count(after.total)} "
        f"(x{after.total / before.total:.2f}; without embeddings {format_count(before.without_embeddings)} -> "
        f"{format_count(after.without_embeddings)})",
        f"layers           {compact_layers(plan.layers)} (source layers from 0, in the target's order)",
        f"connection rate  {rate:.1f} % of neighbouring layers were neighbours in the source",
        f"optimizer state  {_STATE_WORDS[policy]}",
    ]


def _cost_line(source: Path, target: Path, manifest: Manifest, plan: GrowthPlan, policy: str) -> str:
    """What will be linked and written. Checks the tensors too, so that a dry run finds what a growth would."""
    checkpoint = DistCheckpoint(source)
    check_source_tensors(plan, checkpoint)
    if policy == "carry" and not any(key.startswith(MOMENT_PREFIXES) for key in checkpoint.keys()):
        raise GrowthError(f"--optimizer-state carry, but {source} holds no optimizer state; use reset")
    zeros = Zeros(taken=manifest.files)
    metadata = grown_metadata(checkpoint.metadata, plan, check_optimizer_state(policy), zeros)
    names = {info.relative_path for info in metadata.storage_data.values()}
    data_bytes = sum(entry.size_bytes for name, entry in manifest.files.items() if name in names)
    written_bytes = len(pickle.dumps(metadata)) + len(zeros.content)
    written_bytes += sum(
        entry.size_bytes
        for name, entry in manifest.files.items()
        if name == COMMON_NAME or (name != METADATA_NAME and not name.endswith(".distcp"))
    )
    written_bytes += len(manifest.model_dump_json(indent=1))
    if source.stat().st_dev == _existing_parent(target).stat().st_dev:
        return f"files            {format_bytes(data_bytes)} linked, about {format_bytes(written_bytes)} written"
    return (
        f"files            about {format_bytes(data_bytes + written_bytes)} written: source and target are on two file "
        "systems, so data are copied, not linked"
    )


def _done_lines(result: GrowthResult) -> list[str]:
    copied = f" ({format_bytes(result.bytes_copied)} of them copied data)" if result.bytes_copied else ""
    manifest = result.manifest
    return [
        f"grew {result.path} in {result.seconds:.2f} s: {format_bytes(result.bytes_linked)} linked, "
        f"{format_bytes(result.bytes_written)} written{copied}",
        f"go on with: growth-megatron train CONFIG.yaml checkpoint.resume={result.path} "
        f"model.num_layers={manifest.geometry.num_layers} run.directory=NEW (its first stage starts at step 0 of its "
        f"schedule; step {manifest.step:,}, tokens and data position count on)",
    ]
