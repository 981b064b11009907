"""The DRAM tier: records in one arena of shared memory, pinned while in use, evicted by a policy.

Offers `DramTier`, its `Entry` (one record in the arena), and the `Arena`, whose memory the local plane shares with callers.
"""
