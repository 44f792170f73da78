"""The command line as users see it: help with examples, and for every mistake exit code 2 and a line that helps."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron import __version__
from growth_megatron.__main__ import main, parser_for
from growth_megatron.commands import COMMANDS
from growth_megatron.errors import EXIT_NOTHING_VALID, EXIT_OK, EXIT_USAGE
from tests.checkpoint.written import geometry, manifest_of, write_checkpoint
from tests.command_line import Outcome, run_command, run_commands, start_command
from tests.pool import ROOT, TIMEOUT_S, environment

Content = dict[str, Any]
Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process; for those that end before any process group would start."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def _helps(outcome: Outcome, *words: str) -> None:
    assert outcome.code == EXIT_USAGE, outcome
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == EXIT_OK
    examples = [line.strip() for line in outcome.out.split("examples:\n")[1].splitlines()]
    assert examples
    for example in examples:
        arguments = shlex.split(example.split("growth-megatron ")[-1].split("-m growth_megatron ")[-1])
        assert arguments[0] == command
        parser_for(arguments).parse_args(arguments)


def test_the_help_of_all_lists_every_subcommand_and_the_exit_codes(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == EXIT_OK
    for words in (*COMMANDS, "75", "76", "77"):
        assert words in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SUBCOMMAND"),
        (["trian", "c.yaml"], "invalid choice: 'trian'"),
        (["train"], "CONFIG.yaml"),
        (["grow", "a"], "TARGET"),
        (["grow", "a", "b", "--optimizer-state", "keep"], "'reset', 'carry'"),
        (["grow", "a", "b", "--operator", "widen"], "'widen' is no operator"),
        (["plan", "c.yaml", "--world-size", "two"], "--world-size"),
        (["verify", "a", "--deep"], "--deep"),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, arguments: list[str], words: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == EXIT_USAGE
    assert words in outcome.err


def _without(content: Content, section: str, key: str) -> None:
    del content[section][key]


# (change of a sound configuration, text of the line that is named, or None; key; words of the remedy)
WRONG: dict[str, tuple[Callable[[Content], None], str | None, str, str]] = {
    "misspelt key": (
        lambda c: c["model"].update(hiden_size=c["model"].pop("hidden_size")),
        "hiden_size", "model.hiden_size", "did you mean hidden_size?",
    ),
    "misspelt section": (
        lambda c: c.update(shedule=c.pop("schedule")), "shedule:", "shedule", "did you mean schedule?",
    ),
    "misspelt choice": (
        lambda c: c["training"].update(precision="bf61"), "precision:", "training.precision", "did you mean bf16?",
    ),
    "wrong type": (
        lambda c: c["model"].update(hidden_size="wide"), "hidden_size: wide", "model.hidden_size", "a valid integer",
    ),
    "fraction of a layer": (
        lambda c: c["stages"][0]["model"].update(num_layers=2.5), "num_layers: 2.5", "stages.base.model.num_layers",
        "a valid integer",
    ),
    "missing key": (lambda c: _without(c, "model", "vocab_size"), None, "stages.base.model.vocab_size", "add it"),
    "heads against hidden size": (
        lambda c: c["model"].update(num_attention_heads=6), "num_attention_heads", "model.num_attention_heads",
        "set head_dim",
    ),
    "heads against tensor parallel": (
        lambda c: c.update(parallel={"tensor_parallel_size": 3}), "tensor_parallel_size",
        "parallel.tensor_parallel_size", "allowed: 1, 2",
    ),
    "layers against pipeline": (
        lambda c: c.update(parallel={"pipeline_parallel_size": 3}), "pipeline_parallel_size",
        "parallel.pipeline_parallel_size", "change num_layers",
    ),
    "batch against micro-batch": (
        lambda c: c["training"].update(micro_batch_size=3), "micro_batch_size", "training.micro_batch_size",
        "allowed: 1, 2, 4, 8",
    ),
    "growth to another width": (
        lambda c: c["stages"][1]["model"].update(hidden_size=128), "hidden_size: 128",
        "stages.grown.model.hidden_size", "keep 64",
    ),
    "growth to fewer layers": (
        lambda c: c["stages"][1]["model"].update(num_layers=1), "num_layers: 1", "stages.grown.model.num_layers",
        "growth.layers",
    ),
    "layer that is not there": (
        lambda c: c["stages"][1]["growth"].update(layers="1-23*1"), "layers: 1-23", "stages.grown.growth.layers",
        "allowed: 1 to 2",
    ),
    "no length": (lambda c: _without(c["stages"][0], "training", "steps"), None, "stages.base.training", "exactly one"),
    "misspelt resume": (
        lambda c: c["checkpoint"].update(resume="msut"), "resume:", "checkpoint.resume", "did you mean must?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(("change", "text", "key", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_configuration_names_file_line_key_and_remedy(
    run: Run, growing_config: Path, command: str, change: Any, text: str | None, key: str, remedy: str
) -> None:
    content = yaml.safe_load(growing_config.read_text())
    change(content)
    growing_config.write_text(yaml.safe_dump(content, sort_keys=False))
    outcome = run(command, growing_config)
    _helps(outcome, remedy)
    place = f"{growing_config}:"
    if text is not None:
        written = growing_config.read_text()
        place += f"{written[: written.index(text)].count(chr(10)) + 1}: "
    assert any(place in line and key in line and remedy in line for line in outcome.err.splitlines()), outcome.err
    assert not (growing_config.parent / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=5", "command line: training.stepz: unknown key; did you mean steps?"),
        ("stages.gron.training.steps=5", "did you mean grown?"),
        ("training.steps", "write section.key=value"),
        ("schedule.learning_rate=-1", "greater than 0"),
    ],
)
def test_a_wrong_override_says_so(run: Run, growing_config: Path, override: str, words: str) -> None:
    _helps(run("train", growing_config, override), words)


def test_a_missing_configuration_suggests_its_neighbour(run: Run, growing_config: Path) -> None:
    _helps(
        run("train", growing_config.parent / "confg.yaml"), "no such file or directory; did you mean", "config.yaml?"
    )
    _helps(run("plan", growing_config.parent), "is a directory; give the path of a YAML file")


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (3, ["parallel.tensor_parallel_size=2"], "world size 3 is not a multiple of tensor_parallel_size 2"),
        (3, [], "training.global_batch_size 8 is not a multiple of micro_batch_size 2 x data-parallel size 3"),
        (4, ["parallel.data_parallel_size=2"], "start 2 ranks, or set it to 4"),
    ],
)
def test_a_world_size_that_does_not_fit(
    run: Run, growing_config: Path, world_size: int, overrides: list[str], words: str
) -> None:
    _helps(run("plan", growing_config, *overrides, "--gpus", world_size), words)


def test_train_checks_the_world_size_before_it_waits_for_other_ranks(growing_config: Path) -> None:
    # Nobody listens at this address: joining a process group would wait, then fail with a traceback.
    torchrun = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    outcome = run_command("train", str(growing_config), **torchrun)
    _helps(outcome, "set it to 6 or 12")
    assert not (growing_config.parent / "run").exists()


def test_only_rank_zero_tells(run: Run, growing_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    outcome = run("plan", growing_config, "training.stepz=5")
    assert (outcome.code, outcome.err) == (EXIT_USAGE, "")


_IMPORTED = """
import sys
from growth_megatron.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code or 0
print([name for name in ("torch", "megatron", "numpy", "lm_eval") if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def _run_without_torch(*arguments: str) -> str:
    """What a command prints in a process of its own that must not load torch."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED, *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    return done.stdout


def test_plan_ends_as_training_would_where_the_vocabularies_do_not_fit(
    run: Run, growing_config: Path, prepared_corpus: Path, tmp_path: Path
) -> None:
    for name, words in (
        ("model.vocab_size=100", "pieces, the model's vocab_size is 100; set model.vocab_size to"),
        (f"data.tokenizer={tmp_path / 'none.model'}", "does not exist; give a SentencePiece model"),
    ):
        planned, trained = (run(command, growing_config, name) for command in ("plan", "train"))
        _helps(planned, words)
        assert planned.err.replace("plan: ", "train: ") in trained.err
        assert "Memory per rank" in planned.out
    nowhere = f"data.train.0.path={tmp_path / 'none'}"  # as on a machine without the data
    outcome = run("plan", growing_config, nowhere, "model.vocab_size=100")
    assert outcome.code == EXIT_OK
    assert "shares and epochs are not known yet" in outcome.out


def test_plan_and_help_need_no_torch(growing_config: Path) -> None:
    plan = json.loads(_run_without_torch("plan", str(growing_config), "--json"))
    assert [stage["name"] for stage in plan["stages"]] == ["base", "grown"]
    assert "SUBCOMMAND" in _run_without_torch("--help")
    assert "is Python code, which is run" in " ".join(_run_without_torch("evaluate", "--help").split())
    assert "lines of standard input" in _run_without_torch("sample", "--help")
    assert _run_without_torch("--version") == f"growth-megatron {__version__}\n"


def test_report_and_watch_need_no_torch(tmp_path: Path) -> None:
    numbers = {"step": 1, "stage_step": 1, "consumed_tokens": 8, "consumed_samples": 1, "flops": 1e6, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "stage": "base", **numbers}) + "\n")
    assert "2.500" in _run_without_torch("report", str(tmp_path))
    assert "base" in (tmp_path / "report.html").read_text()
    assert "2.5000" in _run_without_torch("watch", str(tmp_path), "--once")


def test_plan_grow_says_where_it_went(run: Run) -> None:
    _helps(run("plan", "grow", "runs/a", "--set", "num_layers=4"), "growth-megatron grow SOURCE [TARGET] --plan")


def test_a_closed_pipe_is_no_fault(growing_config: Path) -> None:
    command = f"{sys.executable} -m growth_megatron plan {growing_config} --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_run_finds_wrong_when_it_starts(growing_config: Path, prepared_corpus: Path, tmp_path: Path) -> None:
    """Faults that show when files are opened: each ends with 2, and what they leave does not stop the next try."""
    other = tmp_path / "other"
    write_checkpoint(other, geometry(2), manifest_of(geometry(2)))
    (tmp_path / "empty_run" / "checkpoints").mkdir(parents=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(other, damaged)
    (damaged / "common.pt").unlink()
    (tmp_path / "not_a_model").write_text("text")
    cut = tmp_path / "cut"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prepared_corpus / f"train{suffix}", f"{cut}{suffix}")
    Path(f"{cut}.bin").write_bytes(Path(f"{cut}.bin").read_bytes()[:-10])
    cases: list[tuple[list[str], tuple[str, ...]]] = [
        (["data.train.0.path=nowhere"], ("nowhere.bin", "prepare-data")),
        ([f"data.validation.0.path={tmp_path}/none"], ("none.bin", "data.validation")),
        ([f"data.train.0.path={cut}"], ("truncated", "prepare the data again")),
        (["data.tokenizer=nowhere.model"], ("nowhere.model", "train-tokenizer")),
        ([f"data.tokenizer={tmp_path}/not_a_model"], ("not an intact SentencePiece model",)),
        (["model.vocab_size=200"], ("tokenizer", "300", "set model.vocab_size to 300")),
        (["checkpoint.resume=must"], ("holds no checkpoint", "set it to auto")),
        ([f"checkpoint.resume={tmp_path}/gone"], ("gone is not a folder", "auto, must, never")),
        ([f"checkpoint.resume={damaged}"], ("cannot resume from", "common.pt is missing")),
        ([f"checkpoint.resume={other}"], ("holds another model than stage base", "hidden_size 8 -> 64", "grow")),
        (["data.train.0.weight=0"], ("data.train.0.weight", "greater than 0")),
    ]
    commands = [["train", str(growing_config), *overrides] for overrides, _ in cases]
    outcomes = run_commands([*commands, ["train", str(growing_config), "stages.base.training.steps=2"]])
    for (overrides, words), outcome in zip(cases, outcomes[:-1], strict=True):
        assert outcome.code == EXIT_USAGE, (overrides, outcome)
        assert "Traceback" not in outcome.err
        for word in words:
            assert word in outcome.err, (overrides, outcome.err)
    assert outcomes[-1].code == EXIT_OK, outcomes[-1]


def test_a_corpus_without_text(run: Run, prepared_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    tokenizer, output = prepared_corpus / "tokenizer.model", tmp_path / "out"
    prepare = ("--tokenizer", tokenizer, "--output", output, "--workers", "1")
    cases = [
        (("prepare-data", tmp_path / "empty", *prepare), "no text files under"),
        (("prepare-data", tmp_path / "blank", *prepare), "the corpus is empty"),
        (("prepare-data", tmp_path / "nowhere", *prepare), "does not exist"),
        (("prepare-data", tmp_path / "image.png", *prepare), "not a kind of text file"),
        (("prepare-data", tmp_path / "a.jsonl", *prepare), "--text-field"),
        (("prepare-data", prepared_corpus / "text_train", *prepare[:-1], "0"), "use 1 or more"),
        (("train-tokenizer", tmp_path / "blank", "--output", output, "--vocab-size", "300"), "the corpus is empty"),
        (
            ("train-tokenizer", prepared_corpus / "text_train", "--output", tokenizer, "--vocab-size", "300"),
            "overwrite",
        ),
    ]
    for arguments, words in cases:
        _helps(run(*arguments), words)
    assert not list(tmp_path.glob("out*"))


def test_checkpoint_commands(run: Run, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        write_checkpoint(checkpoints / f"step_{step:08d}", geometry(2), manifest_of(geometry(2), step))
    (tmp_path / "run" / "latest").symlink_to("checkpoints/step_00000020")
    shown = run("inspect", tmp_path / "run" / "latest")
    assert (shown.code, "step 20" in shown.out) == (EXIT_OK, True)
    assert json.loads(run("inspect", tmp_path / "run", "--json").out)["step"] == 20
    shown = run("inspect", tmp_path / "run", "--tensor", "output_layer.weight")
    assert (shown.code, "32 x 8, bfloat16" in shown.out) == (EXIT_OK, True)
    assert json.loads(run("inspect", tmp_path / "run", "--tensor", "output_layer.weight", "--json").out)["zeros"] == 0
    _helps(run("inspect", tmp_path / "run", "--tensor", "output.weight"), "did you mean output_layer.weight?")
    assert run("verify", tmp_path / "run", "--full").out.count("OK") == 2
    assert json.loads(run("verify", tmp_path / "run", "--json").out)["ok"] is True
    plan = run("grow", tmp_path / "run", tmp_path / "b", "--layers", "1-12*2", "--plan")
    assert (plan.code, "nothing was written" in plan.out) == (EXIT_OK, True)
    plan = run("grow", tmp_path / "run", "--layers", "1-12*2", "--plan", "--json")
    assert (plan.code, json.loads(plan.out)["executor"]) == (EXIT_OK, "link")
    _helps(run("grow", tmp_path / "run", tmp_path / "b", "--layers", "1-12*2", "--json"), "add --plan")
    assert run("grow", tmp_path / "run", tmp_path / "b", "--set", "num_layers=4").code == EXIT_OK
    assert run("verify", tmp_path / "b").code == EXIT_OK
    _helps(run("grow", tmp_path / "run", tmp_path / "b", "--set", "num_layers=4"), "exists; name a new folder")
    _helps(run("grow", tmp_path / "run", tmp_path / "c"), "--set num_layers=24")
    _helps(run("grow", tmp_path / "run", tmp_path / "c", "--set", "num_layer=4"), "did you mean num_layers?")
    _helps(run("inspect", tmp_path / "nowhere"), "does not exist")
    (checkpoints / "step_00000020" / "common.pt").unlink()
    one = run("verify", tmp_path / "run" / "latest")
    _helps(one, "damaged")
    assert one.out.startswith("FAILED")
    (checkpoints / "step_00000010" / "common.pt").unlink()
    assert run("verify", tmp_path / "run").code == EXIT_NOTHING_VALID


def test_report_of_no_run(run: Run, tmp_path: Path) -> None:
    _helps(run("report", tmp_path / "nowhere"), "metrics.jsonl does not exist")


def test_as_a_process_a_mistake_ends_with_2_and_one_line(growing_config: Path) -> None:
    outcome = start_command("train", str(growing_config), "trainin.steps=5")
    assert outcome.code == EXIT_USAGE
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("growth-megatron train: command line: trainin: ")
    assert "did you mean training?" in line


@pytest.mark.parametrize("command", ["prepare-data", "import-megatron"])
def test_as_a_process_a_command_that_loads_megatron_core_shows_none_of_its_warnings(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "growth_megatron", command, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_overrides_may_stand_behind_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    assert main(["plan", config, "run.seed=1", "--gpus", "1", "--json", "stages.base.training.steps=77"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["stages"][0]["steps"] == 77
    with pytest.raises(SystemExit) as ended:
        main(["plan", config, "--gpus", "1", "steps"])
    assert ended.value.code == EXIT_USAGE
    assert "unrecognized arguments: steps" in capsys.readouterr().err
