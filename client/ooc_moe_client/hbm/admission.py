"""`Admission`: whether a prefetch is worth its slot and its bandwidth.

A prefetch is refused when no slot would be left for it, or when it would come too late:

    bytes to fetch, its own and those queued before it / measured bandwidth  >  time until it is needed * probability that it is needed

So a less likely expert must be there with more time to spare. The bandwidth is measured on all fetches, on demand and by prefetch. Before
the first fetch nothing is refused for time.
"""

from __future__ import annotations

from enum import Enum

# The weight of the newest fetch in the measured bandwidth, an exponential average.
NEWEST_WEIGHT = 0.25


class AdmissionMode(Enum):
    """What happens to a prefetch that is not worth its fetch."""

    OFF = "off"  # Prefetches are not judged.
    OBSERVE = "observe"  # It is counted as refused, and made all the same.
    ENFORCE = "enforce"  # It is counted as refused, and dropped.


class Admission:
    """Measures the bandwidth of fetches, and judges prefetches by it. Needs the cache's lock."""

    def __init__(self, mode: AdmissionMode) -> None:
        self.mode = mode
        self.bytes_per_s: float | None = None

    def measure(self, num_bytes: int, seconds: float) -> None:
        """Adds one fetch to the measured bandwidth."""
        newest = num_bytes / max(seconds, 1e-6)
        self.bytes_per_s = newest if self.bytes_per_s is None else self.bytes_per_s + NEWEST_WEIGHT * (newest - self.bytes_per_s)

    def refuses(self, *, num_bytes: int, slots_left: int, within_s: float | None, probability: float) -> bool:
        """Whether to refuse the prefetch of an expert.

        Args:
            num_bytes: of this expert and of everything that is fetched before it.
            slots_left: slots that are left for it when everything before it has got its own.
            within_s: the time until it is needed; None when that is unknown.
            probability: how likely it is to be needed, 0 to 1.
        """
        if slots_left <= 0:
            return True
        if within_s is None or self.bytes_per_s is None:
            return False
        return num_bytes / self.bytes_per_s > within_s * probability
