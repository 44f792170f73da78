"""What a run checks before it goes on where it was.

Owns: the choice of the checkpoint on rank 0, its fit to the configuration, what is shown of changes between the two.
Does not own: the walk over the stages (``train.stages``), the data's fingerprint (``data.fingerprint``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.manifest import BranchRecord, Manifest, read_identified_manifest
from growth_megatron.checkpoint.folder.run_directory import ResumeChoice, RunDirectory
from growth_megatron.checkpoint.folder.store import Store, fetch_newer, fetch_origin, is_url
from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.load import LoadedConfig
from growth_megatron.config.run_schema import CheckpointConfig, RunConfig
from growth_megatron.config.schema import (
    ModelConfig,
    StageConfig,
)
from growth_megatron.errors import CheckpointError, ConfigError, DamagedError, GrowthMegatronError
from growth_megatron.growth.conditions import GEOMETRY_FIELDS, check_growth, growth_problems
from growth_megatron.growth.configuration import load_config
from growth_megatron.growth.masks import masked_plan
from growth_megatron.growth.new_parts import frozen_keys
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import stage_growth
from growth_megatron.growth.ramps import describe_ramps, last_step, mask_ramps
from growth_megatron.parallel import collectives

NEXT_LAYOUT_NAME = "next_layout.json"

_STAGE = re.compile(r"stages\.(\d+)\.")


def find_start(directory: RunDirectory, loaded: LoadedConfig) -> ResumeChoice:
    """What to go on from: the newest checkpoint whose contents have their checksums; all ranks share the summing."""
    while True:
        choice = collectives.on_rank_zero(lambda: open_run(directory, loaded))
        if choice.path is None or choice.manifest is None:
            return choice
        try:
            with summed_beside(choice.path, choice.manifest.files) as check:
                check()
            return choice
        except DamagedError as error:
            directory.refuse(choice.path, str(error))


def open_run(directory: RunDirectory, loaded: LoadedConfig) -> ResumeChoice:
    """Rank 0: tidy up after a kill, choose what to resume from, check that it belongs to this configuration."""
    config = loaded.config
    _prepare(directory)
    recovered = [*directory.recover(), *_from_store(directory, config.checkpoint)]
    choice = choose_start(directory, config.checkpoint)
    for text in recovered:
        print(f"checkpoints: {text}", flush=True)
    for skipped in choice.skipped:
        print(f"checkpoints: skipped {skipped.path}: {skipped.reason}", flush=True)
    if choice.path is not None and choice.manifest is not None:
        print(f"resuming from {choice.path} (step {choice.manifest.step})", flush=True)
        _check_geometry(config, choice.path, choice.manifest)
    _check_groups(config, choice.manifest)
    if choice.path is not None and choice.manifest is not None and choice.manifest.config_hash != loaded.hash:
        _show_changes(choice.path, config)
    (directory.path / NEXT_LAYOUT_NAME).unlink(missing_ok=True)
    (directory.path / "config.yaml").write_text(loaded.text, encoding="utf-8")
    return choice


def _from_store(directory: RunDirectory, settings: CheckpointConfig) -> list[str]:
    """Fetch what ``checkpoint.store`` has newer than the run directory; what was done, in words."""
    if settings.store is None:
        return []
    store = Store(settings.store)
    if settings.resume != "never":
        return [text for text in [fetch_newer(store, directory)] if text]
    if names := store.names():
        raise ConfigError(
            f"checkpoint.resume is never, but checkpoint.store {store.url} holds a run already ({names[-1]}); set it "
            "to auto to go on with that run, or name another store"
        )
    return []


def choose_start(directory: RunDirectory, settings: CheckpointConfig, resume: str | None = None) -> ResumeChoice:
    """What to go on from; a checkpoint of another run as ``checkpoint.mode`` and ``checkpoint.data`` have it.

    Args: resume: instead of the setting.
    Raises: as ``RunDirectory.choose_resume``.
    """
    resume = resume or settings.resume
    if is_url(resume):
        fetched = directory.path / "fetched"
        resume = "auto" if directory.newest_valid()[0] is not None else str(fetch_origin(resume, fetched))
    choice = directory.choose_resume(resume)
    is_own = choice.path is None or choice.path.resolve().parent == directory.checkpoints_path.resolve()
    if is_own or choice.path is None or (settings.mode, settings.data) == ("continue", "same"):
        return choice
    manifest, identity = read_identified_manifest(choice.path)
    branch = BranchRecord(
        step=manifest.step,
        stage=manifest.stage,
        stage_step=manifest.stage_step,
        consumed_samples=manifest.consumed_samples,
        source=str(choice.path.resolve()),
        source_manifest_sha256=identity,
        mode=settings.mode,
        data=settings.data,
        data_fingerprint=manifest.data_fingerprint,
    )
    changes: dict[str, Any] = {"branches": (*manifest.branches, branch)}
    if settings.mode == "branch":
        if manifest.stage_step and (plan := masked_plan(manifest)) is not None:
            raise CheckpointError(
                f"{choice.path} was grown with masks that open {describe_ramps(plan.ramps)} of its stage and stands at "
                f"{manifest.stage_step}: a branch would close them again. Set checkpoint.mode to continue, or name a "
                "checkpoint from after that"
            )
        changes |= {"stage": 0, "stage_step": 0, "loss_mean": 0.0, "loss_deviation": 0.0}
    if settings.data == "new":
        changes |= {"consumed_samples": 0, "skipped_samples": 0, "data_fingerprint": None}
    return dataclasses.replace(choice, manifest=manifest.model_copy(update=changes))


def _prepare(directory: RunDirectory) -> None:
    try:
        directory.lock()
    except OSError as error:
        raise ConfigError(
            f"run.directory {directory.path} cannot be written ({error.strerror}); choose a folder that can"
        ) from error


def _check_geometry(config: RunConfig, path: Path, manifest: Manifest) -> None:
    if manifest.stage >= len(config.stages):
        raise CheckpointError(
            f"{path} is of stage {manifest.stage + 1} but the configuration has {len(config.stages)} stage(s); "
            "give the configuration the run was started with, or begin another run with it: "
            f"checkpoint.resume={path} checkpoint.mode=branch run.directory=NEW"
        )
    stage = config.stages[manifest.stage]
    if grows_at_start(config, path):
        check_growth(manifest.geometry, stage.model, stage.growth or GrowthConfig())
        return
    _check_masks(stage, path, manifest)
    differing = geometry_differences(manifest.geometry, stage.model)
    if differing:
        remedy = "Give model: the checkpoint's values, or choose another run.directory"
        settings = " ".join(
            f"{key}={getattr(stage.model, key)}"
            for key in GEOMETRY_FIELDS
            if getattr(stage.model, key) != getattr(manifest.geometry, key)
        )
        if settings and not growth_problems(manifest.geometry, stage.model, GrowthConfig()):
            remedy += f", or grow the checkpoint: growth-megatron grow {path} TARGET --set {settings}"
        raise CheckpointError(f"{path} holds another model than stage {stage.name}: {', '.join(differing)}. {remedy}")


def grows_at_start(config: RunConfig, path: Path) -> bool:
    """Whether the first stage's model is to be grown out of ``path``, another run's checkpoint."""
    own = (Path(config.run.directory) / "checkpoints").resolve()
    branches = config.checkpoint.mode == "branch" and config.stages[0].growth is not None
    return branches and path.resolve().parent != own


def _check_groups(config: RunConfig, manifest: Manifest | None) -> None:
    """Who is new says the growth that a stage begins with."""
    for number, stage in enumerate(config.stages):
        frozen_keys(stage.optimizer.freeze, stage.model)
        begins = number == 0 and (manifest is None or manifest.stage == 0)
        learned = stage.growth is not None and choose(stage.growth).is_learned
        if learned and stage.optimizer.tells_new_apart:
            raise ConfigError(
                f"optimizer of stage {stage.name} treats new parameters apart, but learned maps mix what was there "
                "into all of them; leave out train_only and new_parameters"
            )
        if begins and stage.growth is None and stage.optimizer.tells_new_apart and stage_growth(manifest) is None:
            raise ConfigError(
                f"optimizer of stage {stage.name} treats new parameters apart, and the stage begins with no growth; "
                "write train_only and new_parameters under the stage that grows (stages.NAME.optimizer)"
            )


def _check_masks(stage: StageConfig, path: Path, manifest: Manifest) -> None:
    """Masks go by the growth that made the checkpoint, so that it is one model whoever reads it."""
    plan = masked_plan(manifest)
    if plan is None:
        return
    grown = f"{path} was grown with masks that open {describe_ramps(plan.ramps)}"
    if last_step(plan.ramps) > stage.num_steps:
        raise CheckpointError(
            f"{grown}, but stage {stage.name} has {stage.num_steps} steps; give it {last_step(plan.ramps)} or more "
            f"(stages.{stage.name}.training.steps)"
        )
    if stage.growth is not None:
        wanted = mask_ramps(plan.source_geometry, plan.target_geometry, choose(stage.growth))
        if wanted != plan.ramps:
            raise CheckpointError(
                f"{grown}, the configuration says {describe_ramps(wanted) or 'none'}; set growth.ramp of stage "
                f"{stage.name} back to that, or resume from the checkpoint before the growth in another run.directory"
            )


def geometry_differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The fields in which two geometries differ, as ``name stored -> wanted``.

    Initialisation does not count, nor does the length of the samples, which is the data's to say.
    """
    then, now = _geometry(stored), _geometry(wanted)
    return [f"{name} {then[name]} -> {now[name]}" for name in then if then[name] != now[name]]


def _geometry(model: ModelConfig) -> dict[str, Any]:
    fields = model.model_dump(
        exclude={"init_std", "vocab_multiple", "vocab_size", "sequence_length", "max_position_embeddings"}
    )
    return {**fields, "padded_vocab_size": model.padded_vocab_size}


def _show_changes(path: Path, config: RunConfig) -> None:
    """Say what a resumed run's configuration changes; learning rate and decay follow the new one at once."""
    try:
        before = _flat(load_config(path / "config.yaml").config.model_dump())
    except GrowthMegatronError:
        return  # stored by another version; the checkpoint itself has been checked
    after = _flat(config.model_dump())
    for line in _changes(before, after):
        print(f"config changed since this checkpoint: {line}", flush=True)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """A line for each value that differs, and one for a whole stage that only one of the two has."""
    stages = [{match[1] for name in each if (match := _STAGE.match(name))} for each in (before, after)]
    for number in sorted(stages[0] ^ stages[1], key=int):
        has, end = (after, "is new") if number in stages[1] else (before, "is no longer in it")
        yield f"stage {has[f'stages.{number}.name']} {end}"
    shared = stages[0] & stages[1]
    for name in sorted(before.keys() | after.keys()):
        match = _STAGE.match(name)
        if before.get(name) != after.get(name) and (match is None or match[1] in shared):
            yield f"{name}: {before.get(name)} -> {after.get(name)}"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Sequence[tuple[str, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for k, v in items for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}
