"""The NVMe tier: keeps records of experts in slab files (one file per record size), and keeps disk space in reserve.

Offers `NvmeTier`, which allocates, reads, writes and syncs slots (places for one record) and counts the references to them, and `Reserve`.
"""
