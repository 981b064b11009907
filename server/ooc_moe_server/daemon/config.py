"""The settings of a daemon. The settings are checked when a `ServerConfig` is made.

The docstring below each field is also the help of its option on the command line.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ooc_moe_server.dram.arena import check_dram_bytes
from ooc_moe_wire.errors import InvalidRequest, require_at_least
from ooc_moe_wire.layout import BLOCK_BYTES

UNIX_PATH_BYTES_MAX = 107
DramPolicy = Literal["lru", "s3fifo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The settings of a daemon: data directory, memory, addresses and limits. Raises InvalidRequest for settings that cannot work."""

    data_dir: Path
    """Directory of the experts, made if it does not exist. Only one daemon at a time can use it."""
    dram_bytes: int = 1 << 30
    """Memory of the DRAM tier, allocated in full at the start: 512MiB, 8GiB, ..."""
    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    """Addresses to serve: HOST:PORT (port 0: any free port) or unix:PATH; may be repeated."""
    dram_policy: DramPolicy = "lru"
    """Which expert leaves the DRAM tier first: the least recently used (lru), or s3fifo, which keeps frequent experts during scans."""
    nvme_bytes: int | None = None
    """Most bytes of all records in files, snapshots included; by default what the disk holds."""
    bank_bytes: int | None = None
    """Most bytes of the records of any one bank, without snapshots; by default no limit."""
    local: bool = True
    """Whether processes of this user on this host may read the DRAM tier in place."""
    insecure: bool = False
    """Allow addresses beyond loopback. Everyone who reaches such an address can use the daemon."""
    grace_s: float = 10.0
    """Seconds that calls in progress get to finish after SIGTERM."""

    def __post_init__(self) -> None:
        check_dram_bytes(self.dram_bytes)
        if self.dram_policy not in get_args(DramPolicy):
            raise InvalidRequest(f"dram_policy: {self.dram_policy!r} is not one of {', '.join(get_args(DramPolicy))}")
        for name, quota in (("nvme_bytes", self.nvme_bytes), ("bank_bytes", self.bank_bytes)):
            if quota is not None and quota < BLOCK_BYTES:
                raise InvalidRequest(f"{name}: {quota} is not at least a block of {BLOCK_BYTES}")
        require_at_least(0, grace_s=self.grace_s)
        if not self.listen:
            raise InvalidRequest("listen: at least one address is needed")
        for address in self.listen:
            if not _is_local(address) and not self.insecure:
                raise InvalidRequest(f"listen: {address} is beyond loopback; without credentials that needs --insecure")


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of "host:port" or "[v6]:port". Raises InvalidRequest for any other text."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"listen: {address!r} is not host:port or unix:PATH")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_local(address: str) -> bool:
    """Returns whether an address can be reached from this host only. Raises InvalidRequest for a text that is no address."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not 1 <= len(path.encode()) <= UNIX_PATH_BYTES_MAX:
            raise InvalidRequest(f"listen: {address!r}: the path is not 1 to {UNIX_PATH_BYTES_MAX} bytes")
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
