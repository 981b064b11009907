"""The sending process of the peer "tcp" of the store benchmark: it sends all records over one loopback connection.

peers_memory.py runs it: python -m ooc_moe.bench.store.tcp_sender FD NUM_BYTES
"""

from __future__ import annotations

import socket

from ooc_moe.bench.child_process import report_ready, run_as_child
from ooc_moe.bench.store.records import map_source


def send_on_request(fd: str, num_bytes: str) -> None:
    """Accepts one connection on a new port, and sends all records once for every byte that arrives on it.

    It first reports the port to the parent. The arguments come from the command line, as text.
    """
    source = memoryview(map_source(fd, num_bytes))
    with socket.create_server(("127.0.0.1", 0)) as server:
        report_ready(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            while connection.recv(1):
                connection.sendall(source)


if __name__ == "__main__":
    run_as_child(send_on_request)
