"""A growth by hand: what ``growth-megatron grow`` does, and what it says on the way.

Owns: the order of checks, what is printed.
Does not own: the arguments (``commands.grow``), the request (``commands.growth_request``), plan and checks
(``growth.plan``, ``growth.checked``), the executors (``growth.execute``).

A checkpoint grown by hand belongs to no configuration yet: whichever one resumes from it begins with its first stage.
So it is written as stage 0, stage step 0, while step, samples, tokens, FLOPs and lineage count on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.commit import exclusive, temporary_path
from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.checkpoint.folder.target import check_new, check_room
from growth_megatron.checkpoint.huggingface.safetensors_file import packed
from growth_megatron.checkpoint.huggingface.writer import export_huggingface
from growth_megatron.checkpoint.origin import HUGGINGFACE_PREFIX, Origin, find_origin
from growth_megatron.commands.growth_forecast import forecast, render_forecast, render_map
from growth_megatron.commands.growth_request import GrowthRequest
from growth_megatron.commands.train_file import write_train_file
from growth_megatron.config.progress_bar import BytesCallback, bytes_progress
from growth_megatron.config.units import format_bytes
from growth_megatron.data.tokenizer import tokenizer_file
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.checked import CheckedGrowth, check_growth
from growth_megatron.growth.execute import GrowthResult, carry_out
from growth_megatron.growth.learned import MAPS_NAME, with_maps
from growth_megatron.growth.lineage import growth_record
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.verify import RECORD_NAME
from growth_megatron.growth.view import GrownSource
from growth_megatron.parallel.collectives import (
    on_all_ranks,
    on_rank_zero,
    rank_from_environment,
    world_size_from_environment,
)


def grow(
    source: str,
    target: str,
    request: GrowthRequest,
    *,
    materialize: bool,
    overwrite: bool = False,
    verify_source: bool = False,
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Grow what ``source`` names into the new folder ``target``, and say what is done; on all ranks of torchrun alike.

    Args:
        source: a checkpoint, ``RUN/latest``, a run, or a Hugging Face folder (``hf:DIR`` where not clear).
        target: folder of the grown checkpoint; ``hf:DIR`` for a Hugging Face folder.
        materialize: write all data anew where links would do.
        overwrite: replace ``target`` if it is a checkpoint of this library.
        verify_source: read and sum the files that are linked, too.
        dtype: of the weights of a Hugging Face folder, as torch calls it; default: as in the source.
        tokenizer: of a Hugging Face folder; default: the source's.

    Raises:
        GrowthError: settings that make no growth of this source.
        CheckpointError: the source is not whole, the target exists or cannot be written.
    """
    folder, weights_only = _folder(target)
    if tokenizer is not None and not weights_only:
        raise GrowthError("--tokenizer goes with a Hugging Face folder; name one as hf:TARGET, or leave it out")
    first = rank_from_environment() == 0
    if weights_only and not first:
        return  # one rank writes a Hugging Face folder
    with ExitStack() as stack:
        if not weights_only:
            stack.enter_context(_process_group())
        origin = on_all_ranks(lambda: find_origin(source))
        growth = _checked(origin, request, folder, weights_only, materialize, overwrite, dtype)
        if first:
            lines = [f"passed over: {item.path}: {item.reason}" for item in origin.skipped]
            print("\n".join([*lines, *render_forecast(growth, forecast(growth))]), flush=True)
        on_rank_zero(lambda: _check_room(growth, folder))
        try:
            on_rank_zero(lambda: _hold(stack, folder))
            progress = stack.enter_context(bytes_progress(f"growing {folder.name}"))
            if weights_only:
                lines = _to_huggingface(growth, folder, progress, tokenizer)
            else:
                result = carry_out(
                    growth,
                    folder,
                    stage=0,
                    overwrite=overwrite,
                    verify_source=verify_source,
                    progress=progress if first else None,
                )
                lines = on_rank_zero(lambda: _done_lines(result, origin, verify_source))
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error} ({error.filename})") from None
    if first:
        print("\n".join(lines))


def plan_grow(
    source: str,
    target: str | None,
    request: GrowthRequest,
    *,
    materialize: bool,
    as_json: bool,
    overwrite: bool = False,
    dtype: str | None = None,
) -> None:
    """Say what a growth would do, from the source's metadata alone: no tensor is read, nothing is written.

    Raises: as ``grow``; where the disk is too small, after all has been said.
    """
    folder, weights_only = _folder(target) if target is not None else (None, False)
    origin = find_origin(source, metadata_alone=True)
    growth = _checked(origin, request, folder, weights_only, materialize, overwrite, dtype, metadata_alone=True)
    figures = forecast(growth)
    if rank_from_environment() == 0:
        if as_json:
            print(json.dumps(figures, indent=1))
        else:
            print("\n".join([*render_forecast(growth, figures), "", *render_map(figures), "nothing was written"]))
    if folder is not None:
        _check_room(growth, folder)


def _folder(target: str) -> tuple[Path, bool]:
    """The folder that is to be made, and whether it is a Hugging Face folder."""
    return Path(target.removeprefix(HUGGINGFACE_PREFIX)), target.startswith(HUGGINGFACE_PREFIX)


def _checked(
    origin: Origin,
    request: GrowthRequest,
    folder: Path | None,
    weights_only: bool,
    materialize: bool,
    overwrite: bool,
    dtype: str | None,
    metadata_alone: bool = False,
) -> CheckedGrowth:
    target, growth = request.resolve(origin.geometry)
    if dtype is not None and not weights_only:
        raise GrowthError(f"--dtype {dtype} goes with a Hugging Face folder; name one as hf:TARGET, or leave it out")
    if weights_only and growth.optimizer_state not in (None, "reset"):
        raise GrowthError(f"optimizer_state {growth.optimizer_state}, but a Hugging Face folder holds weights alone")
    policy = "reset" if weights_only else choose(growth).state_policy
    plan = plan_growth(origin.geometry, target, growth, request.seed)
    if request.maps is not None:
        plan = with_maps(plan, request.maps)
    if folder is not None:
        on_rank_zero(lambda: check_new(folder, origin.path, None if weights_only else overwrite))
    return check_growth(
        origin,
        plan,
        policy,
        folder,
        materialize=materialize,
        weights_only=weights_only,
        dtype=getattr(torch, dtype) if dtype else None,
        metadata_alone=metadata_alone,
    )


def _check_room(growth: CheckedGrowth, folder: Path) -> None:
    if not temporary_path(folder).exists():  # an interrupted growth needs less; its writer knows how much
        check_room(folder, growth.costs.written_bytes)


def _hold(stack: ExitStack, folder: Path) -> None:
    stack.enter_context(exclusive(folder))


def _to_huggingface(growth: CheckedGrowth, folder: Path, progress: BytesCallback, tokenizer: Path | None) -> list[str]:
    tokenizer, note = growth.origin.tokenizer() if tokenizer is None else (tokenizer_file(tokenizer), str(tokenizer))
    with summed_beside(growth.origin.path, growth.origin.manifest.files) as source_is_sound:
        result = export_huggingface(
            GrownSource(growth.origin.tensors, growth.plan, "reset"),
            growth.plan.target_geometry,
            folder,
            dtype=growth.dtype,
            tokenizer=tokenizer,
            progress=progress,
            source_is_sound=source_is_sound,
        )
    record = growth_record(growth.origin, growth.plan, growth.policy)
    if growth.plan.maps is not None:
        (folder / MAPS_NAME).write_bytes(packed(growth.plan.maps))
    (folder / RECORD_NAME).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return [
        f"grew {folder} in {result.seconds:.1f} s: {format_bytes(result.bytes_written)} written in {len(result.files)} "
        f"files; tokenizer: {note}"
    ]


@contextmanager
def _process_group() -> Iterator[None]:
    """The process group of torchrun's ranks, where there are several."""
    if world_size_from_environment() == 1:
        yield
        return
    from growth_megatron.parallel import process_groups  # loads megatron-core

    process_groups.start(on_devices=False)
    try:
        yield
    finally:
        process_groups.stop()


def _done_lines(result: GrowthResult, origin: Origin, verify_source: bool) -> list[str]:
    sums = "re-read, as checksummed" if verify_source else "not re-read, --verify-source does; the source's checksums"
    notes = [f"{format_bytes(result.bytes_linked)} linked ({sums})"] if result.bytes_linked else []
    notes.append(f"{format_bytes(result.bytes_written)} written")
    if result.bytes_copied:
        notes.append(f"{format_bytes(result.bytes_copied)} of them copied data")
    if result.bytes_resumed:
        notes.append(f"{format_bytes(result.bytes_resumed)} taken over from an interrupted attempt")
    lines = write_train_file(result.path, result.manifest.geometry, origin)
    return [f"grew {result.path} in {result.seconds:.2f} s: {', '.join(notes)}", *lines]
