"""The client of a daemon's store, over the network or on the same host.

`RemoteStore` (store.py) implements the store interface. It retries failed calls, continues broken streams, verifies checksums, and chooses
for each fetch and push how the bytes travel: in gRPC messages or through shared memory (plane_choice.py).
"""
