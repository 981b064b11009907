"""A daemon's store, over the network or on this host.

`RemoteStore` (store.py) implements the store interface: it retries, resumes broken streams, verifies checksums, and chooses for each fetch
and push how its bytes travel (plane_choice.py).
"""
