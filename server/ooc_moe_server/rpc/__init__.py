"""gRPC: the five services, the guard around every call, and the replies to fetches.

Offers the daemon its services (`services`), the interceptor, and `LocalFetches`, which serves fetches that come through the local plane.
"""
