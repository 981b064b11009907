"""The values that all rooms above speak in: banks, records, slots, snapshots, and the catalog of all of them in memory.

Offers these classes, and `records`, which converts them to the rows of the index and back.
"""
