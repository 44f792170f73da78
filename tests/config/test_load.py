"""Loading: numbers, includes, overrides, precedence, stages, the effective text and its hash."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.config.document import dump, parse
from growth_megatron.errors import ConfigError
from growth_megatron.growth.configuration import load_config
from tests.pool import TIMEOUT_S


def test_one_stage_named_main_without_stages(write, valid):
    config = load_config(write(valid[: valid.index("stages:")])).config
    assert [stage.name for stage in config.stages] == ["main"]
    assert config.stages[0].num_steps == 20
    assert config.stages[0].growth is None


def test_stage_takes_the_top_level_and_overrides_it(write, valid):
    base, grown = load_config(write(valid)).config.stages
    assert (base.model.num_layers, grown.model.num_layers) == (4, 16)
    assert base.model.hidden_size == grown.model.hidden_size == 64
    assert grown.schedule == base.schedule
    assert base.growth is None
    assert grown.growth is not None
    assert grown.growth.operator == "direct"


@pytest.mark.parametrize(("key", "other"), [("tokens", "steps"), ("steps", "tokens")])
def test_length_of_a_stage_replaces_the_inherited_kind(write, valid, key, other):
    text = valid.replace("tokens: 20_480", f"{key}: 4096").replace("  steps: 20", f"  {other}: 8192")
    training = load_config(write(text)).config.stages[1].training
    assert getattr(training, key) == 4096
    assert getattr(training, other) is None


def test_tokens_round_up_to_whole_steps(write, valid):
    stage = load_config(write(valid), ["stages.grown.training.tokens=2049"]).config.stages[1]
    assert (stage.tokens_per_step, stage.num_steps) == (1024, 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("3.", 3.0), (".5", 0.5), ("-2.5e+3", -2500.0), ("10_000", 10000), ("0x10", 16),
        ("010", 10), ("+7", 7), ("yes", "yes"), ("on", "on"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"),
        ("True", True), ("~", None), ("null", None), ("'1'", "1"), ('"1e-4"', "1e-4"), ("1e", "1e"), ("_1", "_1"),
        ("-.inf", float("-inf")), ("[1, a]", [1, "a"]), ("{a: 1e3}", {"a": 1000.0}), ("1-234*7-56", "1-234*7-56"),
    ],
)  # fmt: skip
def test_scalars_mean_what_people_expect(text, value):
    got = parse(text, "x").plain()
    assert got == value
    assert type(got) is type(value)


def test_a_float_that_is_whole_counts_as_integer(write, valid):
    assert load_config(write(valid), ["stages.grown.training.tokens=10e9"]).config.stages[1].training.tokens == 10**10


def test_includes_later_wins_and_paths_are_relative_to_the_includer(write, valid):
    write("model: {num_layers: 2, rope_base: 5e5}\nrun: {seed: 1}\n", "parts/first.yaml")
    write("base: deeper/third.yaml\nmodel: {num_layers: 3}\nrun: {seed: 2}\n", "parts/second.yaml")
    write("optimizer: {beta2: 0.99}\nmodel: {num_layers: 9}\n", "parts/deeper/third.yaml")
    text = valid.replace("  num_layers: 4\n", "").replace("  seed: 7\n", "").replace("num_layers: 16", "num_layers: 6")
    config = load_config(write("base: [parts/first.yaml, parts/second.yaml]\n" + text)).config
    assert config.stages[0].model.num_layers == 3
    assert config.stages[0].model.rope_base == 5e5
    assert config.stages[0].optimizer.beta2 == 0.99
    assert config.run.seed == 2


def test_precedence_base_file_override_and_stage(write, valid):
    write("schedule: {learning_rate: 1}\nrun: {seed: 1}\ntraining: {tokens: 999}\n", "base.yaml")
    path = write("base: base.yaml\n" + valid)
    assert load_config(path).config.run.seed == 7
    assert load_config(path).config.stages[0].training.steps == 20
    config = load_config(
        path, ["run.seed=8", "schedule.learning_rate=3e-4", "run.seed=9", "training.tokens=2048"]
    ).config
    assert config.run.seed == 9
    assert config.stages[1].schedule.learning_rate == 3e-4
    assert config.stages[0].training.steps is None
    assert config.stages[1].training.tokens == 20_480  # the stage's own


def test_a_file_may_be_included_twice_but_not_by_itself(write, valid):
    write("run: {seed: 3}\n", "common.yaml")
    write("base: common.yaml\n", "a.yaml")
    write("base: common.yaml\n", "b.yaml")
    load_config(write("base: [a.yaml, b.yaml]\n" + valid))


@pytest.mark.parametrize("stage", ["1", "grown"])
def test_override_reaches_a_stage_by_index_or_name(write, valid, stage):
    config = load_config(write(valid), [f"stages.{stage}.training.steps=5", f"stages.{stage}.parallel={{}}"]).config
    assert config.stages[1].num_steps == 5
    assert config.stages[0].num_steps == 20


def test_override_makes_sections_and_list_entries(write, valid):
    overrides = ["logging.wandb.project=p", "data.train.0.weight=2", "checkpoint.resume=must", "evaluation="]
    config = load_config(write(valid), overrides).config
    assert config.logging.wandb is not None
    assert config.logging.wandb.project == "p"
    assert config.stages[0].data.train[0].weight == 2
    assert config.checkpoint.resume == "must"


def test_empty_sections_change_nothing(write, valid):
    write("optimizer: {beta1: 0.8}\n", "base.yaml")
    text = "base: base.yaml\noptimizer:\nlogging:\n" + valid.replace("- name: base", "- name: base\n    model:")
    config = load_config(write(text)).config
    assert config.stages[0].optimizer.beta1 == 0.8
    assert config.stages[0].model.num_layers == 4


def test_anchors_and_merge_keys(write, valid):
    text = valid.replace(
        "  - name: base\n", "  - name: base\n    schedule: &slow {learning_rate: 1e-5, warmup_steps: 2}\n"
    )
    text += "    schedule: {<<: *slow, warmup_steps: 1}\n"
    schedule = load_config(write(text)).config.stages[1].schedule
    assert (schedule.learning_rate, schedule.warmup_steps) == (1e-5, 1)


def test_effective_text_states_every_value_and_loads_to_the_same(write, valid):
    write("# about the optimizer\noptimizer:\n  beta1: 0.8\n\nlogging:\n  interval_steps: 100\n", "b.yaml")
    loaded = load_config(write("base: b.yaml\n\n" + valid), ["run.seed=11", "data.tokenizer='1e4'"])
    again = load_config(write(loaded.text, "effective.yaml"))
    assert again.config == loaded.config
    assert again.hash == loaded.hash
    assert "b.yaml" not in loaded.text
    for stated in ("seed: 11", "head_dim: 16", "beta1: 0.8", "weight_decay: 0.1", "tokenizer: '1e4'", "keep_last: 2"):
        assert stated in loaded.text


def test_hash_follows_meaning_and_not_spelling(write, valid):
    plain = load_config(write(valid)).hash
    assert load_config(write("# note\n" + valid.replace("1e-3", "0.001"))).hash == plain
    assert load_config(write(valid), ["logging.interval_steps=10"]).hash == plain  # the default
    assert load_config(write(valid), ["run.seed=8"]).hash != plain


_keys = st.sampled_from(["a", "b_1", "run", "2x", "with space", "null", "#"])
_texts = st.text(st.sampled_from("a1 :-#,[]{}'\"\\&*!|>%@~.é\n\t"), max_size=8)
_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(_keys, _trees, min_size=1, max_size=4))
def test_dumped_trees_parse_to_the_same_data(data):
    source = yaml.safe_dump(data, allow_unicode=True)
    tree = parse(source, "x")
    assert parse(dump(tree.plain()), "y").plain() == tree.plain()


def test_configuration_and_plan_import_no_torch():
    modules = "growth_megatron.commands.plan_tables, growth_megatron.config.load"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)


def test_names_of_megatron_are_taken_for_ours(write, valid):
    names = "\n  make_vocab_size_divisible_by: 64\n  layernorm_epsilon: 1e-6\n  rotary_base: 5e5"
    text = valid.replace("vocab_size: 500", "vocab_size: 500" + names)
    text = text.replace("schedule:", "parallel:\n  tensor_model_parallel_size: 2\nschedule:")
    loaded = load_config(write(text), ["model.layernorm_epsilon=1e-4", "stages.base.optimizer.adam_beta2=0.99"])
    base, grown = loaded.config.stages
    assert (base.model.vocab_multiple, base.model.norm_epsilon, base.model.rope_base) == (64, 1e-4, 5e5)
    assert (base.parallel.tensor_parallel_size, base.optimizer.beta2, grown.optimizer.beta2) == (2, 0.99, 0.95)
    assert "layernorm_epsilon" not in loaded.text


def test_a_key_under_both_names_is_given_twice(write, valid):
    text = valid.replace("vocab_size: 500", "vocab_size: 500\n  rotary_base: 5e5\n  rope_base: 1e4")
    with pytest.raises(ConfigError, match=r"model\.rope_base: is given twice"):
        load_config(write(text))
