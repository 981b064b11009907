"""The client's end of the local plane: a way for bytes to travel through shared memory, for a daemon on the same host.

One Unix socket carries the requests. `LocalPlane` (plane.py) offers two things. For fetches, it gets leases (rights that expire) on records
in the daemon's memory, from which the bytes are copied. For pushes, it has staging memory, into which the bytes are written and from which
the daemon copies them. The package `remote` decides whether a call uses this plane.
"""
