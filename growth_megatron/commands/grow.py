"""``growth-megatron grow`` and ``plan grow``: a growth by hand, with its plan shown before anything is written.

Owns: what the command line means, the checks before the first write, what is printed.
Does not own: the request (``commands.growth_request``), plan and forecast, the executors (``growth.execute``).

A checkpoint grown by hand belongs to no configuration yet: whichever one resumes from it begins with its first stage.
So it is written as stage 0, stage step 0, while step, samples, tokens, FLOPs and lineage count on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from growth_megatron.checkpoint.folder.commit import exclusive, temporary_path
from growth_megatron.checkpoint.huggingface.writer import export_huggingface
from growth_megatron.checkpoint.interchange import HUGGINGFACE_PREFIX, LocatedSource, locate_source, model_section
from growth_megatron.commands.growth_forecast import existing_parent, forecast, render_forecast, render_map
from growth_megatron.commands.growth_request import GrowthRequest
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.units import format_bytes
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.conditions import GEOMETRY_FIELDS
from growth_megatron.growth.execute import GrowthResult, check_origin, grow_checkpoint
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan, OptimizerState
from growth_megatron.growth.view import GrownSource
from growth_megatron.parallel.collectives import rank_from_environment, world_size_from_environment


def grow(source: str, target: str, request: GrowthRequest, *, materialize: bool, dry_run: bool) -> None:
    """Grow what ``source`` names into the new folder ``target``, and say what is done; on all ranks of torchrun alike.

    Args:
        source: a checkpoint, ``RUN/latest``, a run, or a Hugging Face folder (``hf:DIR`` where not clear).
        target: folder of the grown checkpoint; ``hf:DIR`` for a Hugging Face folder.
        materialize: write all data anew where links would do.
        dry_run: check everything, print the plan, write nothing.

    Raises:
        GrowthError: settings that make no growth of this source.
        CheckpointError: the source is not whole, the target exists or cannot be written.
    """
    origin = locate_source(source)
    weights_only = target.startswith(HUGGINGFACE_PREFIX)
    plan, policy = _plan(origin, request, weights_only)
    folder = Path(target.removeprefix(HUGGINGFACE_PREFIX))
    first = rank_from_environment() == 0
    if weights_only and not first:
        return  # one rank writes a Hugging Face folder
    _check_target(origin.path, folder)
    check_origin(origin, plan, policy)
    figures = forecast(origin, plan, policy, folder, materialize=materialize, weights_only=weights_only)
    if first:
        lines = [f"passed over: {item.path}: {item.reason}" for item in origin.skipped]
        print("\n".join([*lines, *render_forecast(figures, plan)]), flush=True)
    if figures["enough_space"] is False and not temporary_path(folder).exists():  # an interrupted one needs less
        needed, free = format_bytes(figures["written_bytes"]), format_bytes(figures["free_bytes"])
        raise CheckpointError(f"{folder} needs {needed} where {free} are free; choose a target on another disk")
    if dry_run:
        if first:
            print("dry run: nothing was written")
        return
    try:
        if weights_only:
            with exclusive(folder):
                _to_huggingface(origin, folder, plan)
            return
        with (
            exclusive(folder) if first else nullcontext(),
            _process_group(),
            bytes_progress(f"growing {folder.name}") as progress,
        ):
            result = grow_checkpoint(
                origin,
                folder,
                plan,
                policy,
                stage=0,
                materialize=materialize,
                progress=progress if first else None,
            )
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error} ({error.filename})") from None
    if first:
        print("\n".join(_done_lines(result, origin)))


def plan_grow(source: str, target: str | None, request: GrowthRequest, *, materialize: bool, as_json: bool) -> None:
    """Say what a growth would do, from the source's metadata alone: no tensor is read.

    Raises: as ``grow``.
    """
    origin = locate_source(source, metadata_alone=True)
    weights_only = target is not None and target.startswith(HUGGINGFACE_PREFIX)
    plan, policy = _plan(origin, request, weights_only)
    folder = Path(target.removeprefix(HUGGINGFACE_PREFIX)) if target is not None else None
    if folder is not None:
        _check_target(origin.path, folder)
    figures = forecast(origin, plan, policy, folder, materialize=materialize, weights_only=weights_only)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        print("\n".join([*render_forecast(figures, plan), "", *render_map(figures)]))


def _plan(origin: LocatedSource, request: GrowthRequest, weights_only: bool) -> tuple[GrowthPlan, OptimizerState]:
    target, growth = request.resolve(origin.geometry)
    if weights_only and growth.optimizer_state not in (None, "reset"):
        raise GrowthError(f"optimizer_state {growth.optimizer_state}, but a Hugging Face folder holds weights alone")
    policy = "reset" if weights_only else choose(growth).state_policy
    if policy != "reset" and origin.manifest is None:
        raise GrowthError(f"optimizer_state {policy}, but {origin.path} holds weights alone; use reset")
    return plan_growth(origin.geometry, target, growth, request.seed), policy


def _to_huggingface(origin: LocatedSource, folder: Path, plan: GrowthPlan) -> None:
    from growth_megatron.checkpoint.interchange import tokenizer_of

    tokenizer, note = tokenizer_of(origin)
    grown = GrownSource(origin.source, plan, "reset")
    with bytes_progress(f"growing {folder.name}") as progress:
        result = export_huggingface(
            grown, plan.target_geometry, folder, dtype=None, tokenizer=tokenizer, progress=progress
        )
    print(
        f"grew {folder} in {result.seconds:.1f} s: {format_bytes(result.bytes_written)} written in {len(result.files)} "
        f"files; tokenizer: {note}"
    )


@contextmanager
def _process_group() -> Iterator[None]:
    """The process group of torchrun's ranks, where there are several."""
    if world_size_from_environment() == 1:
        yield
        return
    from growth_megatron.parallel import process_groups  # loads megatron-core

    process_groups.start()
    try:
        yield
    finally:
        process_groups.stop()


def _check_target(source: Path, target: Path) -> None:
    """Nothing is there yet, and it can be made."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists; name a new folder, or remove it yourself")
    if target.absolute().resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies within the source {source}; name a folder outside of it")
    above = existing_parent(target)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written to" if above.is_dir() else "is not a folder"
        raise CheckpointError(f"cannot make {target}: {above} {what}; name another folder")


def _done_lines(result: GrowthResult, origin: LocatedSource) -> list[str]:
    notes = [f"{format_bytes(result.bytes_linked)} linked"] if result.bytes_linked else []
    notes.append(f"{format_bytes(result.bytes_written)} written")
    if result.bytes_copied:
        notes.append(f"{format_bytes(result.bytes_copied)} of them copied data")
    if result.bytes_resumed:
        notes.append(f"{format_bytes(result.bytes_resumed)} taken over from an interrupted attempt")
    geometry = result.manifest.geometry
    done = f"grew {result.path} in {result.seconds:.2f} s: {', '.join(notes)}"
    if origin.manifest is None:  # no configuration of ours yet
        return [
            done,
            f"train it with checkpoint.resume={result.path}, a new run.directory and",
            *model_section(geometry),
        ]
    before = result.manifest.lineage[-1].source_geometry
    sizes = {key: getattr(geometry, key) for key in (*GEOMETRY_FIELDS, "norm_epsilon", "tie_embeddings")}
    changed = [key for key, size in sizes.items() if size != getattr(before, key)]
    if geometry.head_dim * geometry.num_attention_heads != geometry.hidden_size and "head_dim" not in changed:
        changed.append("head_dim")  # the default, hidden size over heads, is not it
    settings = " ".join(f"model.{key}={str(sizes[key]).lower()}" for key in changed)
    return [
        done,
        f"go on with: growth-megatron train CONFIG.yaml checkpoint.resume={result.path} {settings}".rstrip() + " "
        f"run.directory=NEW (its first stage starts at step 0 of its schedule; step {result.manifest.step:,}, tokens "
        "and data position count on)",
    ]
