"""What is committed, on disk: the SQLite index, its witness COMMITTED, and the manifests from which a rebuild starts.

Offers `Index` and its transactions, `IndexThread` for the event loop, `Manifests`, and `open_store.open_files`, which opens all of them.
"""
