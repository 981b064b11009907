"""The daemon's gRPC side: the five services, the guard that wraps every call, and the replies to fetches.

Offers the services (`services`), the guard (`interceptor`), and `LocalFetches`, which serves fetches that come through shared memory's
local socket instead of gRPC.
"""
