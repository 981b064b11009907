"""The storage daemon: it keeps experts in DRAM and in files on NVMe, and serves them over gRPC. It does not use torch.

`run(ServerConfig(...))` runs a daemon in this process until SIGTERM; the command `ooc-moe-server` does the same.
"""

from typing import TYPE_CHECKING

from ooc_moe_wire.lazy_names import lazy_names

if TYPE_CHECKING:
    from ooc_moe_server.daemon.config import ServerConfig as ServerConfig
    from ooc_moe_server.daemon.lifecycle import run as run

_MODULES = {"ServerConfig": "daemon.config", "run": "daemon.lifecycle"}
__all__ = list(_MODULES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
