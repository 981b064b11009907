"""Runs a daemon from its start to its stop: starting -> ready -> draining (finishing the calls under way) -> stopped.

The daemon listens before it is ready, so that health checks get NOT_SERVING. It drains before it stops, so that no call under way is lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
from importlib.metadata import version
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ooc_moe_server.daemon import data_dir
from ooc_moe_server.daemon.config import ServerConfig, split_address
from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.local.plane import LocalPlane
from ooc_moe_server.rpc.interceptor import Guard
from ooc_moe_server.rpc.local_fetches import LocalFetches
from ooc_moe_server.rpc.services import (
    SERVICE_NAMES,
    BankService,
    ExpertService,
    LocalService,
    SnapshotService,
    StatsService,
    add_to_server,
)
from ooc_moe_wire.allocator import keep_large_buffers
from ooc_moe_wire.codec import MESSAGE_BYTES_MAX
from ooc_moe_wire.errors import InvalidRequest, Unavailable
from ooc_moe_wire.v1 import stats_pb2

log = logging.getLogger(__name__)

_OPTIONS = (
    # Large frames and buffers make streams of 1 MiB messages faster.
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    ("grpc.http2.lookahead_bytes", 64 << 20),
    ("grpc.http2.write_buffer_size", 64 << 20),
    ("grpc.experimental.tcp_read_chunk_size", 4 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 16 << 20),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # Otherwise two daemons could bind one port, and would share its calls.
    # A host that vanished closes no connection. These pings close it, which ends the streams, pins and leases of that host.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
# How long replies that were already written may take to leave the process.
_LAST_REPLIES_S = 0.5


class Daemon:
    """Starts, runs and stops one daemon: its gRPC server, its engine (the store) and its local plane.

    The local plane is a Unix socket through which callers on this host read experts in shared memory.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._plane: LocalPlane | None = None
        self._guard = Guard()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=(self._guard,), options=_OPTIONS)
        self._experts = ExpertService(self._ready_engine, lambda: self._plane)
        self._stats = StatsService(self._ready_engine, self._add_daemon_stats)
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains and stops. The caller must have locked the data directory.

        Raises:
            OocMoeError: the daemon cannot start.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        log.info("starting: data directory %s, DRAM %d bytes", self._config.data_dir, self._config.dram_bytes)
        addresses = await self._listen()
        try:
            self._engine = await Engine.open(
                self._config.data_dir,
                self._config.dram_bytes,
                dram_policy=self._config.dram_policy,
                nvme_bytes=self._config.nvme_bytes,
                bank_bytes=self._config.bank_bytes,
            )
            if self._config.local:
                fetches = LocalFetches(self._ready_engine, self._guard)
                self._plane = LocalPlane(self._engine.arena, self._engine.dram, fetches.serve)
            self._guard.refusal = None
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            log.info("ready: listening on %s", ", ".join(addresses))
            await self._stopping.wait()
            await self._drain()
        finally:
            await self._server.stop(_LAST_REPLIES_S)
            if self._plane:
                self._plane.close()
        await self._engine.close()
        log.info("stopped")

    async def _listen(self) -> list[str]:
        """Binds every configured address and starts the gRPC server, which at first serves health checks only.

        Returns the addresses, with the ports that were bound. Also writes them to daemon.json.
        """
        engine = self._ready_engine
        add_to_server(
            self._server, BankService(engine), self._experts, SnapshotService(engine), self._stats, LocalService(lambda: self._plane)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        addresses = [_bind(self._server, address) for address in self._config.listen]
        await self._server.start()
        data_dir.announce(self._config.data_dir, addresses)
        return addresses

    async def _drain(self) -> None:
        """Refuses new calls, asks the push streams to end, and waits up to `grace_s` seconds for the calls under way."""
        self._guard.refusal = "the daemon is draining"
        await self._health.enter_graceful_shutdown()
        log.info("draining: %d calls under way", self._guard.num_open)
        self._stats.draining.set()
        for writer in list(self._experts.writers):
            writer.ask_to_end(Unavailable(self._guard.refusal))
        try:
            async with asyncio.timeout(self._config.grace_s):
                await self._guard.wait_idle()
        except TimeoutError:
            log.warning("%d calls did not finish within %g s", self._guard.num_open, self._config.grace_s)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICE_NAMES):
            await self._health.set(service, status)

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the daemon is starting")
        return self._engine

    def _add_daemon_stats(self, stats: stats_pb2.Stats) -> None:
        """Adds to `stats` what the engine does not know: version, data directory, whether the daemon drains, open calls, local sessions."""
        stats.version = version("ooc-moe")
        stats.data_dir = str(self._config.data_dir)
        stats.draining = self._stopping.is_set()
        stats.queues.open_streams = self._guard.num_open
        if self._plane:
            stats.queues.local_sessions, stats.queues.leased_bytes = self._plane.num_sessions, self._plane.leased_bytes


def run(config: ServerConfig) -> None:
    """Runs a daemon until SIGTERM or SIGINT stops it. Raises OocMoeError when it cannot start."""
    keep_large_buffers()
    with data_dir.held(config.data_dir):
        asyncio.run(_run(config))


async def _run(config: ServerConfig) -> None:
    await Daemon(config).run()


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Makes the gRPC server listen on an address. Returns the address with the port that was bound. Raises InvalidRequest."""
    if address.startswith("unix:"):
        _check_socket_path(Path(address.removeprefix("unix:")))
    else:
        _check_port(address)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise InvalidRequest(f"listen: {address} cannot be bound") from error
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _check_port(address: str) -> None:
    """Raises InvalidRequest when an address cannot be bound, for example because its port is in use. Binds and releases it to find out.

    gRPC's own error is longer, and does not name the reason.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        raise InvalidRequest(f"listen: {address}: {error.strerror}") from error


def _check_socket_path(path: Path) -> None:
    """Raises InvalidRequest when a Unix socket's path is in use or lacks its directory.

    Without this check, gRPC would silently replace the socket of a running daemon.
    """
    if not path.parent.is_dir():
        raise InvalidRequest(f"listen: unix:{path}: the directory does not exist")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise InvalidRequest(f"listen: unix:{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(os.fspath(path)) == 0:
            raise InvalidRequest(f"listen: unix:{path} is in use by another process")
