"""What a daemon is told at its start, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ooc_moe_server.dram.arena import check_dram_bytes
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BLOCK_BYTES

UNIX_PATH_BYTES_MAX = 107
DRAM_POLICIES = ("lru", "s3fifo")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """A daemon's directory, memory and addresses. Raises InvalidRequest for what cannot work."""

    data_dir: Path
    dram_bytes: int = 1 << 30
    listen: tuple[str, ...] = ("127.0.0.1:50051",)  # "host:port" (port 0: any) or "unix:PATH".
    dram_policy: str = "lru"  # "lru" or "s3fifo": which resident leaves first.
    nvme_bytes: int | None = None  # The most that all records may take on NVMe, snapshots included; None: as much as the disk holds.
    bank_bytes: int | None = None  # The most that the records of one bank may take, snapshots not counted; None: no limit.
    local: bool = True  # Whether callers on this host may read the DRAM tier in place.
    insecure: bool = False  # Allows addresses beyond loopback, which anyone who reaches them may use.
    grace_s: float = 10.0  # How long calls under way may take to finish after SIGTERM.

    def __post_init__(self) -> None:
        check_dram_bytes(self.dram_bytes)
        if self.dram_policy not in DRAM_POLICIES:
            raise InvalidRequest(f"dram_policy: {self.dram_policy!r} is not one of {', '.join(DRAM_POLICIES)}")
        for name, quota in (("nvme_bytes", self.nvme_bytes), ("bank_bytes", self.bank_bytes)):
            if quota is not None and quota < BLOCK_BYTES:
                raise InvalidRequest(f"{name}: {quota} is less than a block of {BLOCK_BYTES}")
        if self.grace_s < 0:
            raise InvalidRequest(f"grace: {self.grace_s} is negative")
        if not self.listen:
            raise InvalidRequest("listen: at least one address is needed")
        for address in self.listen:
            if not _is_local(address) and not self.insecure:
                raise InvalidRequest(f"listen: {address} is beyond loopback; without credentials that needs --insecure")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises InvalidRequest."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"listen: {address!r} is neither host:port nor unix:PATH")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_local(address: str) -> bool:
    """Whether only this host can reach it. Raises InvalidRequest for what is no address."""
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
