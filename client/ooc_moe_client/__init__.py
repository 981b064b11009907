"""The trainer's side of the project: two stores of experts, and the cache that holds the experts in use on the GPU.

An `ExpertStore` keeps the experts of a model, usually more than fit into the GPU. `RemoteStore` reaches the store of a daemon over gRPC;
`InMemoryStore` is a store inside this process and needs no daemon. `ExpertCache` holds some experts of one bank (a named set of experts) on
the GPU, or on the CPU. It fetches missing experts from the store, prefetches experts that will be needed, and writes trained experts back
to the store. Only `ExpertCache` imports torch.
"""

from typing import TYPE_CHECKING

from ooc_moe_wire.lazy_names import lazy_names

if TYPE_CHECKING:
    from ooc_moe_client.hbm.admission import AdmissionMode as AdmissionMode
    from ooc_moe_client.hbm.cache import ExpertCache as ExpertCache
    from ooc_moe_client.hbm.stats import CacheStats as CacheStats
    from ooc_moe_client.in_memory import InMemoryStore as InMemoryStore
    from ooc_moe_client.remote.store import RemoteStore as RemoteStore
    from ooc_moe_client.store import Bank as Bank
    from ooc_moe_client.store import Durability as Durability
    from ooc_moe_client.store import ExpertInfo as ExpertInfo
    from ooc_moe_client.store import ExpertStore as ExpertStore
    from ooc_moe_client.store import Fetched as Fetched
    from ooc_moe_client.store import Plane as Plane
    from ooc_moe_client.store import PrefetchState as PrefetchState
    from ooc_moe_client.store import Priority as Priority
    from ooc_moe_client.store import Push as Push
    from ooc_moe_client.store import Sections as Sections
    from ooc_moe_client.store import Snapshot as Snapshot
    from ooc_moe_client.store import Tier as Tier

_MODULES = {
    "AdmissionMode": "hbm.admission",
    "Bank": "store",
    "CacheStats": "hbm.stats",
    "Durability": "store",
    "ExpertCache": "hbm.cache",
    "ExpertInfo": "store",
    "ExpertStore": "store",
    "Fetched": "store",
    "InMemoryStore": "in_memory",
    "Plane": "store",
    "PrefetchState": "store",
    "Priority": "store",
    "Push": "store",
    "RemoteStore": "remote.store",
    "Sections": "store",
    "Snapshot": "store",
    "Tier": "store",
}
__all__ = list(_MODULES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
