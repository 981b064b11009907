"""The local plane: callers on the same host read the DRAM tier in place, through shared memory.

Offers `LocalPlane`, the listening socket, and its `Session`s, which hold the leases and the staging memory of one caller.
"""
