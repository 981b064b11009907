"""`ooc-moe-server` on a slow disk: every read, write and sync of a slab first sleeps a random time of up to twice SECONDS.

python -m tests.torture.slow_disk SECONDS --data-dir DIR ...
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from ooc_moe_server.daemon.cli import main

CALLS = ("preadv", "pwritev", "fdatasync")


def slowed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def later(*arguments: Any) -> Any:
        time.sleep(random.uniform(0, 2 * seconds))
        return call(*arguments)

    return later


if __name__ == "__main__":
    delay_s = float(sys.argv.pop(1))
    for name in CALLS:
        setattr(os, name, slowed(getattr(os, name), delay_s))
    main()
