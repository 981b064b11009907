"""Stores on disk which banks, records and snapshots exist: in the SQLite index, its JSON copies (manifests), and the file COMMITTED.

The file COMMITTED holds the number of the index's last transaction, so that an index that lost transactions is noticed.

Offers `Index` and its transactions, `IndexThread` for the event loop, `Manifests`, and `open_store.open_files`, which opens these files.
"""
