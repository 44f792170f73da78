"""Whatever happens between two file operations, the newest whole checkpoint is found and the run goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import FileEntry, read_manifest, validate_checkpoint
from growth_megatron.checkpoint.folder.run_directory import CheckpointName, RunDirectory
from growth_megatron.checkpoint.origin import existing_folder
from growth_megatron.errors import CheckpointError, ConfigError, NothingValidError
from tests.checkpoint.dying_files import DyingFiles, Killed
from tests.checkpoint.written import geometry, manifest_of

CONTENTS = {".metadata": b"m" * 40, "common.pt": b"c" * 30, "metadata.json": b"{}", "__0_0.distcp": b"d" * 300}


def save(run: RunDirectory, step: int, grown: bool = False) -> Path:
    """A save as the trainer does it, with stand-in contents that differ by step."""
    folder = run.begin(step, grown)
    for name, content in CONTENTS.items():
        run._files.write(folder / name, content + f"{step} {grown}".encode())
    return run.commit(manifest_of(geometry(2), step), grown)


def test_names_order_by_step_and_the_grown_one_is_newer() -> None:
    names = [CheckpointName(200), CheckpointName(200, True), CheckpointName(201), CheckpointName(10**9)]
    assert [str(name) for name in names[:2]] == ["step_00000200", "step_00000200_grown"]
    assert sorted({*names}) == names
    assert [CheckpointName.parse(str(name)) for name in names] == names
    for other in ("step_200", ".tmp_step_00000200", "step_00000200_other", "steps", "step_00000200\n"):
        assert CheckpointName.parse(other) is None


def test_a_committed_checkpoint_is_whole_named_and_the_latest(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.checkpoints() == []
    path = save(run, 200)
    assert path == tmp_path / "run/checkpoints/step_00000200"
    assert validate_checkpoint(path, full=True) is None
    assert set(read_manifest(path).files) == set(CONTENTS)
    assert os.readlink(tmp_path / "run/latest") == "checkpoints/step_00000200"
    grown = save(run, 200, grown=True)
    assert run.newest_valid() == (grown, ())
    assert (tmp_path / "run/latest").resolve() == grown.resolve()
    assert {item.name for item in path.parent.iterdir()} == {path.name, grown.name}


def test_sums_given_by_the_writers_are_taken_and_checked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    folder = run.begin(5)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    given = FileEntry(size_bytes=300, sha256="a" * 64)
    with pytest.raises(CheckpointError, match="lacks __1_0.distcp"):
        run.commit(manifest_of(geometry(2), 5), checksums={"__1_0.distcp": given})
    wrong = given.model_copy(update={"size_bytes": 299})
    with pytest.raises(CheckpointError, match="300 bytes but 299 were checksummed"):
        run.commit(manifest_of(geometry(2), 5), checksums={"__0_0.distcp": wrong})
    path = run.commit(manifest_of(geometry(2), 5), checksums={"__0_0.distcp": given})
    assert read_manifest(path).files["__0_0.distcp"] == given


def test_committing_what_was_not_begun_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to commit"):
        RunDirectory(tmp_path).commit(manifest_of(geometry(2), 5))


def _run_to_the_end(path: Path, files: FileOperations) -> None:
    """A small run: saves, a growth, retention, and a save over a damaged checkpoint; restartable anywhere."""
    run = RunDirectory(path, files)
    run.recover()
    choice = run.choose_resume("auto")
    done = CheckpointName.parse(choice.path.name) if choice.path else None
    for name in (CheckpointName(100), CheckpointName(200), CheckpointName(200, True), CheckpointName(300)):
        if done is None or name > done:
            save(run, name.step, name.grown)
            run.apply_retention(keep_last=2)
    run.apply_retention(keep_last=2)


def _damage(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__0_0.distcp", 3)


@pytest.mark.parametrize("begin_damaged", [False, True])
def test_killed_at_any_file_operation_the_last_good_checkpoint_is_found(tmp_path: Path, begin_damaged: bool) -> None:
    """The whole run is killed at every operation, restarted once with another kill, and then finished."""
    origin = tmp_path / "origin"
    if begin_damaged:  # step 200 is there but damaged, so that its new save replaces it
        for step in (100, 200):
            save(RunDirectory(origin), step)
        _damage(origin / "checkpoints/step_00000200")
    else:
        (origin / "checkpoints").mkdir(parents=True)

    kills = 0
    finished = False
    while not finished:
        path = tmp_path / "run"
        shutil.copytree(origin, path, symlinks=True)
        best: CheckpointName | None = CheckpointName(100) if begin_damaged else None
        for after in (kills, (7 * kills) % 23):
            try:
                _run_to_the_end(path, DyingFiles(after))
                finished = finished or after == kills
            except Killed:
                pass
            newest, _ = RunDirectory(path).newest_valid(full=True)
            found = CheckpointName.parse(newest.name) if newest else None
            # What was once committed is never lost, except to a newer one.
            assert best is None or (found is not None and found >= best)
            best = found
        _run_to_the_end(path, DyingFiles())
        left = sorted(item.name for item in (path / "checkpoints").iterdir())
        assert left == ["step_00000200_grown", "step_00000300"]
        assert all(validate_checkpoint(path / "checkpoints" / name, full=True) is None for name in left)
        assert (path / "latest").resolve().name == "step_00000300"
        assert not list(path.glob("checkpoints/.*"))
        shutil.rmtree(path)
        kills += 1
    assert kills > 60


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(tmp_path: Path) -> None:
    """The one moment when no folder has the final name: the complete temporary one then counts."""
    for after in range(60):
        path = tmp_path / str(after)
        save(RunDirectory(path), 100)
        try:
            save(RunDirectory(path, DyingFiles(after)), 100)
        except Killed:
            RunDirectory(path).recover()
        newest, skipped = RunDirectory(path).newest_valid(full=True)
        assert newest is not None
        assert skipped == ()
        assert [item.name for item in (path / "checkpoints").iterdir()] == ["step_00000100"]


def test_damaged_checkpoints_are_skipped_with_their_reasons(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = [save(run, step) for step in (100, 200, 300, 400)]
    _damage(paths[3])
    (paths[2] / "manifest.json").unlink()
    choice = run.choose_resume("auto")
    assert choice.path == paths[1]
    assert choice.manifest == read_manifest(paths[1])
    assert [item.path for item in choice.skipped] == [paths[3], paths[2]]
    assert "has 3 bytes, the manifest says 309" in choice.skipped[0].reason
    assert "did not finish" in choice.skipped[1].reason


def test_a_changed_content_is_skipped_where_the_full_check_is_asked_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first, second = save(run, 100), save(run, 200)
    content = (second / "__0_0.distcp").read_bytes()
    (second / "__0_0.distcp").write_bytes(b"D" + content[1:])
    assert run.newest_valid() == (second, ())
    newest, skipped = run.newest_valid(full=True)
    assert newest == first
    assert "does not match its checksum" in skipped[0].reason


@pytest.mark.parametrize("mode", ["auto", "must"])
def test_nothing_valid_is_an_error_of_its_own(tmp_path: Path, mode: str) -> None:
    run = RunDirectory(tmp_path)
    _damage(save(run, 100))
    with pytest.raises(NothingValidError, match="step_00000100: __0_0.distcp has 3 bytes") as caught:
        run.choose_resume(mode)
    assert caught.value.exit_code == 77


def test_resume_modes_of_an_empty_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.choose_resume("auto").path is None
    assert run.choose_resume("never").path is None
    with pytest.raises(CheckpointError, match="holds no checkpoint; set it to auto"):
        run.choose_resume("must")
    with pytest.raises(CheckpointError, match="is not a folder; allowed: auto, must, never, the path"):
        run.choose_resume("Auto")
    assert not (tmp_path / "run").exists()


def test_resume_modes_of_an_existing_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = save(run, 100)
    for mode in ("auto", "must"):
        assert run.choose_resume(mode).path == path
    with pytest.raises(ConfigError, match="holds a run already.*set it to auto to go on.*choose another run.directory"):
        run.choose_resume("never")


def test_never_refuses_a_run_that_has_only_metrics_yet(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="holds a run already"):
        RunDirectory(tmp_path).choose_resume("never")


def test_a_path_starts_the_run_which_then_goes_on_from_its_own(tmp_path: Path) -> None:
    base = save(RunDirectory(tmp_path / "base"), 100)
    run = RunDirectory(tmp_path / "run")
    for origin in (base, tmp_path / "base"):
        assert run.choose_resume(str(origin)).path == base
    own = save(run, 150)
    assert run.choose_resume(str(base)).path == own
    _damage(own)
    with pytest.raises(NothingValidError):
        run.choose_resume(str(base))


def test_a_damaged_or_empty_origin_is_refused(tmp_path: Path) -> None:
    base = save(RunDirectory(tmp_path / "base"), 100)
    _damage(base)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(CheckpointError, match="cannot resume from .*: __0_0.distcp has 3 bytes"):
        run.choose_resume(str(base))
    with pytest.raises(NothingValidError):
        run.choose_resume(str(tmp_path / "base"))
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(NothingValidError, match="it is empty"):
        run.choose_resume(str(tmp_path / "empty"))


def test_going_back_within_a_run_needs_the_newer_ones_out_of_the_way(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    first, second = save(run, 100), save(run, 100, grown=True)
    assert run.choose_resume(str(second)).path == second
    with pytest.raises(ConfigError, match=r"not the newest checkpoint of this run \(step_00000100_grown\)"):
        run.choose_resume(str(first))


def test_retention_keeps_the_last_ones_the_permanent_ones_and_the_protected(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = {step: save(run, step) for step in range(100, 1000, 100)}
    removed = run.apply_retention(keep_last=2, keep_every_steps=400, protect=[paths[300]])
    kept = {300, 400, 800, 900}
    assert {path.name for path in run.checkpoints()} == {paths[step].name for step in kept}
    assert set(removed) == {path for step, path in paths.items() if step not in kept}


def test_retention_never_counts_a_damaged_one_as_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = [save(run, step) for step in (100, 200, 300, 400)]
    _damage(paths[2])
    _damage(paths[3])
    assert run.apply_retention(keep_last=1) == (paths[0],)
    assert run.newest_valid()[0] == paths[1]


def test_retention_leaves_a_checkpoint_being_written_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (100, 200):
        save(run, step)
    folder = run.begin(300)
    (folder / "__0_0.distcp").write_bytes(b"d")
    run.apply_retention(keep_last=1)
    assert (folder / "__0_0.distcp").exists()


def test_what_a_kill_left_is_cleaned_and_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = save(run, 100)
    (run.begin(200) / "__0_0.distcp").write_bytes(b"half")
    trash = path.parent / ".trash_step_00000050"
    trash.mkdir()
    (tmp_path / "latest").unlink()
    done = run.recover()
    assert done[0].startswith("removed .tmp_step_00000200, left by an interrupted save")
    assert done[1] == "removed .trash_step_00000050, left by an interrupted removal"
    assert [item.name for item in path.parent.iterdir()] == ["step_00000100"]
    assert (tmp_path / "latest").resolve() == path.resolve()
    assert run.recover() == ()


def test_a_manifest_of_another_folder_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    """Folders that are not named like checkpoints are never resumed from, counted or removed."""
    run = RunDirectory(tmp_path)
    path = save(run, 100)
    shutil.copytree(path, path.parent / "best")
    run.apply_retention(keep_last=1)
    assert run.checkpoints() == [path]
    assert (path.parent / "best").is_dir()


def test_latest_is_followed_within_its_run_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/checkpoints/step_00000002").mkdir(parents=True)
    latest = tmp_path / "run/latest"
    latest.symlink_to("checkpoints/step_00000002")
    assert existing_folder(latest) == tmp_path / "run/checkpoints/step_00000002"
    for outside in ("../elsewhere", str(tmp_path / "elsewhere")):
        latest.unlink()
        latest.symlink_to(outside)
        with pytest.raises(CheckpointError, match="outside of its run; name that folder itself"):
            existing_folder(latest)
