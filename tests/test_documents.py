"""README and docs/ hold: their commands run, what is generated is up to date, the site has no dead link."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from growth_megatron.config.document import read
from tests.documents import PAGES, blocks, prepare_checkout, prepare_run, run_shell
from tests.evaluate.small_tasks import write_tasks
from tests.pool import ROOT, TIMEOUT_S, environment
from tools.draw_operators import drawings
from tools.write_reference import reference

SHELL = "bash"
NOT_RUN = {
    "configs/nine_way_": "one of the experiments, in their folder",
    "tools/experiments/run.py all": "it trains for two hours; tests/tools/test_experiments.py runs its driver",
    "bash launch/quickstart.sh": "downloads and minutes; the folder of these tests has what it leaves, in small",
    "bash tests/run.sh": "is what runs these tests",
    "run.directory=runs/two": "a whole run of two ranks, and my.yaml is one; tests/launch runs the script",
    "--wandb PROJECT": "an account of wandb",
    "NNODES=2": "two nodes; tests/launch runs the script",
    "slurm.sbatch": "Slurm; tests/launch has one",
    "docker ": "Docker",
    "slimpajama/": "900 GB",
    "iter_0010000": "a checkpoint of Megatron-LM; tests/checkpoint/test_import_megatron.py has some",
    "arc_easy,sciq": "the hub",
    "fetch_benchmarks.py": "106 MB of network",
    "--tasks growth_paper": "needs what fetch_benchmarks.py brings",
    "runs/stack_1": "six runs; tests/report/test_compare.py has them",
}
"""Part of a command that is not run, and why."""

SHELL_BLOCKS = [block for page in PAGES for block in blocks(page) if block.language == SHELL]
COMMANDS = [command for block in SHELL_BLOCKS for command in block.commands]


def _not_run(command: str) -> list[str]:
    return [part for part in NOT_RUN if part in command]


@pytest.fixture(scope="module")
def checkout(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in small after the quickstart, for pages to begin from a copy of."""
    folder = tmp_path_factory.mktemp("documents") / "checkout"
    prepare_checkout(folder, prepared_corpus)
    prepare_run(folder)
    write_tasks(folder / "tasks")
    return folder


def _page_id(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_every_block_says_what_it_is_written_in(page: Path) -> None:
    for block in blocks(page):
        assert block.language in (SHELL, "yaml", "python", "text"), f"{page.name}:{block.line}: {block.language!r}"
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "text":
            assert not re.search(r"^(growth-megatron|bash|python) ", block.text, re.MULTILINE), (
                f"{page.name}:{block.line}"
            )


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL_BLOCKS}), ids=_page_id)
def test_the_commands_of_a_page_run_in_a_new_shell(page: Path, checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, symlinks=True)
    (folder / ".venv" / "bin" / "activate").write_text(f"export PATH={folder / '.venv' / 'bin'}:$PATH\n")
    script = []
    for block in blocks(page):
        if block.language == "yaml" and (name := re.match(r"# (\w+\.yaml)", block.text)):
            (folder / name[1]).write_text(block.text)
        if block.language == SHELL:
            script += [command for command in block.commands if not _not_run(command)]
    outcome = run_shell(folder, "\n".join(f"echo {_quoted(command)}\n{command}" for command in script))
    assert outcome.returncode == 0, f"{page.name}, the last command:\n{outcome.stdout[-4000:]}"


def _quoted(command: str) -> str:
    return "'+ " + command.replace("'", "'\\''") + "'"


def test_a_page_whose_command_fails_is_noticed(checkout: Path) -> None:
    assert run_shell(checkout, "growth-megatron --version").returncode != 0  # not before source .venv/bin/activate
    activated = "source .venv/bin/activate\n"
    assert run_shell(checkout, activated + "growth-megatron --version").returncode == 0
    assert run_shell(checkout, activated + "growth-megatron plan no_such.yaml\ntrue").returncode == 2


def test_every_reason_for_not_running_a_command_is_needed() -> None:
    assert {part for command in COMMANDS for part in _not_run(command)} == set(NOT_RUN)


def test_the_examples_are_those_of_the_page() -> None:
    page = ROOT / "docs" / "python.md"
    shown = [block.text for block in blocks(page) if block.language == "python"]
    assert sorted(shown) == sorted(path.read_text() for path in (ROOT / "docs" / "examples").glob("*.py"))


def test_the_reference_and_the_drawings_are_what_the_code_gives() -> None:
    for name, content in reference().items():
        assert (ROOT / "docs" / name).read_text() == content, f"docs/{name}: run python tools/write_reference.py"


def test_every_option_is_described() -> None:
    rows = [line for line in (ROOT / "docs" / "options.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []
    folder = ROOT / "docs" / "drawings"
    assert {path.name: path.read_text() for path in folder.iterdir()} == drawings(), (
        "run python tools/draw_operators.py"
    )


def test_every_shipped_configuration_fits_the_json_schema_and_a_mistyped_one_does_not() -> None:
    schema = jsonschema.Draft202012Validator(yaml.safe_load(reference()["schema.json"]))
    schema.check_schema(schema.schema)
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        assert not list(schema.iter_errors(read(path).plain())), path
    for wrong in ({"model": {"num_layer": 3}}, {"training": {"steps": -1}}, {"growth": {"shares": "odd"}}):
        assert list(schema.iter_errors(wrong)), wrong


def test_the_site_builds_and_no_link_leads_nowhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert built.returncode == 0, built.stdout + built.stderr
    front = (tmp_path / "site" / "index.html").read_text()
    assert "comparison.png" in front
    assert (tmp_path / "site" / "quickstart_loss.png").is_file()
    assert "http" not in "".join(re.findall(r'<(?:script|link)[^>]+(?:src|href)="(?!\.)([^"]+)"', front))
