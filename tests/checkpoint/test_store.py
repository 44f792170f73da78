"""``checkpoint.store``: checkpoints in a real server that speaks S3 (moto's, started here), and a disk that is lost."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.folder.run_directory import RunDirectory
from growth_megatron.checkpoint.folder.store import Store, StoreCopies, copy_missing, fetch_origin
from growth_megatron.errors import EXIT_OK, EXIT_USAGE, CheckpointError
from growth_megatron.train.metrics import read_metrics
from tests.command_line import Outcome, run_command
from tests.conftest import write_growing_config
from tests.pool import TIMEOUT_S

pytest.importorskip("moto", reason="needs a server that speaks S3 (PyPI: moto, flask)")
pytest.importorskip("s3fs")


class Server:
    """Moto's S3 server at one port, as a process that can be ended and started anew, then empty."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        import s3fs

        command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
                return
            except Exception:
                assert time.monotonic() < deadline, "the server does not come up"
                time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.variables.items():
            patch.setenv(name, value)
        made.start()
        yield made
        made.stop()


@pytest.fixture(scope="module")
def config(server: Server, prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_growing_config(tmp_path_factory.mktemp("store"), prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["schedule"] = {"kind": "constant", "learning_rate": 0.003}
    content["checkpoint"] = {"interval_steps": 2, "keep_last": 4, "store": "s3://bucket/run"}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    _train(config)
    return config.parent / "run"


def _train(config: Path, *overrides: str, code: int = EXIT_OK) -> Outcome:
    outcome = run_command("train", str(config), *overrides)
    assert outcome.code == code, outcome.printed
    return outcome


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run) if record["kind"] == "train"]


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in RunDirectory(run).checkpoints())


def test_the_store_holds_what_the_run_holds_and_no_more(run: Path) -> None:
    assert [str(name) for name in Store("s3://bucket/run").names()] == _names(run)
    assert len(_names(run)) == 4


def test_a_grown_checkpoint_s_linked_files_are_copied_by_the_store(run: Path, tmp_path: Path) -> None:
    copy, sent = tmp_path / "run", list[str]()
    base, grown = (copy / "checkpoints" / name for name in ("step_00000006", "step_00000006_grown"))
    assert run_command("grow", f"{run}@6", str(grown), "--set", "num_layers=4").code == EXIT_OK
    shutil.copytree(run / "checkpoints" / base.name, base)
    store = Store("s3://bucket/linked")
    put_file = store._files.put_file

    def noted(source: str, target: str, **more: Any) -> Any:
        sent.append(source)
        return put_file(source, target, **more)

    store._files.put_file = noted
    try:
        copy_missing(store, RunDirectory(copy), set())
    finally:
        store._files.put_file = put_file
    shared = {entry.sha256 for entry in read_manifest(base).files.values()}
    linked = [name for name, entry in read_manifest(grown).files.items() if entry.sha256 in shared]
    assert any(name.endswith(".distcp") for name in linked)
    assert not [name for name in linked if str(grown / name) in sent]
    store.fetch(grown.name, tmp_path / grown.name)
    assert run_command("verify", str(tmp_path / grown.name), "--full").code == EXIT_OK


def test_a_run_whose_disk_is_lost_goes_on_from_the_store(config: Path, run: Path, tmp_path: Path) -> None:
    more = "stages.grown.training.steps=6"
    shutil.copytree(run, tmp_path / "kept", symlinks=True)
    _train(config, f"run.directory={tmp_path / 'kept'}", more, "checkpoint.store=null")
    said = _train(config, f"run.directory={tmp_path / 'lost'}", more).printed
    assert "fetched step_00000010 from s3://bucket/run" in said
    assert "resuming from" in said
    assert _losses(tmp_path / "lost") == _losses(tmp_path / "kept")


def test_another_run_begins_from_a_checkpoint_of_the_store(config: Path, run: Path, tmp_path: Path) -> None:
    source = "s3://bucket/run@10"
    overrides = [f"checkpoint.resume={source}", "checkpoint.mode=branch", "checkpoint.store=null"]
    only = "stages=[{name: only, model: {num_layers: 4}, training: {steps: 2}}]"
    _train(config, f"run.directory={tmp_path / 'branch'}", only, *overrides)
    assert [step for step, _ in _losses(tmp_path / "branch")] == [11, 12]
    with pytest.raises(CheckpointError, match="s3://bucket/run@3: there are step_"):
        fetch_origin("s3://bucket/run@3", tmp_path)


def test_what_comes_damaged_is_not_taken(run: Path, tmp_path: Path) -> None:
    store = Store("s3://bucket/damaged")
    copy_missing(store, RunDirectory(run), set())
    newest = str(store.names()[-1])
    (file, *_) = [name for name in read_manifest(run / "checkpoints" / newest).files if name.endswith(".distcp")]
    path = f"bucket/damaged/checkpoints/{newest}/{file}"
    content = bytearray(store._files.cat_file(path))
    content[len(content) // 2] ^= 1
    store._files.pipe_file(path, bytes(content))
    with pytest.raises(CheckpointError, match="did not come whole"):
        store.fetch(newest, tmp_path / newest)
    assert not (tmp_path / newest).exists()


def test_a_store_that_holds_a_run_is_not_taken_for_a_new_one(config: Path, run: Path, tmp_path: Path) -> None:
    arguments = [f"run.directory={tmp_path / 'new'}", "checkpoint.resume=never"]
    assert "checkpoint.store s3://bucket/run holds a run already" in _train(config, *arguments, code=EXIT_USAGE).err
    unknown = _train(config, f"run.directory={tmp_path / 'x'}", "checkpoint.store=nowhere://a", code=EXIT_USAGE).err
    assert "nowhere://a" in unknown


def test_training_goes_on_without_its_store_and_the_same_command_copies_the_rest(
    config: Path, server: Server, tmp_path: Path
) -> None:
    """The last one: the server comes back empty."""
    run = tmp_path / "alone"
    overrides = [f"run.directory={run}", "checkpoint.store=s3://bucket/alone", "checkpoint.resume=auto"]
    _train(config, *overrides, "stages.base.training.steps=2", "stages.grown.training.steps=2")
    server.stop()
    refused = _train(config, *overrides, code=EXIT_USAGE).err
    assert "checkpoint.store s3://bucket/alone does not do what is asked" in refused
    assert "set checkpoint.store=null to go on without it" in refused
    copies = StoreCopies(Store("s3://bucket/late"), RunDirectory(run))
    copies.update()
    copies.finish(lambda: None)
    failed = copies.problem
    server.start()
    copies.finish(lambda: None)
    copies.close()
    assert (failed is None, copies.problem) == (False, None)
    assert [str(name) for name in Store("s3://bucket/late").names()] == _names(run)
    _train(config, *overrides, "stages.base.training.steps=2", "stages.grown.training.steps=2")
    assert [str(name) for name in Store("s3://bucket/alone").names()] == _names(run)
