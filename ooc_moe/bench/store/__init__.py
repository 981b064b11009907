"""`ooc-moe bench store`: the daemon's fetches and pushes, compared with memcpy, TCP, gRPC, Flight, Ray, O_DIRECT, fio, LMDB and RocksDB.

benchmark.py has the command's function. The cache benchmark uses the records, the running daemon and the peers of this room.
"""
