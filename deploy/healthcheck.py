"""Asks a daemon whether it serves: exit code 0 if so, 1 if it is starting, draining or away.

Run: python healthcheck.py 127.0.0.1:50051   (the container's HEALTHCHECK; needs the base install only)
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def serving(target: str) -> bool:
    """Whether the daemon at `target` answers SERVING within 3 seconds."""
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(not serving(sys.argv[1]))
