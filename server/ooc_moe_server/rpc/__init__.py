"""The daemon's gRPC side: the five services, a guard that limits calls and turns errors into gRPC statuses, and the replies to fetches.

Offers the services (`services`), the guard (`interceptor`), and `LocalFetches`, which serves the fetches of callers on this host that come
through the local plane's Unix socket instead of gRPC.
"""
