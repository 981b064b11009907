"""The DRAM tier: keeps records of experts in one arena (a block of shared memory), pins them while in use, and evicts them by a policy.

Offers `DramTier`, its `Entry` (one record in the arena), and the `Arena`, whose memory the local plane shares with callers on this host.
"""
