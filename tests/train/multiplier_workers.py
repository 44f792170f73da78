"""What the tests of multipliers run on each rank (``tests.ranks``): a width growth by hand, and the runs after it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from growth_megatron.checkpoint.folder.manifest import Multipliers
from growth_megatron.checkpoint.torch_dist.live_model import load_into_model
from growth_megatron.checkpoint.torch_dist.optimizer_groups import fresh_common, regroup
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common
from growth_megatron.checkpoint.torch_dist.saver import start_save
from growth_megatron.config.schema import OptimizerConfig, StageConfig
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.init import InitSource
from growth_megatron.model.tensors import (
    FIRST_MOMENT_PREFIX,
    MOMENT_PREFIXES,
    SECOND_MOMENT_PREFIX,
    STATE_PREFIXES,
    whole,
)
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.engine import Batch, Engine
from tests.checkpoint.written import write_distributed
from tests.workers import fresh_engine, stage_of

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 16,
    "ffn_hidden_size": 96,
    "vocab_size": 120,
    "sequence_length": 16,
    "init_std": 0.1,
}
GROWN = {**BASE, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 192}
STEPS_BEFORE, STEPS_AFTER, RATE = 5, 25, 3e-3
OPTIMIZER = OptimizerConfig(weight_decay=0.1, clip_grad=0.2, epsilon=1e-4)  # an epsilon that matters beside sqrt(v)

Rule = tuple[float, int]
"""(a, c): each weight appears as ``c`` copies of ``a`` times itself."""


def stage_at(layout: dict[str, Any], model: dict[str, Any]) -> StageConfig:
    return stage_of(layout, model).model_copy(update={"optimizer": OPTIMIZER})


def rules(tied: bool) -> dict[str, Rule]:
    """The exact rule of a x2 growth of residual, query groups and ffn by even duplication, per kind of tensor."""
    matrix, gain = (0.5, 4), (1.0, 2)
    found = {
        "embedding.word_embeddings.weight": (1.0, 2),
        "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": gain,
        "decoder.layers.*.self_attention.linear_qkv.weight": matrix,
        "decoder.layers.*.self_attention.linear_proj.weight": matrix,
        "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": gain,
        "decoder.layers.*.mlp.linear_fc1.weight": matrix,
        "decoder.layers.*.mlp.linear_fc2.weight": matrix,
        # Tied, the logit side's share goes into the last gain.
        "decoder.final_layernorm.weight": (0.5, 2) if tied else gain,
    }
    return found if tied else {**found, "output_layer.weight": (0.5, 2)}


def multipliers_of(tied: bool) -> dict[str, Multipliers]:
    return {
        key: Multipliers(learning_rate=a, weight_decay=1 / a, epsilon=1 / (a * c))
        for key, (a, c) in rules(tied).items()
    }


def kind_of(key: str) -> str:
    parts = key.split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def duplicate(key: str, value: torch.Tensor) -> torch.Tensor:
    """Every coordinate of a tensor of ``BASE`` twice, interleaved; a query group as a whole."""
    if key.endswith("linear_qkv.weight"):  # [groups, q..q k v, d, h]
        grouped = value.view(2, 4, 16, 64).repeat_interleave(2, 0).repeat_interleave(2, 3)
        return grouped.reshape(-1, 128)
    if key.endswith("linear_proj.weight"):  # [h, groups, q..q, d]
        return value.view(64, 2, 2, 16).repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(128, -1)
    if key.endswith("linear_fc1.weight"):  # [gate and up, f, h]
        return value.view(2, 96, 64).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(-1, 128)
    if key.endswith("linear_fc2.weight"):
        return value.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return value.repeat_interleave(2, value.dim() - 1)  # embedding and output [v, h], gains [h]


def write_grown(
    source: Path, target: Path, tied: bool, multipliers: Mapping[str, Multipliers], scaled_moments: bool
) -> None:
    """``source`` grown by ``rules``, with the parameter groups of ``multipliers``."""
    checkpoint, rule = DistCheckpoint(source), rules(tied)
    tensors = {}
    for key in tensor_shapes(stage_at({}, {**BASE, "tie_embeddings": tied}).model):
        a, c = rule[kind_of(key)]
        gradient = 1 / (a * c) if scaled_moments else 1.0
        factors = {FIRST_MOMENT_PREFIX: gradient, SECOND_MOMENT_PREFIX: gradient**2}
        for prefix in STATE_PREFIXES:
            value = checkpoint.read(prefix + key, whole(checkpoint.spec(prefix + key).shape))
            tensors[prefix + key] = duplicate(key, value) * factors.get(prefix, a)
    write_distributed(target, tensors, _extra_states(BASE["num_layers"]))
    model = stage_at({}, {**GROWN, "tie_embeddings": tied}).model
    torch.save(regroup(read_common(source), multipliers, model), target / "common.pt")


def _extra_states(num_layers: int) -> dict[str, bytes]:
    """What megatron-core saves beside the weights of its linear layers: nothing, and strictly asked for."""
    content = io.BytesIO()
    torch.save([None], content)
    linear = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    return {
        f"decoder.layers.{layer}.{name}._extra_state/shard_0_1": content.getvalue()
        for layer in range(num_layers)
        for name in linear
    }


def batches_at(step: int, stage: StageConfig) -> list[Batch]:
    """This rank's micro-batches, one sample each, of a global batch of 4: the same samples at every layout."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    length = stage.model.sequence_length
    generator = torch.Generator().manual_seed(500 + step)
    tokens = torch.randint(0, stage.model.vocab_size, (4, length + 1), generator=generator)
    return [
        {
            "tokens": tokens[i : i + 1, :-1].contiguous(),
            "labels": tokens[i : i + 1, 1:].contiguous(),
            "position_ids": torch.arange(length)[None],
            "loss_mask": torch.ones(1, length),
        }
        for i in range(rank, 4, size)
    ]


def _losses(engine: Engine, first: int, steps: int) -> list[float]:
    return [engine.train_step(batches_at(s, engine.stage), RATE).loss for s in range(first, first + steps)]


def ungrown_runs(folder: str) -> dict[str, list[float]]:
    """Train a tied and an untied base, save each into ``folder``, go on; the losses after the save."""
    after = {}
    for tied in (False, True):
        stage = stage_at({}, {**BASE, "tie_embeddings": tied})
        with fresh_engine(stage) as engine:
            _losses(engine, 0, STEPS_BEFORE)
            target = Path(folder) / ("tied" if tied else "untied")
            target.mkdir()
            start_save(target, engine.models, engine.optimizer).finish()
            after[target.name] = _losses(engine, STEPS_BEFORE, STEPS_AFTER)
    return after


def ungrown_and_grown(folder: str, cases: list[dict[str, Any]]) -> tuple[dict[str, list[float]], list[list[float]]]:
    return ungrown_runs(folder), grown_runs(cases)


def grown_runs(cases: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of each grown run; ``folder/name`` is what ``ungrown_runs`` saved."""
    return [_grown_run(number=number, **case) for number, case in enumerate(cases)]


def _grown_run(folder: str, name: str, layout: dict[str, Any], number: int, without: str = "") -> list[float]:
    """``without`` leaves out: ``moments`` (their scaling), ``norm`` (that of the source's gradients is clipped),
    ``multipliers``, or one of these by its name.
    """
    tied = name == "tied"
    multipliers = {} if without == "multipliers" else multipliers_of(tied)
    if without in Multipliers.model_fields:
        multipliers = {key: value.model_copy(update={without: 1.0}) for key, value in multipliers.items()}
    source, world = Path(folder) / name, torch.distributed.get_world_size()
    target = Path(folder) / f"{name}_grown_{world}_{number}"
    collectives.on_rank_zero(lambda: write_grown(source, target, tied, multipliers, without != "moments"))
    with engine_with(stage_at(layout, {**GROWN, "tie_embeddings": tied}), multipliers) as engine:
        load_into_model(target, engine.models, engine.optimizer)
        if without == "norm":
            engine._source_grad_norm = lambda: float(engine.optimizer.get_grad_norm())  # type: ignore[method-assign]
        return _losses(engine, STEPS_BEFORE, STEPS_AFTER)


@contextmanager
def engine_with(stage: StageConfig, multipliers: Mapping[str, Multipliers]) -> Iterator[Engine]:
    """An engine to load into, as a stage builds it."""
    process_groups.set_layout(stage.parallel, 7)
    engine = Engine(stage, multipliers)
    engine.finish()
    yield engine
    engine.close()


def fresh_files(folder: str, cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> list[Any]:
    """For each layout, model and multipliers what ``_settings_after_loads`` and ``_losses_with_and_without`` tell."""
    results = []
    for number, (layout, model, dumped) in enumerate(cases):
        stage = stage_at(layout, model)
        multipliers = {key: Multipliers(**value) for key, value in dumped.items()}
        target = Path(folder) / f"fresh_{torch.distributed.get_world_size()}_{number}"
        results.append(
            [_settings_after_loads(target, stage, multipliers), _losses_with_and_without(target / "plain", stage)]
        )
    return results


def _settings_after_loads(target: Path, stage: StageConfig, multipliers: dict[str, Multipliers]) -> dict[str, Any]:
    """Load, step, save, load that and step: each of this rank's tensors' settings, and the groups in both files."""
    saved = target / "saved"
    collectives.on_rank_zero(lambda: _write_fresh(target, stage, multipliers))
    collectives.on_rank_zero(saved.mkdir)
    with engine_with(stage, multipliers) as engine:
        load_into_model(target, engine.models, engine.optimizer)
        _losses(engine, 0, 1)
        start_save(saved, engine.models, engine.optimizer).finish()
        load_into_model(saved, engine.models, engine.optimizer)
        _losses(engine, 1, 1)
        return {"settings": _settings(engine), "written": _groups(target), "saved": _groups(saved)}


def _losses_with_and_without(target: Path, stage: StageConfig) -> tuple[list[float], list[float]]:
    """Of a fresh model without multipliers: from a checkpoint, and from its initial weights."""
    collectives.on_rank_zero(lambda: _write_fresh(target, stage, {}))
    with engine_with(stage, {}) as engine:
        load_into_model(target, engine.models, engine.optimizer)
        loaded = _losses(engine, 0, 2)
    with fresh_engine(stage) as engine:
        return loaded, _losses(engine, 0, 2)


def _groups(checkpoint: Path) -> list[dict[str, Any]]:
    return list(read_common(checkpoint)["optimizer"]["optimizer"]["param_groups"])


def common_of_a_fresh_save(folder: str) -> dict[str, Any]:
    """``common.pt`` of an engine that has not stepped."""
    with fresh_engine(stage_at({}, BASE)) as engine:
        start_save(Path(folder), engine.models, engine.optimizer).finish()
    return read_common(Path(folder))


def _write_fresh(target: Path, stage: StageConfig, multipliers: dict[str, Multipliers]) -> None:
    source = InitSource(stage.model, 7)
    tensors: dict[str, torch.Tensor] = {}
    for key, shape in tensor_shapes(stage.model).items():
        value = source.read(key, whole(shape))
        tensors |= {
            prefix + key: torch.zeros(shape) if prefix in MOMENT_PREFIXES else value for prefix in STATE_PREFIXES
        }
    write_distributed(target, tensors, _extra_states(stage.model.num_layers))
    torch.save(regroup(fresh_common(), multipliers, stage.model), target / "common.pt")


def _settings(engine: Engine) -> dict[str, list[float]]:
    """Learning rate, weight decay and epsilon of this rank's tensors by their keys, found by the modules themselves."""
    (inner,) = engine.optimizer.chained_optimizers
    found: dict[str, list[float]] = {}
    for model in engine.models:
        for name, param in model.named_parameters():
            if param in inner.model_param_group_index_map:  # else another data-parallel rank holds it
                group = inner.optimizer.param_groups[inner.model_param_group_index_map[param][0]]
                found[_key(model, name)] = [group["lr"], group["weight_decay"], group["eps"]]
    return found


def _key(model: Any, name: str) -> str:
    """The checkpoint's key of a live parameter, by a reading of megatron-core's module tree of this test's own."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight (output)"
    before, layers, after = name.partition("decoder.layers.")
    if not layers:
        return name
    index, _, rest = after.partition(".")
    return f"{before}{layers}{model.decoder.layers[int(index)].layer_number - 1}.{rest}"
