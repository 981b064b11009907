"""The local plane: lets callers on the same host read the DRAM tier in place, through shared memory, instead of through gRPC.

Offers `LocalPlane`, which listens on a socket, and `Session`, the connection of one caller. A session holds the caller's leases (rights to
read records) and its staging memory (shared memory from which the daemon takes the records that the caller pushes).
"""
