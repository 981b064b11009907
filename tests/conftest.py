"""Fixtures with real daemon processes for any test: `daemon` is one, `start_daemon` makes more, with other sizes or directories."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest


class DaemonProcess:
    """A process of `ooc-moe-server` that listens on a free port and on a Unix socket.

    After `kill` or `stop`, `start` runs it again with the same data and on the same addresses.
    """

    def __init__(
        self, data_dir: Path, *, dram_bytes: str = "32MiB", arguments: tuple[str, ...] = (), command: tuple[str, ...] = ()
    ) -> None:
        self.data_dir = data_dir
        self.log: list[str] = []
        # Socket paths are limited to 107 bytes; pytest's own directories can be longer.
        self._socket_dir = tempfile.mkdtemp(prefix="ooc-moe-")
        self._command = command or (sys.executable, "-m", "ooc_moe_server.daemon.cli")
        self._arguments = ("--data-dir", str(data_dir), "--dram-bytes", dram_bytes, *arguments)
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def target(self) -> str:
        """The daemon's TCP address, for a channel or a RemoteStore."""
        return f"127.0.0.1:{self._port}"

    @property
    def unix_target(self) -> str:
        """The address of the daemon's Unix socket, for a channel or a RemoteStore."""
        return f"unix:{self._socket_dir}/daemon.sock"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def channel(self) -> grpc.Channel:
        """Returns a new TCP channel to the daemon; the caller closes it."""
        return grpc.insecure_channel(self.target)

    def start(self) -> DaemonProcess:
        """Starts the process and waits until the daemon is ready. Returns `self`."""
        listen = ("--listen", self.target, "--listen", self.unix_target)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([*self._command, *self._arguments, *listen], stderr=subprocess.PIPE, text=True, env=environment)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if " ready: listening on " in line:
                self._port = int(line.partition("127.0.0.1:")[2].partition(",")[0])
                threading.Thread(target=self.log.extend, args=(self._process.stderr,), daemon=True).start()
                return self
        raise AssertionError(f"the daemon ended with {self._process.wait()}: {''.join(self.log)}")

    def kill(self) -> None:
        """Ends the process with SIGKILL, as a crash would, and waits for its end."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ends the process with SIGTERM, waits for its end, and returns the exit code."""
        return self._end(signal.SIGTERM)

    def restart(self) -> DaemonProcess:
        """Kills the process, starts it again on the same addresses, and waits until the daemon is ready. Returns `self`."""
        self.kill()
        return self.start()

    def close(self) -> None:
        """Ends the process, if it runs, and removes the Unix socket's directory."""
        if self._process is not None:
            self._end(signal.SIGKILL)
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout=30)


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """A function that starts daemons: `start_daemon(data_dir=..., dram_bytes="1MiB", arguments=(...))`. All of them end with the test."""
    daemons: list[DaemonProcess] = []

    def start(data_dir: Path | None = None, **options: object) -> DaemonProcess:
        daemons.append(DaemonProcess(data_dir or tmp_path / f"store{len(daemons)}", **options))  # type: ignore[arg-type]
        return daemons[-1].start()

    yield start
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def daemon(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """A running daemon with 32 MiB of DRAM and an empty data directory."""
    return start_daemon()


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One running daemon with 32 MiB of DRAM for all tests of a module. Tests use banks of their own, and leave it running."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("shared") / "store").start()
    yield daemon
    daemon.close()
