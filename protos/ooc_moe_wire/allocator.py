"""Makes the C library's allocator keep large buffers after they are freed, because a new buffer of a megabyte costs many page faults."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_BYTES = 32 << 20  # The largest value that glibc allows.
_TRIM_THRESHOLD_BYTES = 256 << 20


def keep_large_buffers() -> None:
    """Tells the C library to keep freed buffers of megabytes for reuse, in the whole process, instead of returning them to the system."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.info("the C library has no mallopt: large messages will cost page faults")
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
