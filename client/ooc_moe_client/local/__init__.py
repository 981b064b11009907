"""The client's end of the local plane: a way for bytes to travel through shared memory, for a daemon on the same host.

One Unix socket carries the requests. `LocalPlane` (plane.py) offers two things. Leases (rights that expire) on records in the daemon's
memory, from which fetched bytes are copied; and staging memory, into which pushed bytes are written and from which the daemon copies them.
Whether a call uses this plane is decided in the room `remote`.
"""
