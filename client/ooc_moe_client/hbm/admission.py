"""Whether speculation may have the slot and the bandwidth that it asks for.

An expert is refused when no slot would be left for it that nobody misses, or when it could not be there in time: fetching it, after all
that was admitted before it, must take no longer than its need is away, times its probability, so that the less likely one must be the surer
to arrive. Speeds are measured on the fetches made, demand and speculation alike; before the first one nothing is refused for time.
"""

from __future__ import annotations

from enum import Enum

# What the newest fetch counts for in the measured bandwidth.
NEWEST_WEIGHT = 0.25


class AdmissionMode(Enum):
    """What becomes of speculation that is not worth it."""

    OFF = "off"  # It goes its way: nothing is judged.
    OBSERVE = "observe"  # It is counted as refused, and goes its way.
    ENFORCE = "enforce"  # It is counted as refused, and dropped.


class Admission:
    """Measures the bandwidth of fetches and judges speculation by it. Needs the cache's lock."""

    def __init__(self, mode: AdmissionMode) -> None:
        self.mode = mode
        self.bytes_per_s: float | None = None

    def measure(self, num_bytes: int, seconds: float) -> None:
        """Takes in one fetch."""
        newest = num_bytes / max(seconds, 1e-6)
        self.bytes_per_s = newest if self.bytes_per_s is None else self.bytes_per_s + NEWEST_WEIGHT * (newest - self.bytes_per_s)

    def refuses(self, *, num_bytes: int, slots_left: int, within_s: float | None, probability: float) -> bool:
        """Whether an expert is not worth its fetch.

        Args:
            num_bytes: of it and of everything that is fetched before it.
            slots_left: slots that it might take and that nothing before it takes.
            within_s: when it will be needed; None: nobody knows.
            probability: that it will be needed.
        """
        if slots_left <= 0:
            return True
        if within_s is None or self.bytes_per_s is None:
            return False
        return num_bytes / self.bytes_per_s > within_s * probability
