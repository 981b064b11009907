"""An embedded daemon: an `ooc-moe-server` process on a local directory that lives as long as the run that started it."""

from __future__ import annotations

import ctypes
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_fixed

from ooc_moe_wire.errors import Unavailable

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
HELD_PATIENCE_S = 10.0
_PR_SET_PDEATHSIG = 1


@contextmanager
def embedded_daemon(data_dir: Path, *, dram_bytes: int, also_listen: Sequence[str] = ()) -> Iterator[str]:
    """Runs a storage daemon on `data_dir` for as long as the `with` block runs.

    At the end the daemon gets SIGTERM: it finishes open calls, writes its data to disk and stops. It runs in its own process session, so
    that Ctrl-C reaches only the trainer, which can then still save. If the trainer is killed, the kernel sends SIGTERM to the daemon.

    Args:
        data_dir: the daemon's directory, made if it does not exist.
        dram_bytes: size of the daemon's DRAM tier.
        also_listen: further addresses to listen on.

    Yields:
        The daemon's TCP address.

    Raises:
        Unavailable: the daemon did not start. The message ends with the last line of its log.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    process, address = _start(data_dir, dram_bytes, also_listen)
    try:
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("the embedded daemon did not stop within %.0f s; killing it (all acknowledged writes are durable)", STOP_TIMEOUT_S)
            process.kill()
            process.wait()


# The daemon of a trainer that was just killed may still be draining.
@retry(
    retry=retry_if_exception_message(match=".*is held by another daemon"),
    stop=stop_after_delay(HELD_PATIENCE_S),
    wait=wait_fixed(0.2),
    reraise=True,
)
def _start(data_dir: Path, dram_bytes: int, also_listen: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a daemon and waits until it listens. Returns its process and its address."""
    log_path = data_dir.with_suffix(".log")
    address_file = data_dir / "daemon.json"
    address_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "ooc_moe_server.daemon.cli", "--data-dir", str(data_dir), "--dram-bytes", str(dram_bytes)]
    for address in ("127.0.0.1:0", *also_listen):
        command += ["--listen", address]
    with log_path.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, preexec_fn=stop_with_parent)
    try:
        return process, _wait_until_listening(process, address_file, log_path)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _wait_until_listening(process: subprocess.Popen[bytes], address_file: Path, log_path: Path) -> str:
    """Waits until the daemon has written its address to `address_file`, which it does once it listens. Returns the address."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if address_file.exists():
            return str(json.loads(address_file.read_text())["addresses"][0])
        time.sleep(0.02)
    last_line = log_path.read_text(errors="replace").strip().splitlines()[-1:]
    raise Unavailable(f"the embedded daemon did not start on {log_path.parent}: {''.join(last_line) or 'its log is empty'}")


def stop_with_parent() -> None:
    """Asks the kernel to send the calling process a SIGTERM when its parent dies (Linux prctl(2)). The daemon's process calls it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
