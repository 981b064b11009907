"""The local plane: lets callers on the same host read the DRAM tier in place, through shared memory, instead of through gRPC.

Offers `LocalPlane`, the listening socket, and its `Session`s, which hold the leases and the staging memory of one caller.
"""
