"""Stores on disk what is committed: the SQLite index, its witness COMMITTED (which commit was last), and the manifests (JSON copies).

Offers `Index` and its transactions, `IndexThread` for the event loop, `Manifests`, and `open_store.open_files`, which opens all of them.
"""
