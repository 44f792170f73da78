"""File operations that die at a chosen point: before a call, or in the middle of one that is not atomic."""

from __future__ import annotations

from pathlib import Path

from growth_megatron.checkpoint.folder.files import FileOperations


class Killed(BaseException):
    """Stands for SIGKILL: no ``except Exception`` sees it."""


class DyingFiles(FileOperations):
    """Dies at step ``after`` (default: never), counted over all calls; writing calls have a step in their middle."""

    def __init__(self, after: int = 10**9) -> None:
        self.left = after

    def _step(self) -> None:
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def make_directory(self, path: Path) -> None:
        self._step()
        super().make_directory(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step()
        if self.left == 0:
            path.write_bytes(data[: len(data) // 2])
        self._step()
        path.write_bytes(data)  # no fsync: the operating system outlives this kill, and the disk is slow

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> bool:
        self._step()
        return super().link(source, target)

    def copy(self, source: Path, target: Path) -> str:
        self._step()
        if self.left == 0:
            target.write_bytes(source.read_bytes()[:7])
        self._step()
        return super().copy(source, target)

    def symlink(self, link: Path, target: str) -> None:
        self._step()
        super().symlink(link, target)

    def sync_file(self, path: Path) -> None:
        self._step()

    def remove_tree(self, path: Path) -> None:
        self._step()
        if self.left == 0:
            for file in sorted(path.rglob("*"))[::2]:
                if file.is_file():
                    file.unlink()
        self._step()
        super().remove_tree(path)
