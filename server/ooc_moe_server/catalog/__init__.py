"""The classes that describe what the store holds: `Bank`, `Record`, `Slot`, `Snapshot`, and the `Catalog` that holds all these objects in
memory.

All other parts of the daemon use them. The module `records` converts records and banks to rows of the index (the SQLite file) and back.
"""
