"""The values that all other parts of the daemon share: banks, records, slots, snapshots, and the catalog that holds all of them in memory.

Offers these classes, and the module `records`, which converts records and banks to rows of the index (the SQLite file) and back.
"""
