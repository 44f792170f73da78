"""``growth-megatron verify``: files are whole, and a grown checkpoint is what its record says it is.

Owns: the comparison of a grown checkpoint with its source seen through the recorded plan, bit by bit; the comparison of
both functions where the plan keeps the function.
Does not own: the state of the files (``checkpoint.verify``), the plan (``growth.plan``), the forward pass
(``model.reference``).

A checkpoint can be compared only as the growth left it: later ones have trained on. The source is the recorded one if
its identity is still the recorded one, or else a checkpoint of its name beside the grown one (a run that was moved).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from growth_megatron.checkpoint.folder.files import expected_in
from growth_megatron.checkpoint.folder.manifest import GrowthRecord, Manifest, read_manifest
from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME
from growth_megatron.checkpoint.huggingface.writer import ExportedWeights
from growth_megatron.checkpoint.origin import HUGGINGFACE_PREFIX, Origin, find_origin, huggingface_origin
from growth_megatron.checkpoint.torch_dist.reader import METADATA_NAME, DistCheckpoint, read_common
from growth_megatron.checkpoint.verify import Check, Outcome, verify_files
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.words import listed
from growth_megatron.errors import CheckpointError, GrowthMegatronError
from growth_megatron.growth.learned import with_maps
from growth_megatron.growth.lineage import grown_multipliers
from growth_megatron.growth.masks import MaskedSource, Masks
from growth_megatron.growth.plan import plan_of_record
from growth_megatron.growth.rules import GrowthPlan, check_optimizer_state
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import EMBEDDING, tensor_shapes
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import (
    MASTER_PREFIX,
    Region,
    TensorSource,
    TensorSpec,
    WithFreshOptimizer,
    row_blocks,
    split_state_key,
    whole,
)

RECORD_NAME = "growth_record.json"
"""Of a grown Hugging Face folder: what a checkpoint's manifest would say of the growth."""

TOLERANCE = 2e-6
"""Allowed difference of the logits of source and target, relative to the largest."""

Result = tuple[Outcome, str, Mapping[str, float]]

_BATCH, _SEQUENCE = 2, 32
_STRIPS = 4
_BLOCK_ELEMENTS = 1 << 20
_NAMED = 3
_SUMMED = 1e-12  # rounding of sums in float64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_checkpoints(path: Path, full: bool = False) -> Iterator[Check]:
    """All checks of the checkpoint, or of each of the run's: its files, and its growth if it was grown.

    ``full`` reads every file and compares every value; else sizes, and some rows of every tensor.

    Raises, after the last check:
        CheckpointError: something failed, or there is no checkpoint.
        NothingValidError: the run has checkpoints and none of them is whole.
    """
    failed: list[Check] = []
    folder = Path(str(path).removeprefix(HUGGINGFACE_PREFIX))
    theirs = str(path) != str(folder) or (not (folder / METADATA_NAME).exists() and (folder / CONFIG_NAME).is_file())
    for check in _huggingface_files(folder) if theirs else verify_files(path, full):
        yield check
        if check.outcome == "OK":
            for grown in verify_huggingface_growth(folder, full) if theirs else verify_growth(check.path, full):
                yield grown
                if grown.outcome == "FAILED":
                    failed.append(grown)
    if failed:
        names = ", ".join(f"{check.path.name} ({check.subject})" for check in failed)
        raise CheckpointError(f"not what the recorded growth gives: {names}; grow again from the source")


def _huggingface_files(folder: Path) -> Iterator[Check]:
    origin = huggingface_origin(folder)
    text = f"{len(origin.tensors.keys())} tensors in {len(origin.files())} files, all there; it has no checksums"
    yield Check(folder, "files", "OK", text)


class _Unpadded(ExportedWeights):
    """Exported weights with the vocabulary that their files have."""

    def __init__(self, source: TensorSource, geometry: ModelConfig, dtype: torch.dtype | None) -> None:
        super().__init__(source, geometry, dtype)
        self._unpadded = tensor_shapes(geometry.model_copy(update={"vocab_multiple": 1}))

    @override
    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._unpadded[key], super().spec(key).dtype)


def verify_huggingface_growth(folder: Path, full: bool = False) -> Iterator[Check]:
    """Checks of the growth that led to a Hugging Face folder; none if it holds no record of one."""
    if not (folder / RECORD_NAME).is_file():
        return
    try:
        record = GrowthRecord.model_validate_json((folder / RECORD_NAME).read_bytes())
        plan = _plan(record, folder)
    except (GrowthMegatronError, ValueError) as error:
        yield Check(folder, "plan", "FAILED", f"the recorded growth cannot be planned again: {_one_line(error)}")
        return
    origin = _recorded_source(folder, record, full)
    if isinstance(origin, str):
        yield Check(folder, "growth", "SKIPPED", f"tensors were not compared with the plan's: {origin}")
        return
    yield Check(folder, "plan", "OK", f"{plan.operator}, {len(plan.rules)} tensors, from {origin.path}")
    target, grown = huggingface_origin(folder).tensors, GrownSource(origin.tensors, plan, "reset")
    dtype = target.spec(EMBEDDING.name).dtype
    other = dtype if dtype != grown.spec(EMBEDDING.name).dtype else None
    expected = _Unpadded(grown, plan.target_geometry, other)
    yield Check(folder, "tensors", *_compare_with(expected, target, full, not plan.is_learned))
    yield Check(folder, "logits", *_compare_logits(origin.tensors, target, plan))


def verify_growth(checkpoint: Path, full: bool = False) -> Iterator[Check]:
    """Checks of the newest growth of a whole checkpoint; none if it was not grown."""
    manifest = read_manifest(checkpoint)
    if not manifest.lineage:
        return
    record = manifest.lineage[-1]

    def check(subject: str, outcome: Outcome, text: str, **figures: float) -> Check:
        return Check(checkpoint, subject, outcome, text, figures)

    if manifest.stage_step or manifest.step != record.step:
        text = f"trained on since its growth at step {record.step:,}; only a checkpoint as grown can be compared"
        yield check("growth", "SKIPPED", text)
        return
    try:
        if manifest.geometry != record.target_geometry:
            raise CheckpointError("the manifest's geometry is not the one that its newest growth led to")
        plan = _plan(record, checkpoint)
    except (GrowthMegatronError, ValueError) as error:  # pydantic's errors are ValueErrors
        yield check("plan", "FAILED", f"the recorded growth cannot be planned again: {_one_line(error)}")
        return
    origin = _recorded_source(checkpoint, record, full)
    if isinstance(origin, str):
        yield check("growth", "SKIPPED", f"tensors were not compared with the plan's: {origin}")
        return
    unsummed = "" if origin.is_of_a_run else " (which has no checksums to compare it with)"
    yield check("plan", "OK", f"{plan.operator}, {len(plan.rules)} tensors, from {origin.path}{unsummed}")
    target = DistCheckpoint(checkpoint)
    comparisons: tuple[tuple[str, Callable[[], Result]], ...] = (
        ("tensors", lambda: _compare_tensors(origin.tensors, target, plan, record.optimizer_state, full)),
        ("optimizer", lambda: _compare_optimizer(origin, target, manifest, plan)),
        ("logits", lambda: _compare_logits(origin.tensors, target, plan)),
    )
    for subject, compare in comparisons:
        try:
            with expected_in(checkpoint):
                outcome, text, figures = compare()
        except GrowthMegatronError as error:  # tensors that cannot be read, or are not those of the model
            outcome, text, figures = "FAILED", str(error), {}
        yield check(subject, outcome, text, **figures)


def _plan(record: GrowthRecord, folder: Path) -> GrowthPlan:
    plan = plan_of_record(record)
    return with_maps(plan, folder, record.maps_sha256) if plan.is_learned else plan


def _recorded_source(checkpoint: Path, record: GrowthRecord, full: bool) -> Origin | str:
    """The source of a growth, or why it cannot be had."""
    recorded = Path(record.source)
    reasons = []
    for path in dict.fromkeys((recorded, checkpoint.resolve().parent / recorded.name)):
        if not os.path.isdir(path):  # other than Path.is_dir it takes any text for a path
            reasons.append(f"the source {path} is no longer there")
            continue
        try:
            origin = find_origin(path, metadata_alone=True)
        except CheckpointError as error:
            reasons.append(f"the source {path} is damaged: {error}")
            continue
        if (problem := origin.problem(full)) is not None:
            reasons.append(f"the source {path} is damaged: {problem}")
        elif origin.identity == record.source_manifest_sha256:
            return origin
        else:
            reasons.append(f"{path} is another checkpoint now than it was at the growth")
    return reasons[0]


def _compare_tensors(source: TensorSource, target: DistCheckpoint, plan: GrowthPlan, policy: str, full: bool) -> Result:
    """Every tensor of the plan against the stored one, bit by bit."""
    if _has_state(target) and not _has_state(source):
        source = WithFreshOptimizer(source)
    return _compare_with(GrownSource(source, plan, policy), target, full, not plan.is_learned)


def _compare_with(grown: TensorSource, target: TensorSource, full: bool, exact: bool) -> Result:
    stored, expected = set(target.keys()), grown.keys()
    wrong = [f"{key} is missing" for key in expected if key not in stored]
    wrong += [f"{key} is not of this model" for key in sorted(stored.difference(expected))]
    for key in expected:
        if key in stored and (difference := _first_difference(target, grown, key, full, exact)):
            wrong.append(difference)
    if wrong:
        count = f"{len(wrong)} of {len(expected)} tensors are not what the plan gives"
        return "FAILED", f"{count}: {listed(wrong, _NAMED)}", {"wrong_tensors": len(wrong)}
    states = len([key for key in expected if split_state_key(key)[0]])
    what = "every value" if full else f"some rows of each ({_STRIPS + 2} at most; all with --full)"
    text = f"{len(expected) - states} weights and {states} tensors of optimizer state equal the plan's: {what}"
    return "OK", text, {"wrong_tensors": 0}


def _first_difference(target: TensorSource, grown: TensorSource, key: str, full: bool, exact: bool) -> str | None:
    """Where the first value of a tensor that is not the plan's lies, and both values.

    What dense maps make depends on how a machine adds up, in the last bit: then not ``exact``.
    """
    spec, planned = target.spec(key), grown.spec(key)
    if spec != planned:
        return f"{key} is {spec.shape} in {spec.dtype}, the plan gives {planned.shape} in {planned.dtype}"
    regions = row_blocks(spec.shape, _BLOCK_ELEMENTS) if full else _sampled_rows(key, spec.shape)
    for region in regions:
        here, there = target.read(key, region), grown.read(key, region)
        if exact:
            bits = _BITS[spec.dtype.itemsize]
            different = here.contiguous().view(bits) != there.contiguous().view(bits)
        else:
            last_bit = torch.finfo(spec.dtype).eps
            different = ~torch.isclose(here.double(), there.double(), rtol=last_bit, atol=_SUMMED)
        if different.any():
            place = tuple(different.nonzero()[0].tolist())
            position = [start + part.start for start, part in zip(place, region, strict=True)]
            return f"{key}{position} is {here[place]:.9g}, the plan gives {there[place]:.9g}"
    return None


def _sampled_rows(key: str, shape: tuple[int, ...]) -> Iterator[Region]:
    """First, last and one row out of each quarter, the same at every call; a vector is taken whole."""
    if len(shape) < 2 or shape[0] <= _STRIPS + 2:
        yield whole(shape)
        return
    digest = hashlib.sha256(key.encode()).digest()
    chosen = {0, shape[0] - 1}
    for strip in range(_STRIPS):
        start, stop = strip * shape[0] // _STRIPS, (strip + 1) * shape[0] // _STRIPS
        chosen.add(start + int.from_bytes(digest[4 * strip : 4 * strip + 4], "big") % (stop - start))
    for row in sorted(chosen):
        yield (slice(row, row + 1), *whole(shape[1:]))


def _compare_optimizer(origin: Origin, target: DistCheckpoint, manifest: Manifest, plan: GrowthPlan) -> Result:
    """What the optimizer goes on with beside its tensors: Adam's step, and the multipliers of its settings."""
    policy = check_optimizer_state(manifest.lineage[-1].optimizer_state)
    if not _has_state(target):
        return "SKIPPED", "the checkpoint has no optimizer state", {}
    if manifest.multipliers != grown_multipliers(origin.manifest.multipliers, plan, policy):
        return "FAILED", "the multipliers of learning rate, weight decay and epsilon are not the plan's", {}
    wanted = set(_steps(origin.common())) if policy != "reset" else {0.0}
    found = set(_steps(read_common(target.path)))
    shown = ", ".join(f"{step:g}" for step in sorted(found)) or "not stored"
    if found != wanted:
        return "FAILED", f"step {shown}, but {policy} gives {', '.join(f'{step:g}' for step in sorted(wanted))}", {}
    return "OK", f"step {shown} and {len(manifest.multipliers)} multipliers, as {policy} gives", {}


def _steps(common: Any) -> Iterator[float]:
    """``step`` of every parameter group in ``common.pt``'s content."""
    if isinstance(common, dict):
        for group in common.get("param_groups") or ():
            if "step" in group:
                yield float(group["step"])
        common = [value for key, value in common.items() if key != "param_groups"]
    if isinstance(common, list):
        for item in common:
            yield from _steps(item)


def _compare_logits(source: TensorSource, target: TensorSource, plan: GrowthPlan) -> Result:
    """Both functions on the same tokens, if the plan keeps the function.

    In float32 the rounding of the arithmetic itself grows with the model; where that is too much, float64 decides.
    """
    if not plan.function_preserving:
        return "SKIPPED", f"{plan.operator} does not keep the function", {}
    if not _has_wide_weights(target):
        return "SKIPPED", "weights are rounded and without float32 masters, so the function is kept only roughly", {}
    figures: dict[str, float] = {"relative_difference": _logit_difference(source, target, plan, torch.float32)}
    text = f"differ from the source's by {figures['relative_difference']:.2g} in float32"
    if not figures["relative_difference"] <= TOLERANCE:
        figures["relative_difference_float64"] = _logit_difference(source, target, plan, torch.float64)
        text += f", by {figures['relative_difference_float64']:.2g} in float64, which decides, since float32 rounds"
    text += f", relative to the largest, over {_BATCH} x {_SEQUENCE} tokens; allowed {TOLERANCE:g}"
    return ("OK" if min(figures.values()) <= TOLERANCE else "FAILED"), text, figures


def _has_state(source: TensorSource) -> bool:
    return any(split_state_key(key)[0] for key in source.keys())


def _has_wide_weights(source: TensorSource) -> bool:
    keys = source.keys()
    return any(key.startswith(MASTER_PREFIX) for key in keys) or all(source.spec(k).dtype.itemsize >= 4 for k in keys)


def _logit_difference(source: TensorSource, target: TensorSource, plan: GrowthPlan, dtype: torch.dtype) -> float:
    """Largest difference of the logits over the largest logit; infinite or NaN logits give NaN."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(plan.source_geometry.vocab_size, (_BATCH, _SEQUENCE), generator=generator)  # [b, s]
    before = reference_logits(source, plan.source_geometry, tokens, dtype)
    masks = Masks(plan, 0)
    geometry = plan.target_geometry.model_copy(update={"norm_epsilon": masks.norm_epsilon})
    after = reference_logits(MaskedSource(target, masks), geometry, tokens, dtype)
    entries = min(before.shape[-1], after.shape[-1])  # a Hugging Face folder holds no padding
    before, after = before[..., :entries], after[..., :entries]
    return float((after - before).abs().max() / before.abs().max())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
