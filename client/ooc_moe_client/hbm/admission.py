"""`Admission`: decides whether a prefetch (a fetch of an expert that may be needed later) is worth its slot and its bandwidth.

A prefetch is refused when no slot would be left for its expert. It is also refused when its bytes would arrive too late, that is, when

    (its bytes + bytes queued before it) / measured bandwidth  >  time until it is needed * probability that it is needed

So the less likely an expert is to be needed, the more time it must have to arrive. All fetches count in the measured bandwidth: those that
the training thread waits for, and prefetches. Before the first fetch there is no measurement, and no prefetch is refused for being late.
"""

from __future__ import annotations

from enum import Enum

# The weight of the newest fetch in the measured bandwidth, an exponential average.
NEWEST_WEIGHT = 0.25


class AdmissionMode(Enum):
    """What the cache does with a prefetch that `Admission` finds not worth its slot and bandwidth.

    OFF: `Admission` is not asked, and every prefetch is made. OBSERVE: the prefetch is counted as refused, and made all the same. ENFORCE:
    the prefetch is counted as refused, and dropped.
    """

    OFF = "off"
    OBSERVE = "observe"
    ENFORCE = "enforce"


class Admission:
    """Measures the bandwidth of fetches, and refuses prefetches that would find no slot or arrive too late.

    Callers hold the cache's lock.
    """

    def __init__(self, mode: AdmissionMode) -> None:
        self.mode = mode
        self.bytes_per_s: float | None = None

    def measure(self, num_bytes: int, seconds: float) -> None:
        """Updates the measured bandwidth, an exponential average, with a fetch of `num_bytes` that took `seconds`."""
        newest = num_bytes / max(seconds, 1e-6)
        self.bytes_per_s = newest if self.bytes_per_s is None else self.bytes_per_s + NEWEST_WEIGHT * (newest - self.bytes_per_s)

    def refuses(self, *, num_bytes: int, slots_left: int, within_s: float | None, probability: float) -> bool:
        """Returns whether to refuse the prefetch of one expert.

        Args:
            num_bytes: bytes of this expert and of all experts that are fetched before it.
            slots_left: the number of slots that remain when all experts before it have got theirs.
            within_s: seconds until the expert is needed; None when that is unknown.
            probability: how likely the expert is to be needed, 0 to 1.
        """
        if slots_left <= 0:
            return True
        if within_s is None or self.bytes_per_s is None:
            return False
        return num_bytes / self.bytes_per_s > within_s * probability
