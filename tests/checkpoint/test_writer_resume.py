"""A write that is killed goes on where it was, and the result is bitwise that of one that was not."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.checkpoint.folder import commit
from growth_megatron.checkpoint.folder.commit import (
    JOURNAL_FOLDER,
    begin_folder,
    recover_folder,
    temporary_path,
)
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import validate_checkpoint
from growth_megatron.checkpoint.folder.run_directory import RunDirectory
from growth_megatron.checkpoint.torch_dist.journal import UNFINISHED_FOLDER
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from tests.checkpoint.dying_files import DyingFiles, Killed
from tests.checkpoint.write_jobs import ComputedSource, assert_holds, write
from tests.checkpoint.written import geometry
from tests.pool import environment, pool
from tests.ranks import run_ranks

MODEL = geometry(3)


class KilledAfter(ComputedSource):
    """A source that dies, as if killed, at one of its reads."""

    def __init__(self, reads: int) -> None:
        super().__init__(MODEL)
        self._reads_left = reads

    def read(self, key: str, region: Any) -> Any:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise Killed
        return super().read(key, region)


def attempt(target: Path, reads: int = 150, **options: Any) -> Path:
    """An attempt that dies; its temporary folder."""
    with pytest.raises(Killed):
        write(target, KilledAfter(reads), **options)
    return temporary_path(target)


def data_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.distcp")}


def test_what_is_complete_is_not_read_or_written_again(tmp_path: Path) -> None:
    temporary = attempt(tmp_path / "a")
    done = data_files(temporary)
    stamps = {name: (temporary / name).stat().st_mtime_ns for name in done}
    assert len(done) > 3
    source = ComputedSource(MODEL)
    result = write(tmp_path / "a", source)
    assert_holds(tmp_path / "a", ComputedSource(MODEL))
    assert validate_checkpoint(tmp_path / "a", full=True) is None
    assert done < data_files(tmp_path / "a")
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in done} == stamps
    assert result.bytes_resumed == sum((tmp_path / "a" / name).stat().st_size for name in done)
    everything = ComputedSource(MODEL)
    whole = write(tmp_path / "b", everything)
    assert whole.bytes_resumed == 0
    assert len(everything.reads) - 150 <= len(source.reads) < len(everything.reads)
    assert [path.name for path in (tmp_path / "a").iterdir() if path.name.startswith(".")] == [".metadata"]


def test_progress_begins_with_what_was_done(tmp_path: Path) -> None:
    attempt(tmp_path / "a")
    reported: list[tuple[int, int]] = []
    write(tmp_path / "a", progress=lambda done, in_all: reported.append((done, in_all)))
    assert 0 < reported[0][0] < reported[0][1]
    assert reported[-1][0] == reported[-1][1] == reported[0][1]


@pytest.mark.parametrize("writers", [1, 4])
def test_other_numbers_of_writers_go_on_too(tmp_path: Path, writers: int) -> None:
    done = data_files(attempt(tmp_path / "a"))
    write(tmp_path / "a", writers=writers)
    assert done < data_files(tmp_path / "a")
    assert_holds(tmp_path / "a", ComputedSource(MODEL))


def test_another_job_starts_anew(tmp_path: Path) -> None:
    attempt(tmp_path / "a")
    assert write(tmp_path / "a", fingerprint="another").bytes_resumed == 0
    assert_holds(tmp_path / "a", ComputedSource(MODEL))


def test_chunks_of_another_size_are_not_mixed_in(tmp_path: Path) -> None:
    attempt(tmp_path / "a")
    write(tmp_path / "a", chunk_bytes=5000)
    assert_holds(tmp_path / "a", ComputedSource(MODEL))
    write(tmp_path / "b", chunk_bytes=5000)
    chunks = [DistCheckpoint(tmp_path / name).metadata.state_dict_metadata for name in "ab"]
    assert chunks[0] == chunks[1]


def first_journal(temporary: Path) -> Path:
    return min((temporary / JOURNAL_FOLDER).iterdir())


def test_files_and_notes_that_are_not_sound_are_written_again(tmp_path: Path) -> None:
    """Each kind of damage costs the one file it concerns."""
    whole = len(data_files(attempt(tmp_path / "whole")))

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def other_place(journal: Path) -> None:
        note = json.loads(journal.read_bytes())
        note["items"][0][1] = [10**6] * len(note["items"][0][1] or [0])
        journal.write_text(json.dumps(note))

    damages: dict[str, Any] = {
        "content": lambda journal, data: flip(data),
        "length": lambda journal, data: data.write_bytes(data.read_bytes() + b"x"),
        "no data": lambda journal, data: data.unlink(),
        "no journal": lambda journal, data: journal.unlink(),
        "half a journal": lambda journal, data: journal.write_bytes(journal.read_bytes()[:50]),
        "not json of ours": lambda journal, data: journal.write_text("[1, 2]"),
        "an item not planned": lambda journal, data: other_place(journal),
    }
    for name, damage in damages.items():
        temporary = attempt(tmp_path / name)
        journal = first_journal(temporary)
        before = data_files(temporary)
        damage(journal, temporary / journal.name.removesuffix(".json"))
        result = write(tmp_path / name)
        assert_holds(tmp_path / name, ComputedSource(MODEL))
        assert validate_checkpoint(tmp_path / name, full=True) is None, name
        assert result.bytes_resumed > 0, name
        assert len(before) > 3
    assert whole > 3


def test_two_notes_of_the_same_rows_do_not_both_count(tmp_path: Path) -> None:
    temporary = attempt(tmp_path / "a")
    journal = first_journal(temporary)
    name = journal.name.removesuffix(".json")
    (temporary / "__7_0.distcp").write_bytes((temporary / name).read_bytes())
    (temporary / JOURNAL_FOLDER / "__7_0.distcp.json").write_bytes(journal.read_bytes())
    write(tmp_path / "a")
    assert "__7_0.distcp" not in data_files(tmp_path / "a")
    assert_holds(tmp_path / "a", ComputedSource(MODEL))


def test_a_kill_between_any_two_file_operations(tmp_path: Path) -> None:
    """Including those of the commit: what is found afterwards is the whole checkpoint, or one that goes on."""
    steps, resumed, committed = 0, 0, 0
    model = geometry(1)
    options: dict[str, Any] = {"model": model, "writers": 1, "chunk_bytes": 1000, "file_bytes": 6000}
    while True:
        target = tmp_path / f"t{steps}"
        try:
            write(target, files=DyingFiles(steps), **options)
        except Killed:
            pass
        else:
            break
        temporary = temporary_path(target)
        if steps % 3 == 0 and temporary.exists():
            recover_folder(temporary, FileOperations())
        if target.exists():
            committed += 1
            assert not temporary.exists()
        else:
            resumed += write(target, files=DyingFiles(), **options).bytes_resumed > 0
        assert validate_checkpoint(target, full=True) is None, steps
        assert_holds(target, ComputedSource(model))
        assert not any(path.is_dir() for path in target.iterdir()), steps
        steps += 1
    assert steps > 20
    assert resumed > 10
    assert committed > 0


def test_training_that_starts_keeps_an_unfinished_growth_and_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    temporary = attempt(run.checkpoint_path(200, grown=True))
    (said,) = run.recover()
    assert said.startswith(
        f"kept {temporary.name}, an unfinished growth of which {len(data_files(temporary))} data files"
    )
    assert write(run.checkpoint_path(200, grown=True)).bytes_resumed > 0
    assert run.recover() == ()


def test_training_that_starts_removes_what_can_not_go_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    temporary = attempt(run.checkpoint_path(200), reads=1)  # no file was complete
    assert run.recover()[0].startswith(f"removed {temporary.name}")
    attempt(run.checkpoint_path(200))
    begin_folder(run.checkpoint_path(200), FileOperations())  # a save under the same name
    assert not list(temporary.iterdir())


def test_a_complete_attempt_is_committed_at_start_without_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    final = run.checkpoint_path(200, grown=True)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_take_name", killed)
        with pytest.raises(Killed):
            write(final)
    assert (temporary_path(final) / JOURNAL_FOLDER).exists()
    assert run.recover() == (f"finished the interrupted commit of {final.name}",)
    assert not (final / JOURNAL_FOLDER).exists()
    assert_holds(final, ComputedSource(MODEL))


def test_processes_killed_at_random_moments_end_in_the_same_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at a random time after the first data file is complete, again and again until an attempt gets through."""
    target, temporary = tmp_path / "a", temporary_path(tmp_path / "a")
    moments = random.Random(20)
    # The pauses leave so much time that even a busy machine kills before the end.
    options = {"model": {"num_layers": 3}, "pause_s": 0.04, "file_bytes": 9000}
    arguments = [str(target), json.dumps(options)]
    kills, progress = 0, [0]
    while kills < 3:
        with open(os.devnull, "w") as nothing:
            process = pool.start("tests.checkpoint.write_jobs", arguments, environment(), nothing, nothing)
            while not pool.ended(process) and len(data_files(temporary)) <= progress[-1]:
                time.sleep(0.002)
            time.sleep(moments.random() * 0.15)
            pool.wait([process], timeout_s=0)
        if target.exists():
            break
        kills += 1
        progress.append(len(data_files(temporary)))
        assert (temporary / UNFINISHED_FOLDER).exists()
    assert kills >= 2
    assert progress == sorted(progress)
    result = write(target, file_bytes=9000)
    assert result.bytes_resumed > 0
    assert_holds(target, ComputedSource(MODEL))
    assert validate_checkpoint(target, full=True) is None
    assert list(tmp_path.iterdir()) == [target]


def test_two_ranks_go_on_from_what_one_completed_and_the_other_way_round(tmp_path: Path) -> None:
    done = data_files(attempt(tmp_path / "a"))
    cases = {
        "resumed": {"target": str(tmp_path / "a")},
        "broken": {"target": str(tmp_path / "b"), "fault": [1, ComputedSource(MODEL).keys()[-1], 0, "raise"]},
    }
    first, second = run_ranks("tests.checkpoint.write_jobs:write_on_ranks", 2, {"cases": cases})
    assert first["resumed"]["resumed"] == second["resumed"]["resumed"] > 0
    assert 0 == second["resumed"]["first"][0] < first["resumed"]["first"][0]  # rank 0 counts what was taken over
    assert done < data_files(tmp_path / "a")
    assert_holds(tmp_path / "a", ComputedSource(MODEL))
    written_by = {name[:3] for name in data_files(temporary_path(tmp_path / "b"))}
    assert written_by <= {"__0", "__1"}
    assert written_by
    assert write(tmp_path / "b").bytes_resumed > 0
    assert_holds(tmp_path / "b", ComputedSource(MODEL))
