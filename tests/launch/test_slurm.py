"""``launch/slurm.sbatch`` on a real Slurm of two nodes; skipped, with the reason, where that cannot be had."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from growth_megatron.errors import EXIT_USAGE
from growth_megatron.train.metrics import read_metrics
from tests.conftest import write_growing_config
from tests.launch.slurm import Slurm, install

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
GROWN_STEPS = 4


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    install()
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
    except AssertionError as error:
        cluster.close()
        pytest.skip(f"Slurm is installed and does not start here: {error}")
    with contextlib.closing(cluster) as running:
        running.environment |= {
            "NPROC": "1", "OMP_NUM_THREADS": "1", "GROWTH_MEGATRON_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        yield running


@pytest.fixture
def config(prepared_corpus: Path, tmp_path: Path) -> Path:
    """A base on one rank, of more steps than there is time for, grown for two."""
    path = write_growing_config(tmp_path, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["checkpoint"] = {"keep_last": 2}
    content["schedule"]["kind"] = "constant"
    for stage, ranks, steps in zip(content["stages"], (1, 2), (10**6, GROWN_STEPS), strict=True):
        stage["parallel"] = {"data_parallel_size": ranks}
        stage["training"]["steps"] = steps
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_job_is_requeued_at_its_time_limit_resumes_and_grows_onto_another_node(slurm: Slurm, config: Path) -> None:
    run = config.parent / "run"
    submitted = ["sbatch", "--parsable", "--nodes=1", "--time=60", str(SCRIPT), str(config)]
    first = slurm.run(*submitted).strip()
    output = slurm.folder / f"slurm-{first}.out"
    slurm.until(lambda: (run / "metrics.jsonl").exists() and len(_losses(run)) > 20, "a step")
    slurm.run("scontrol", "update", f"JobId={first}", "TimeLimit=2")  # so that 180 s before its end is now
    slurm.until(lambda: "saved before its time limit; requeued" in output.read_text(), "the requeue")
    saved = len(_losses(run))
    slurm.until(lambda: slurm.state(first) == "PENDING", "the end of the first start")
    config.write_text(config.read_text().replace(f"{10**6}", f"{saved + 3}"))
    slurm.run("scontrol", "update", f"JobId={first}", "TimeLimit=60", "StartTime=now+10")  # by itself: in 2 minutes
    slurm.completed(first)
    said = output.read_text()
    assert "SIGUSR1: asking all ranks to save and stop after this step" in said
    assert f"job {first} (start 2): 1 node(s) n1, 1 process(es) each" in said
    assert re.search(r"resuming from \S+ \(step (\d+)\)", said)
    (second,) = re.findall(r"the next stage needs 2 ranks, so job (\d+) goes on with 2 nodes", said)
    slurm.completed(second)
    said = (slurm.folder / f"slurm-{second}.out").read_text()
    assert "2 node(s) n1 n2, 1 process(es) each" in said
    assert "run complete" in said
    assert _losses(run) == sorted(_losses(run))
    assert len(_losses(run)) == saved + 3 + GROWN_STEPS
    logs = {path.name for path in (run / "logs").iterdir()}
    assert {"node_0.log", "node_1.log", "rank_0.log", "rank_1.log"} <= logs


def test_an_array_trains_one_run_for_each_task(slurm: Slurm, config: Path) -> None:
    short = ["stages.base.training.steps=3", "stages.grown.parallel.data_parallel_size=1"]
    settings = ["run.seed=%a", f"run.directory={config.parent}/seed_%a"]
    job = slurm.run("sbatch", "--parsable", "--array=1-2", str(SCRIPT), str(config), *short, *settings).strip()
    for task in (1, 2):
        slurm.completed(f"{job}_{task}")
    one, two = (
        [record["loss"] for record in read_metrics(config.parent / f"seed_{task}") if record["kind"] == "train"]
        for task in (1, 2)
    )
    assert len(one) == len(two) == 3 + GROWN_STEPS
    assert one != two
    job = slurm.run("sbatch", "--parsable", "--array=1-2", str(SCRIPT), str(config)).strip()
    slurm.until(lambda: slurm.state(f"{job}_2") == "FAILED", "the refusal")
    said = (slurm.folder / f"slurm-{job}_2.out").read_text()
    assert "the tasks of an array would share one run; add run.directory=NAME_%a" in said


def test_a_dry_run_says_ranks_and_nodes_of_each_stage_without_slurm(config: Path) -> None:
    done = _script("--dry-run", str(config))
    assert done.returncode == 0, done.stderr
    assert "stage base: 1 rank(s), 1 node(s) with 1 process(es) each" in done.stdout
    assert "stage grown: 2 rank(s), 2 node(s) with 1 process(es) each, 1 more than there are" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Trains under Slurm"),
        (["nowhere.yaml"], "no such configuration file: nowhere.yaml"),
        (["CONFIG"], "this is no Slurm job; submit it: sbatch launch/slurm.sbatch"),
    ],
)
def test_what_is_no_job_is_refused(config: Path, arguments: list[str], says: str) -> None:
    done = _script(*(word.replace("CONFIG", str(config)) for word in arguments))
    assert done.returncode == EXIT_USAGE
    assert says in done.stderr


def _losses(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run) if record["kind"] == "train"]


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"NPROC": "1", "GROWTH_MEGATRON_VENV": sys.prefix, "PATH": "/usr/bin:/bin"}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=settings, capture_output=True, text=True, check=False)
