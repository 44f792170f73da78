"""Every YAML in configs/ is used: runs load and plan at the size they name, models give the paper's counts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.config.document import read
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.plan import parameter_count, plan_run
from tests.command_line import run_command

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PAPER = sorted(path for path in CONFIGS.glob("paper/*.yaml") if "Planned for" in path.read_text())
MODELS = sorted(CONFIGS.glob("models/*.yaml"))
RUNS = [CONFIGS / "quickstart.yaml", *PAPER]
COMMANDS = re.findall(r"`(configs/paper/[^`]*)`", (ROOT / "docs" / "paper.md").read_text())

EARLIER = ROOT / "tests" / "fixtures" / "earlier_version" / "run"
LAYOUTS = re.findall(r"^\|[^|]*\| ([\d,]+) \| `([^`]*)` \| (.*) \|$", (ROOT / "docs" / "layouts.md").read_text(), re.M)


def _name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RUNS, ids=_name)
def test_run_loads_and_its_effective_text_loads_to_the_same(path, tmp_path):
    loaded = load_config(path, ["run.seed=5"])
    copy = tmp_path / "config.yaml"
    copy.write_text(loaded.text)
    assert load_config(copy).config == loaded.config
    plan_run(load_config(path).config)


@pytest.mark.parametrize("path", PAPER, ids=_name)
def test_run_of_the_paper_fits_the_gpus_it_names_and_ends_where_it_says(path):
    text = path.read_text()
    gpus = re.search(r"Planned for (\d+) GPUs", text)
    assert gpus
    config = load_config(path).config
    plan = plan_run(config, int(gpus[1]))
    assert max(stage.worst.total_bytes for stage in plan.stages) < 40 * 2**30  # the smaller A100
    assert plan.stages[0].tokens_per_step == 2_097_152
    begins_from_base = config.checkpoint.mode == "branch"
    if total := re.search(r"up to (\d+)B tokens", text):
        assert plan.tokens + begins_from_base * 10e9 == pytest.approx(float(total[1]) * 1e9, rel=0.01)
    if plan.stages[-1].parameters.total == pytest.approx(1364e6, rel=0.001):
        base = 2.5e19 if begins_from_base else 0.0  # of 6 layers, or of half the width
        assert plan.flops_6nd + base == pytest.approx(8e20, rel=0.03)


def test_every_run_of_the_papers_page_is_planned_and_begins_from_another_of_the_page():
    configs = [load_config(ROOT / path, rest).config for path, *rest in map(shlex.split, COMMANDS)]
    for config in configs:
        plan_run(config)
    steps = {config.run.directory: sum(stage.num_steps for stage in config.stages) for config in configs}
    kept = {config.run.directory: config.checkpoint.keep_every_steps for config in configs}
    for config in configs:
        if config.checkpoint.mode == "branch":
            base, _, step = config.checkpoint.resume.partition("@")
            every = kept[base]
            is_kept = every is not None and int(step) % every == 0 and int(step) < steps[base]
            assert is_kept or int(step) == steps[base], config.run.directory
    assert {ROOT / shlex.split(command)[0] for command in COMMANDS} == set(PAPER)


def test_the_plan_of_a_run_that_begins_from_another_says_what_that_cost_or_that_it_is_not_there(tmp_path):
    run = str(ROOT / "configs" / "paper" / "depth_direct.yaml")
    assert "cost, which is not there" in run_command("plan", run).out
    from_here = run_command("plan", run, f"checkpoint.resume={EARLIER}@3")
    flops = read_manifest(EARLIER / "checkpoints" / "step_00000003").flops
    assert f"what {EARLIER}@3 cost, {flops:.3e} FLOPs and 384 tokens; with it" in from_here.out, from_here.printed
    assert "not counted above" not in run_command("plan", str(CONFIGS / "quickstart.yaml")).out


def test_every_layout_for_gpus_of_80_gb_fits_and_takes_the_memory_that_is_stated():
    assert len(LAYOUTS) >= 42
    for gpus, arguments, stated in LAYOUTS:
        path, _, number, *rest = shlex.split(arguments)
        assert int(number) == int(gpus.replace(",", ""))
        planned = [
            stage.worst.total_bytes / 2**30
            for stage in plan_run(load_config(ROOT / path, rest).config, int(number)).stages
        ]
        assert planned == pytest.approx([float(part) for part in stated.split(" -> ")], abs=0.06), arguments
        assert max(planned) < 60, arguments


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
