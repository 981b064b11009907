"""A TCP proxy that can lose answers: requests reach the server, but its answers are dropped, until the connection is broken."""

from __future__ import annotations

import contextlib
import socket
import threading


class LossyProxy:
    """A TCP proxy in front of a daemon that can lose the daemon's answers and break connections. Clients connect to `target`.

    Connections that are made after a `cut` work as usual.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._losing: set[socket.socket] = set()
        self.refuses = False
        """Whether the proxy closes every new connection at once."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def target(self) -> str:
        """The proxy's address, for a channel or a RemoteStore."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def lose_answers(self) -> None:
        """Drops everything that the daemon sends from now on over the connections that are open now."""
        self._losing = set(self._sockets)

    def cut(self) -> None:
        """Breaks every open connection. New connections are possible."""
        broken, self._sockets = self._sockets, []
        for each in broken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the proxy: breaks every connection, and accepts no more."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.refuses:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._upstream)
            except OSError:  # While the daemon is down, the proxy refuses connections.
                client.close()
                continue
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Forwards bytes from `source` to `sink` until either end closes, then closes both. Drops them where answers are to be lost."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                if not (source in self._losing and self._is_server(source)):
                    sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _is_server(self, end: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            return bool(end.getpeername() == self._upstream)
        return False
