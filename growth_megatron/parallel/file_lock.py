"""One lock for processes that share a file system: of a run, of a target being written, of an index being built.

Owns: the lock and what happens where it is held or cannot be had. Does not own: what is locked. It stands this low
because ``data`` and ``checkpoint`` both need it.

Own code on POSIX record locks: no child of a run inherits them, so a run that was killed can be started again while
such a process lives on. The lock of the library ``filelock`` is inherited in some of the releases that torch allows,
and in some removes its file, or puts one there that outlives a kill; and its file names no holder.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growth_megatron.errors import GrowthMegatronError

_LOG = logging.getLogger(__name__)
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path, held_elsewhere: GrowthMegatronError | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` for this process; the kernel frees it however the process ends.

    The file stays where it is: were it removed, two later processes could hold two files of one name. Where the file
    system has no locks this goes on without one, and says so.

    Args:
        held_elsewhere: raised, with host and process, if another process holds it; None: wait for that.

    Raises: ``held_elsewhere``; OSError where the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if held_elsewhere is not None else 0))
        except OSError as error:
            if held_elsewhere is not None and error.errno in _HELD:
                file.seek(0)
                raise type(held_elsewhere)(f"{held_elsewhere}. The holder is {file.read().strip()}") from None
            _LOG.warning(
                "%s cannot be locked (%s): see to it that no other process writes there", path, error.strerror or error
            )
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield
