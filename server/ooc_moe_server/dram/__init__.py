"""The DRAM tier: caches records of experts in one arena (a block of shared memory), and evicts records that are not in use by a policy.

Offers `DramTier`, its `Entry` (one record in the arena), and the `Arena`, whose memory the local plane (transfer by shared memory, without
gRPC) shares with callers on this host.
"""
