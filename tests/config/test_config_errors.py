"""Wrong configurations: each gives a ConfigError that names the place and the remedy, all faults at once."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from growth_megatron.config.checks import check_world_size
from growth_megatron.errors import EXIT_USAGE, ConfigError
from growth_megatron.growth.conditions import chain_problems
from growth_megatron.growth.configuration import load_config


def _error(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


# (what is replaced in the valid file, by what, the line and key reported, words of the remedy)
WRONG = {
    "misspelt key": ("num_layers: 4", "num_layer: 4", "5: model.num_layer", "did you mean num_layers?"),
    "name of another tool": ("hidden_size: 64", "d_model: 64", "6: model.d_model", "did you mean hidden_size?"),
    "key of another section": ("  seed: 7", "  micro_batch_size: 7", "3: run.micro_batch_size", "belongs to training"),
    "key of another section that may not be meant": (
        "learning_rate: 1e-3", "learning_rate: 1e-3\noptimizer:\n  kind: adam", "19: optimizer.kind",
        "train_only, train_only_steps, freeze; kind belongs to schedule, move it there if that was",
    ),
    "key at the top level": ("run:", "num_layers: 3\nrun:", "1: num_layers", "belongs to model"),
    "synonym at the wrong place": ("  seed: 7", "  lr: 7", "3: run.lr", "did you mean schedule.learning_rate?"),
    "misspelt section": ("schedule:", "shedule:", "16: shedule", "did you mean schedule?"),
    "misspelt key in a list": ("- path: corpus", "- pth: corpus", "15: data.train.0.pth", "did you mean path?"),
    "missing key": ("  ffn_hidden_size: 160\n", "", "4: model.ffn_hidden_size", "is required and missing; add it"),
    "missing section": (
        "schedule:\n  learning_rate: 1e-3\n", "", "1: schedule", "a section with at least learning_rate",
    ),
    "text for a number": ("hidden_size: 64", "hidden_size: wide", "6: model.hidden_size", "should be a valid integer"),
    "suffix on a number": ("tokens: 20_480", "tokens: 10B", "28: stages.grown.training.tokens", "write 10e9"),
    "fraction for an integer": ("steps: 20", "steps: 2.5", "19: training.steps", "a number with a fractional part"),
    "zero": ("batch_size: 8", "batch_size: 0", "20: training.global_batch_size", "is 0; should be greater than or equ"),
    "negative": ("learning_rate: 1e-3", "learning_rate: -1e-3", "17: schedule.learning_rate", "be greater than 0"),
    "beyond float32": (
        "learning_rate: 1e-3", "learning_rate: 1e39", "17: schedule.learning_rate", "or equal to 1000000",
    ),
    "seed beyond 63 bits": ("seed: 7", f"seed: {2**63}", "3: run.seed", f"less than {2**63}"),
    "infinite": ("learning_rate: 1e-3", "learning_rate: .inf", "17: schedule.learning_rate", "a finite number"),
    "true for a number": ("num_layers: 4", "num_layers: true", "5: model.num_layers", "must be a number, not true"),
    "number for text": ("- name: base", "- name: 12", "23: stages.0.name", "put it in quotes: '12'"),
    "unknown choice": (
        "learning_rate: 1e-3", "learning_rate: 1e-3\n  kind: cosin", "18: schedule.kind", "did you mean cosine?",
    ),
    "section is no mapping": ("  seed: 7", "  seed: 7\nlogging: 3", "4: logging", "a mapping of keys"),
    "stages is no list": ("stages:\n  - name: base\n", "stages: 3\nlogging:\n", "22: stages", "should be a valid list"),
    "heads against hidden size": (
        "num_attention_heads: 4", "num_attention_heads: 6", "7: model.num_attention_heads", "set head_dim",
    ),
    "validated on what is learnt": (
        "- path: corpus", "- path: corpus\n  validation: [{path: ./corpus}]",
        "16: data.validation.0.path", "leave it out and set validation_fraction",
    ),
    "weights for some": (
        "- path: corpus", "- {path: a, weight: 2}\n    - {path: b}", "14: data.train", "give it to all, or to none",
    ),
    "odd head": ("hidden_size: 64", "hidden_size: 60", "7: model.num_attention_heads", "make it even"),
    "groups against heads": ("groups: 2", "groups: 3", "8: model.num_query_groups", "allowed: 1, 2, 4"),
    "heads against tensor parallel": (
        "data:", "parallel:\n  tensor_parallel_size: 4\ndata:", "13: parallel.tensor_parallel_size", "allowed: 1, 2",
    ),
    "layers against pipeline": (
        "data:", "parallel: {pipeline_parallel_size: 3}\ndata:",
        "12: parallel.pipeline_parallel_size", "change num_layers",
    ),
    "sequence parallel alone": (
        "data:", "parallel: {sequence_parallel: true}\ndata:", "12: parallel.sequence_parallel", "set it to false",
    ),
    "virtual without pipeline": (
        "data:", "parallel: {virtual_pipeline_parallel_size: 2}\ndata:",
        "12: parallel.virtual_pipeline_parallel_size", "raise pipeline_parallel_size",
    ),
    "batch against micro-batch": (
        "batch_size: 2", "batch_size: 3", "21: training.micro_batch_size", "allowed: 1, 2, 4",
    ),
    "both lengths": (
        "training:\n      tokens: 20_480", "training: {steps: 1, tokens: 2}",
        "27: stages.grown.training", "exactly one of the two",
    ),
    "no length": ("  steps: 20\n", "", "18: training", "exactly one of the two"),
    "warm-up too long": (
        "learning_rate: 1e-3", "learning_rate: 1e-3\n  warmup_steps: 50", "18: schedule.warmup_steps", "to 20 or less",
    ),
    "minimum above peak": (
        "learning_rate: 1e-3", "learning_rate: 1e-3\n  min_learning_rate: 1",
        "18: schedule.min_learning_rate", "lower it",
    ),
    "first stage grows": (
        "- name: base", "- name: base\n    growth: {}", "24: stages.base.growth", "remove its growth",
    ),
    "growth at the top level": ("run:", "growth: {operator: stack}\nrun:", "1: growth", "in an entry of stages"),
    "shared section in a stage": (
        "- name: base", "- name: base\n    logging: {}", "24: stages.base.logging", "move it to the top level",
    ),
    "same name twice": ("- name: grown", "- name: base", "24: stages.base.name", "give each stage its own"),
    "grown to fewer layers": ("num_layers: 16", "num_layers: 2", "26: stages.grown.model.num_layers", "those to keep"),
    "stacking to another width": (
        "num_layers: 16", "num_layers: 16\n      ffn_hidden_size: 320\n    growth: {operator: stack}",
        "27: stages.grown.model.ffn_hidden_size", "keep 160",
    ),
    "layer list of another length": (
        "- name: grown", "- name: grown\n    growth: {layers: [0, 1, 2]}",
        "25: stages.grown.growth.layers", "set num_layers to 3",
    ),
    "layer that does not exist": (
        "- name: grown", "- name: grown\n    growth: {layers: 1-23*2-9}",
        "25: stages.grown.growth.layers", "allowed: 1 to 4",
    ),
    "layer list without quotes": (
        "- name: grown", "- name: grown\n    growth: {layers: 1234}", "25: stages.grown.growth.layers", "'1234'",
    ),
    "longer than the model is for": (
        "sequence_length: 128", "sequence_length: 128\n  max_position_embeddings: 64",
        "11: model.sequence_length", "lower it, or raise that too",
    ),
    "another vocabulary": (
        "num_layers: 16", "num_layers: 16\n      vocab_size: 501",
        "27: stages.grown.model.vocab_size", "set it once, at the top level",
    ),
    "another tokenizer": (
        "num_layers: 16", "num_layers: 16\n    data: {tokenizer: other.model}",
        "27: stages.grown.data.tokenizer", "set it once, at the top level",
    ),
    "misspelt resume": (
        "  seed: 7", "  seed: 7\ncheckpoint:\n  resume: atuo", "5: checkpoint.resume", "did you mean auto?",
    ),
    "two ways of validation": (
        "- path: corpus", "- path: corpus\n  validation: [{path: x}]\n  validation_fraction: 0.1",
        "17: data.validation_fraction", "keep one of the two",
    ),
    "key given twice": ("  seed: 7", "  seed: 7\n  seed: 8", "4: run.seed", "first at run.yaml:3; keep one"),
    "not YAML": ("  seed: 7", "  seed: [7", "4", "check indentation"),
    "tab": ("  seed: 7", "\tseed: 7", "3", "no tabs"),
    "nested without end": ("  seed: 7", "  seed: " + 5000 * "[", "", "nested too deeply"),
    "number without end": ("steps: 20", "steps: " + 5000 * "9", "19: training.steps", "a finite number"),
    "tag": ("  seed: 7", "  seed: !!python/object:os.system 7", "3: run.seed", "write a plain value"),
    "alias of itself": ("  - name: base", "  - &x [*x]", "", "alias"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_wrong_file_names_place_and_remedy(write, valid, old, new, where, remedy):
    assert old in valid
    message = _error(write(valid.replace(old, new, 1)))
    place = f"run.yaml:{where}: " if where else "run.yaml: "
    lines = [line for line in message.splitlines() if line.startswith(place)]
    assert lines, message
    assert any(remedy in line for line in lines), message


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("training.stepz=5", "training.stepz", "did you mean steps?"),
        ("trainin.steps=5", "trainin", "did you mean training?"),
        ("training.steps", "'training.steps'", "section.key=value"),
        ("training..steps=4", "'training..steps=4'", "section.key=value"),
        ("training.steps=many", "training.steps", "should be a valid integer"),
        ("training.steps=[1", "not valid YAML", "quotes"),
        ("stages.gron.training.steps=5", "stages.gron.training.steps", "did you mean grown?"),
        ("stages.7.training.steps=5", "stages.7.training.steps", "indices 0 to 1"),
        ("base=other.yaml", "base", "write base: in it"),
        ("run.seed.x=5", "run.seed.x", "set it as a whole"),
        ("data.train.3.weight=2", "data.train.3.weight", "indices 0 to 0"),
    ],
)
def test_wrong_override_names_itself_and_the_remedy(write, valid, override, where, remedy):
    message = _error(write(valid), override)
    assert message.startswith(f"command line: {where}"), message
    assert remedy in message


def test_override_that_no_stage_takes_is_an_error(write, valid):
    path = write(valid.replace("- name: base\n", "- name: base\n    training: {steps: 3}\n"))
    assert "stages.base.training.steps=..." in _error(path, "training.steps=9")
    load_config(write(valid), ["training.steps=9"])  # reaches stage base


def test_override_of_a_stage_in_a_file_without_stages(write, valid):
    path = write(valid[: valid.index("stages:")])
    assert "write training.steps=..." in _error(path, "stages.main.training.steps=9")


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "1e3", "1-2", "auto", "base"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "model", "path"]), inner),
    max_leaves=4,
)
_KEYS = """
base run run.seed model model.num_layers model.head_dim model.vocab_multiple parallel parallel.data_parallel_size data
data.train data.train.0 schedule schedule.kind training training.tokens logging.wandb checkpoint.resume stages stages.0
stages.grown stages.grown.growth stages.grown.growth.layers stages.grown.name stages.1.model
"""


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(_KEYS.split()), _values), max_size=4))
def test_whatever_is_set_it_loads_or_is_a_config_error(write, valid, changes):
    with contextlib.suppress(ConfigError):
        load_config(write(valid), [f"{key}={json.dumps(value)}" for key, value in changes])


def test_all_problems_come_at_once_in_the_order_of_the_file(write, valid):
    text = valid.replace("seed: 7", "seed: x").replace("num_layers: 4", "num_layers: -4")
    text = text.replace("num_layers: 16", "num_layers: 16\n      hiden_size: 3") + "extra: 1\n"
    lines = _error(write(text), "logging.interval_steps=-1").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["command line", "logging.interval_steps"],
        ["run.yaml:3", "run.seed"],
        ["run.yaml:5", "model.num_layers"],
        ["run.yaml:27", "stages.grown.model.hiden_size"],
        ["run.yaml:30", "extra"],
    ]


def test_faults_across_stages_show_beside_faults_elsewhere(write, valid):
    text = valid.replace("seed: 7", "seed: x").replace("num_layers: 16", "num_layers: 2")
    message = _error(write(text))
    assert "run.seed" in message
    assert "stages.grown.model.num_layers" in message


def test_a_shared_fault_is_reported_once(write, valid):
    assert len(_error(write(valid.replace("hidden_size: 64", "hidden_size: wide"))).splitlines()) == 1


def test_a_misspelt_required_key_is_not_also_missing(write, valid):
    assert "missing" not in _error(write(valid.replace("num_layers: 4", "num_layer: 4")))
    assert "missing" not in _error(write(valid.replace("schedule:", "shedule:")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n", "must be a mapping"),
        ("3\n", "must be a mapping"),
    ],
)
def test_file_without_sections(write, text, words):
    message = _error(write(text))
    assert message.startswith("run.yaml:1: ")
    assert words in message


def test_missing_file_suggests_its_neighbour(write, valid, tmp_path):
    write(valid, "configs/quickstart.yaml")
    assert "did you mean configs/quickstart.yaml?" in _error("configs/quikstart.yaml")
    assert "nowhere/run.yaml: no such file or directory; give" in _error("nowhere/run.yaml")
    assert "configs: is a directory; give" in _error("configs")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in _error("binary.yaml")


def test_missing_include_names_the_line_that_wants_it(write, valid):
    write(valid, "model.yaml")
    message = _error(write("base: [modle.yaml]\n" + valid))
    assert message.startswith("run.yaml:1: base: modle.yaml: no such file or directory; did you mean model.yaml?")


def test_include_that_is_no_file_name(write, valid):
    assert "relative to this file" in _error(write("base: {a: 1}\n" + valid))


def test_includes_in_a_circle_name_the_chain(write, valid):
    write("base: sub/b.yaml\n", "a.yaml")
    write("base: ../a.yaml\n", "sub/b.yaml")
    message = _error(write("base: a.yaml\n" + valid))
    assert "a.yaml -> sub/b.yaml -> a.yaml" in message
    assert message.startswith("sub/b.yaml:1: base:")


def test_fault_in_an_included_file_names_that_file(write, valid):
    write("model:\n  num_layer: 3\n", "part.yaml")
    assert _error(write("base: part.yaml\n" + valid)).startswith("part.yaml:2: model.num_layer: ")


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"], 6, "start 4 or 8 ranks"),
        (["parallel.tensor_parallel_size=2"], 1, "start 2 ranks"),
        (["parallel.data_parallel_size=2"], 4, "start 2 ranks, or set it to 4"),
        ([], 3, "set it to 6 or 12"),
        ([], 8, "set it to 16"),
        (
            ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2",
             "training.global_batch_size=6"],
            2,
            "set it to 4 or 8",
        ),
    ],
)  # fmt: skip
def test_world_size_that_does_not_fit(write, valid, overrides, world_size, words):
    config = load_config(write(valid), overrides).config
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_world_size(config, 0, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_size_that_fits(write, valid, world_size):
    check_world_size(load_config(write(valid)).config, 1, world_size)


def test_the_chain_of_stages_made_in_code_is_checked(write, valid):
    base, grown = load_config(write(valid), ["stages.grown.growth.operator=stack"]).config.stages
    assert chain_problems((base, grown)) == []
    wide = grown.model_copy(update={"model": grown.model.model_copy(update={"hidden_size": 128})})
    ((key, text),) = chain_problems((base, wide))
    assert key == "1.model.hidden_size"
    assert "growing from stage base to grown: stack changes num_layers alone, so keep 64" in text
