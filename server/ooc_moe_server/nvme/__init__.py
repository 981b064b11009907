"""The NVMe tier: records in slab files, and the disk space that is kept in reserve.

Offers `NvmeTier`, which allocates, reads, writes and syncs slots and counts the references to them, and `Reserve`.
"""
