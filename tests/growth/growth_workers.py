"""What the tests of growth run on each rank (``tests.ranks``): save, grow and load with megatron-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.manifest import Manifest, checksum_files, list_files, write_manifest
from growth_megatron.checkpoint.torch_dist.live_model import load_into_model
from growth_megatron.checkpoint.torch_dist.saver import start_save
from growth_megatron.config.schema import StageConfig
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.plan import plan_depth
from growth_megatron.parallel import collectives
from growth_megatron.train.engine import Engine
from tests.workers import batches, fresh_engine, stage_of


def train_save_grow_load(
    folder: str,
    saved: dict[str, Any],
    layers: list[int],
    loads: list[dict[str, Any]],
    model: dict[str, Any],
) -> list[dict[str, Any]]:
    """Train at one layout, save, grow on rank 0, load at other layouts and save again there.

    Args:
        saved: layout of the source.
        loads: for each load its ``name``, ``layout`` and ``policy``; it is saved as ``folder/name``.

    Returns: of each load the optimizer's steps after it.
    """
    root = Path(folder)
    source = stage_of(saved, {**model, "num_layers": max(layers) + 1}, precision="bf16")
    with fresh_engine(source) as engine:
        for step in range(3):
            engine.train_step(batches(step, source), 1e-2)
        _save(engine, root / "source")
    collectives.on_rank_zero(lambda: _sign(root / "source", source))
    grown_model = source.model.model_copy(update={"num_layers": len(layers)})
    plan = plan_depth(source.model, grown_model, layers)
    for policy in ("reset", "carry"):
        grow_checkpoint(root / "source", root / f"grown_{policy}", plan, policy)
    return [_load(root, {**model, "num_layers": len(layers)}, **load) for load in loads]


def _load(root: Path, model: dict[str, Any], name: str, layout: dict[str, Any], policy: str) -> dict[str, Any]:
    target = stage_of(layout, model, precision="bf16")
    with fresh_engine(target, seed=99) as engine:  # other weights than the checkpoint's, so a missed load shows
        load_into_model(root / f"grown_{policy}", engine.models, engine.optimizer)
        _save(engine, root / name)
        steps = {float(group["step"]) for group in _inner_groups(engine)}
    return {"name": name, "steps": sorted(steps)}


def _inner_groups(engine: Engine) -> list[dict[str, Any]]:
    state = engine.optimizer.state_dict()
    return list((state[0] if isinstance(state, list) else state)["optimizer"]["param_groups"])


def _save(engine: Engine, folder: Path) -> None:
    collectives.on_rank_zero(lambda: folder.mkdir(parents=True))
    start_save(folder, engine.models, engine.optimizer).finish()


def _sign(folder: Path, stage: StageConfig) -> None:
    manifest = Manifest(
        library_version="test",
        step=3,
        stage=0,
        stage_step=3,
        consumed_samples=24,
        consumed_tokens=24 * stage.model.sequence_length,
        flops=1.0,
        geometry=stage.model,
        layout=stage.parallel,
        world_size=2,
        files=checksum_files(folder, list_files(folder)),
    )
    write_manifest(folder, manifest)
