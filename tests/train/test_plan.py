"""What a plan says: parameters, FLOPs, memory, pipeline, run totals, and how it is printed."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from growth_megatron.commands.plan_tables import print_plan, render_plan
from growth_megatron.config.schedule_schema import ScheduleConfig
from growth_megatron.config.schema import (
    DataConfig,
    DatasetConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TrainingConfig,
)
from growth_megatron.errors import ConfigError
from growth_megatron.growth.configuration import load_config
from growth_megatron.model.cost import (
    bubble_fraction,
    bubble_to_ideal,
    checkpoint_bytes,
    layer_saved_bytes,
    layers_in_flight,
    rank_memory,
    rank_parameters,
)
from growth_megatron.train.plan import flops_per_token, parameter_count, plan_run, plan_to_dict
from tests.conftest import write_growing_config

PAPER = {
    "410M": ((24, 1024, 16, 16, 2816), 374),
    "1.1B": ((24, 2048, 32, 32, 5632), 1364),
    "3B": ((32, 2560, 20, 4, 7040), 2398),
    "7B": ((32, 4096, 32, 8, 11008), 5933),
}


def _model(layers: int, hidden: int, heads: int, groups: int, ffn: int, **more: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=ffn,
        **{"vocab_size": 32000, "sequence_length": 2048, **more},
    )  # fmt: skip


def _stage(
    model: ModelConfig,
    recompute: str = "none",
    modules: list[str] | None = None,
    precision: str = "bf16",
    **parallel: object,
) -> StageConfig:
    training = TrainingConfig.model_validate(
        {"steps": 1, "global_batch_size": 8, "recompute": recompute, "recompute_modules": modules}
        | {"precision": precision}
    )
    layout = ParallelConfig.model_validate(parallel)
    schedule = ScheduleConfig(learning_rate=1e-3)
    data = DataConfig(train=(DatasetConfig(path="none"),))
    return StageConfig(name="a", model=model, parallel=layout, schedule=schedule, training=training, data=data)


# One layer: q 64, k and v 64, o 64, gate, up and down 384, two norms 16 = 592. Vocabulary 32 x 8 = 256, twice.
TINY = _model(2, 8, 2, 1, 16, vocab_size=30, vocab_multiple=16, sequence_length=4)


@pytest.mark.parametrize(("geometry", "millions"), PAPER.values(), ids=PAPER.keys())
def test_parameters_of_the_paper(geometry, millions):
    assert parameter_count(_model(*geometry)).total == pytest.approx(millions * 1e6, abs=0.6e6)


def test_parameters_by_hand():
    count = parameter_count(TINY)
    assert (count.total, count.without_embeddings, count.per_layer) == (1704, 1192, 592)
    tied = parameter_count(TINY.model_copy(update={"tie_embeddings": True}))
    assert (tied.total, tied.without_embeddings) == (1448, 1192)


def test_flops_per_token_of_known_models():
    assert flops_per_token(_model(22, 2048, 32, 4, 5632)) / 1e9 == pytest.approx(7.31, abs=0.005)  # TinyLlama
    llama_2_7b = _model(32, 4096, 32, 32, 11008, sequence_length=4096)
    assert flops_per_token(llama_2_7b) / 1e9 == pytest.approx(46.1, abs=0.05)


def test_flops_per_token_by_hand():
    assert flops_per_token(TINY) == 6 * (2 * 576 + 256) + 12 * 2 * 4 * 8
    assert flops_per_token(TINY.model_copy(update={"tie_embeddings": True})) == flops_per_token(TINY)


def test_memory_by_hand():
    rank = rank_memory(_stage(TINY), 0, data_parallel_size=1, micro_batches=8)
    assert rank.weights_bytes == 1704 * 2
    assert rank.gradients_bytes == 1704 * 4
    assert rank.optimizer_bytes == 1704 * 12
    # layer: norms 2 x 4 (2 x 2 x 8 + 4) = 288; attention 2 (4 x 9 x 4 + 64) + 4 x 4 x 2 = 448; MLP 2 x 4 x 48 = 384
    assert layer_saved_bytes(_stage(TINY)) == 288 + 448 + 384
    # token ids 32; final norm 144, softmax 4 x 4 x 32, mask and index 36; gradients inside an MLP 384
    assert rank.activations_bytes == 2 * 1120 + 32 + 144 + 512 + 36 + 384
    assert rank.total_bytes == 1704 * 18 + rank.activations_bytes


def test_memory_of_recomputation_by_hand():
    selective = rank_memory(_stage(TINY, "selective"), 0, 1, 8).activations_bytes
    mlp = rank_memory(_stage(TINY, "selective", ["mlp"]), 0, 1, 8).activations_bytes
    both = rank_memory(_stage(TINY, "selective", ["core_attn", "mlp"]), 0, 1, 8).activations_bytes
    full = rank_memory(_stage(TINY, "full"), 0, 1, 8).activations_bytes
    rest = 32 + 144 + 512 + 36 + 384
    assert selective == 2 * (1120 - 32) + 64 + 32 + rest  # without log-sum-exp, one core attention recomputed
    assert mlp == 2 * (1120 - 384) + 384 + rest  # without the MLP, one MLP recomputed
    assert both == 2 * (1120 - 384 - 32) + 384 + rest  # one of the two at a time, the larger
    assert full == 2 * (2 * 4 * 8) + 1120 + rest  # the layers' inputs, one layer recomputed


def test_parameter_groups_and_masks_say_what_they_copy(tmp_path: Path) -> None:
    growing = write_growing_config(tmp_path, tmp_path)
    plain, frozen, masked = (
        plan_run(load_config(growing, overrides).config, 1).stages[1]
        for overrides in (
            [],
            ["optimizer.freeze=[embedding*]"],
            ["stages.grown.growth={operator: masked, ramp: {depth: [0, 4]}}"],
        )
    )
    (before,), (groups,), (masks,) = plain.ranks, frozen.ranks, masked.ranks
    assert before.copies_bytes == 0
    assert groups.copies_bytes == 4 * groups.parameters
    assert groups.total_bytes == before.total_bytes + groups.copies_bytes
    assert 0 < masks.copies_bytes < masks.weights_bytes  # o and down of the new layers


def test_fp32_needs_no_copy_of_the_weights_in_the_optimizer():
    rank = rank_memory(_stage(TINY, precision="fp32"), 0, 2, 8)
    assert (rank.weights_bytes, rank.optimizer_bytes) == (1704 * 4, 1704 // 2 * 8)
    assert checkpoint_bytes(TINY, TrainingConfig(steps=1, global_batch_size=1, precision="fp32")) == 1704 * 16
    assert checkpoint_bytes(TINY, TrainingConfig(steps=1, global_batch_size=1)) == 1704 * 14


def test_parameters_of_a_rank_split_matrices_and_replicate_norms():
    model = _model(4, 8, 2, 2, 16, vocab_size=32, vocab_multiple=16, sequence_length=4)  # layer: 640 and two norms
    layout = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert rank_parameters(model, layout, 0) == 128 + 2 * (320 + 16)
    assert rank_parameters(model, layout, 1) == 128 + 2 * (320 + 16) + 8
    tied = model.model_copy(update={"tie_embeddings": True})
    assert rank_parameters(tied, layout, 1) == 128 + 2 * (320 + 16) + 8  # stored again on the last stage
    assert rank_parameters(tied, ParallelConfig(), 0) == parameter_count(tied).total


def test_sequence_parallelism_splits_what_tensor_parallelism_alone_repeats():
    model = _model(2, 8, 2, 2, 16, vocab_size=32, vocab_multiple=16, sequence_length=4)
    whole = layer_saved_bytes(_stage(model))
    split = layer_saved_bytes(_stage(model, tensor_parallel_size=2, sequence_parallel=True))
    repeated = layer_saved_bytes(_stage(model, tensor_parallel_size=2))
    rotary, norms = 2 * 4 * 4 * 4, 288
    assert 2 * split == whole + rotary
    assert 2 * repeated == whole + rotary + norms


@pytest.mark.parametrize(("pipeline", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (2, 3), (4, 2), (4, 3)])
@pytest.mark.parametrize("micro_batches", [4, 8, 32])
def test_layers_in_flight_follow_megatron_core(pipeline, chunks, micro_batches):
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        link = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        total, _, warmup, _ = schedules.get_pp_rank_microbatches(micro_batches, chunks, pipeline, p2p_communicator=link)
        layout = ParallelConfig(
            pipeline_parallel_size=pipeline, virtual_pipeline_parallel_size=chunks if chunks > 1 else None
        )
        expected = min(warmup + 1, total) * (24 // (pipeline * chunks))
        assert layers_in_flight(layout, 24, rank, micro_batches) == expected


def test_bubble():
    plain = ParallelConfig(pipeline_parallel_size=4)
    virtual = ParallelConfig(pipeline_parallel_size=4, virtual_pipeline_parallel_size=2)
    assert (bubble_to_ideal(plain, 12), bubble_fraction(plain, 12)) == (3 / 12, 3 / 15)
    assert (bubble_to_ideal(virtual, 12), bubble_fraction(virtual, 12)) == (3 / 24, 3 / 27)
    assert bubble_fraction(ParallelConfig(), 1) == 0


def test_totals_of_a_growing_run(write, valid):
    config = load_config(write(valid)).config
    plan = plan_run(config)
    base, grown = plan.stages
    assert (base.steps, grown.steps, plan.steps) == (20, 20, 40)
    assert plan.tokens == 40 * 8 * 128
    assert plan.flops == sum(flops_per_token(s.model) * 20 * 1024 for s in config.stages) == base.flops + grown.flops
    assert base.share + grown.share == pytest.approx(1)
    assert grown.flops_6nd == 6 * parameter_count(config.stages[1].model).total * 20 * 1024
    assert grown.grown_by == "direct from base: num_layers 4 -> 16; optimizer state reset"
    assert (base.world_size, base.micro_batches) == (1, 4)


WIDER = "num_layers: 16\n      hidden_size: 128\n      num_attention_heads: 8\n      num_query_groups: 4"
GROWTHS = {
    "width and depth": (
        WIDER, "{operator: identity+split, optimizer_state: carry, shares: uneven, cancelling_noise: 0.5}",
        "identity+split from base: num_layers 4 -> 16, hidden_size 64 -> 128, num_attention_heads 4 -> 8, "
        "num_query_groups 2 -> 4; optimizer state carry, shares uneven, cancelling_noise 0.5",
    ),
    "width alone": (
        "hidden_size: 128", "{operator: split, optimizer_state: carry, multipliers: true}",
        "split from base: hidden_size 64 -> 128, head_dim 16 -> 32; optimizer state carry, multipliers true",
    ),
    "default policy of an operator": (
        "ffn_hidden_size: 320", "{operator: sparkling}",
        "sparkling from base: ffn_hidden_size 160 -> 320; optimizer state asymmetric",
    ),
    "scaled epsilon": (
        "hidden_size: 128\n      head_dim: 16\n      norm_epsilon: 5.0e-6", "{operator: zero}",
        "zero from base: hidden_size 64 -> 128, norm_epsilon 1e-05 -> 5e-06; optimizer state reset",
    ),
    "layer list": (
        "num_layers: 6", "{operator: stack, layers: [0, 1, 2, 3, 2, 3]}",
        "stack by an explicit layer list from base: num_layers 4 -> 6; optimizer state reset",
    ),
    "nothing but noise": (
        "num_layers: 4", "{operator: direct, noise: 0.1}",
        "direct from base: the same geometry; optimizer state reset, noise 0.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "growth", "words"), GROWTHS.values(), ids=GROWTHS)
def test_the_operator_of_a_growth_and_what_it_changes(write, valid, model, growth, words):
    text = valid.replace("num_layers: 16", model).replace("- name: grown", f"- name: grown\n    growth: {growth}")
    plan = plan_run(load_config(write(text)).config)
    assert plan.stages[1].grown_by == words
    assert plan_to_dict(plan)["stages"][1]["grown_by"] == words
    assert f"Grown by {words}." in " ".join(render_plan(plan).split())


def test_of_a_growth_from_another_run_is_said_what_the_configuration_knows(write, valid):
    stages = "stages:\n  - name: grown\n    from: runs/base@5\n    growth: {operator: learn, learn: {steps: 30}}\n"
    text = f"{valid[: valid.index('stages:')]}{stages}    model: {{num_layers: 16}}\n    training: {{steps: 20}}\n"
    (stage,) = plan_run(load_config(write(text)).config).stages
    phase = "30 steps that learn its maps come first and are not counted here"
    assert stage.grown_by == f"learn from runs/base@5: optimizer state reset, {phase}"


def test_world_size_of_a_plan(write, valid):
    path = write(valid)
    pipeline = "stages.grown.parallel.pipeline_parallel_size=2"
    tensor = "stages.base.parallel.tensor_parallel_size=2"
    assert [s.world_size for s in plan_run(load_config(path, [pipeline, tensor]).config).stages] == [2, 2]
    given = load_config(path, [pipeline, "stages.grown.parallel.data_parallel_size=2"]).config
    assert [(s.world_size, s.data_parallel_size) for s in plan_run(given).stages] == [(4, 4), (4, 2)]
    assert (
        plan_run(load_config(path).config, 4).stages[0].ranks[0].optimizer_bytes
        < plan_run(load_config(path).config, 1).stages[0].ranks[0].optimizer_bytes
    )
    with pytest.raises(ConfigError, match="stage grown: world size 3"):
        plan_run(load_config(path, [pipeline, "training.global_batch_size=6"]).config, 3)


def test_worst_pipeline_stage_is_named(write, valid):
    config = load_config(write(valid), ["parallel.pipeline_parallel_size=4"]).config
    stage = plan_run(config).stages[1]
    assert stage.worst.pipeline_rank == 0  # it has the most micro-batches in flight
    assert [rank.has_embedding for rank in stage.ranks] == [True, False, False, False]
    assert [rank.has_output for rank in stage.ranks] == [False, False, False, True]
    assert "grown: pipeline rank 0 + embedding needs the most memory" in render_plan(plan_run(config))


def test_plan_as_json(write, valid):
    plan = plan_run(load_config(write(valid)).config)
    data = json.loads(json.dumps(plan_to_dict(plan)))
    assert data["flops"] == plan.flops
    stage = data["stages"][1]
    assert stage["parameters"] == plan.stages[1].parameters.total
    assert stage["parameters_without_embeddings"] == plan.stages[1].parameters.without_embeddings
    assert stage["ranks"][0]["total_bytes"] == plan.stages[1].ranks[0].total_bytes
    assert stage["model"]["num_layers"] == 16


def test_plan_is_plain_text_off_a_terminal(write, valid):
    plan = plan_run(load_config(write(valid)).config)
    off, on = io.StringIO(), io.StringIO()
    print_plan(plan, Console(file=off))
    print_plan(plan, Console(file=on, force_terminal=True, width=160))
    assert off.getvalue() == render_plan(plan)
    assert off.getvalue().isascii()
    assert max(map(len, off.getvalue().splitlines())) <= 132
    assert "\x1b[" in on.getvalue()
    for words in ("whole run", "MFLOP", "bubble/useful", "optimizer", "direct from base"):
        assert words in off.getvalue()
