"""Child processes of a benchmark: start a module as a process, wait until it is ready, and end it.

The parent runs `child_process("package.module", ...)`. The module ends with

    if __name__ == "__main__":
        run_as_child(serve)

and `serve` calls `report_ready` once, as soon as the parent may go on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ooc_moe.session.daemon import stop_with_parent
from ooc_moe_wire.errors import Unavailable

STOP_TIMEOUT_S = 10.0


@contextmanager
def child_process(module: str, *arguments: object, pass_fds: Sequence[int] = ()) -> Iterator[str]:
    """Runs `python -m module arguments` inside the block. Yields the text with which the child reported that it is ready.

    The child is ended at the end of the block.

    Args:
        module: the module to run; it calls `run_as_child`.
        arguments: its command line, each as text.
        pass_fds: file descriptors that the child inherits under the same numbers.

    Raises:
        Unavailable: the child ended before it was ready.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    # In a session of its own: Ctrl-C then reaches the benchmark alone, which ends its children in order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds, start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Unavailable(f"the benchmark's process {module} ended with {process.wait()} before it was ready")
        yield line.strip()
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_as_child(role: Callable[..., None]) -> None:
    """Runs `role`, the child process's work, with the arguments of the command line as texts. The process ends when its parent ends.

    A module that `child_process` starts calls this where `__name__` is "__main__".
    """
    stop_with_parent()
    role(*sys.argv[1:])


def report_ready(text: object = "ready") -> None:
    """Tells the parent process that this child process is ready; the parent's `child_process` yields `text`. Call it once."""
    print(text, flush=True)
