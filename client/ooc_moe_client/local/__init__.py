"""The client's end of the local plane: shared memory and one Unix socket, for a daemon on this host.

`LocalPlane` (plane.py) gives leases on the daemon's DRAM tier, from which fetched bytes are copied, and the staging memory, from which the
daemon copies pushed bytes. Which calls go this way is decided in `remote`.
"""
