"""Connections that notice within a bound that the other side has gone.

Owns: the kernel's options on a process's connections to one port. Does not own: who connects, what an end leads to.

torch's store sets none of them: where a node is cut off without a word, a call that waits for its answer waits for as
long as the kernel resends, some 15 minutes, and where nothing was sent, for ever.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import psutil

IDLE_S, INTERVAL_S, PROBES = 10, 5, 4
BOUND_S = IDLE_S + INTERVAL_S * PROBES
"""After this time without an answer of the other machine's kernel, calls on the connection fail."""


def keep_alive(port: int) -> int:
    """Set the options on this process's TCP connections from or to ``port``; returns on how many."""
    count = 0
    for connection in psutil.Process().net_connections("tcp"):
        ends = [end.port for end in (connection.laddr, connection.raddr) if end]
        if connection.fd < 0 or not connection.raddr or port not in ends:
            continue
        with suppress(OSError):  # closed meanwhile
            duplicate = socket.socket(fileno=os.dup(connection.fd))
            with duplicate:
                duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
                duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
                duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
                duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * BOUND_S)
            count += 1
    return count
