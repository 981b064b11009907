"""`ooc-moe bench store`: the daemon's fetches and pushes, compared with memcpy, TCP, gRPC, Flight, Ray, O_DIRECT, fio, LMDB and RocksDB.

The command's options and measurements are in benchmark.py. The cache benchmark also uses this directory's records, running daemon and
peers.
"""
