"""Every YAML in configs/ is used: experiments load and plan at the size they name, models give the paper's counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from growth_megatron.config.document import read
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.plan import parameter_count, plan_run

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("experiments/*.yaml"))
MODELS = sorted(CONFIGS.glob("models/*.yaml"))
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("models", "recipes"))


def _name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RUNS, ids=_name)
def test_run_loads_and_its_effective_text_loads_to_the_same(path, tmp_path):
    loaded = load_config(path, ["run.seed=5"])
    copy = tmp_path / "config.yaml"
    copy.write_text(loaded.text)
    assert load_config(copy).config == loaded.config
    plan_run(load_config(path).config)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=_name)
def test_experiment_fits_the_gpus_it_names(path):
    text = path.read_text()
    gpus = re.search(r"Planned for (\d+) GPUs", text)
    total = re.search(r"up to (\d+)B tokens", text)
    assert gpus
    assert total
    plan = plan_run(load_config(path).config, int(gpus[1]))
    assert max(stage.worst.total_bytes for stage in plan.stages) < 40 * 2**30  # the smaller A100
    assert plan.tokens == pytest.approx(float(total[1]) * 1e9, rel=0.01)
    assert plan.stages[0].tokens == pytest.approx(10e9, rel=0.05)
    base, grown = (stage.model for stage in plan.stages)
    wider = path.stem.startswith("gsplit")
    assert grown.num_layers == base.num_layers * (1 if wider else 4)
    assert grown.hidden_size == base.hidden_size * (2 if wider else 1)
    assert plan.stages[0].tokens_per_step == 2_097_152


@pytest.mark.parametrize("path", MODELS, ids=_name)
def test_model_has_the_parameters_it_states(path, tmp_path):
    stated = re.search(r"(\d+)M parameters", path.read_text())
    assert stated
    rest = "run: {directory: x}\ndata: {tokenizer: t, train: [{path: d}]}\nschedule: {learning_rate: 1}\n"
    rest += "training: {steps: 1, global_batch_size: 1}\n"
    (tmp_path / "run.yaml").write_text(f"base: {path}\n{rest}")
    model = load_config(tmp_path / "run.yaml").config.stages[0].model
    assert parameter_count(model).total == pytest.approx(int(stated[1]) * 1e6, abs=0.6e6)


def test_every_fragment_is_included_by_a_run():
    included = set()
    for path in RUNS:
        base = read(path).child("base")
        names = base.plain() if base else []
        for name in [names] if isinstance(names, str) else names:
            included.add((path.parent / name).resolve())
    fragments = {path.resolve() for path in CONFIGS.rglob("*.yaml")} - {path.resolve() for path in RUNS}
    assert fragments <= included
