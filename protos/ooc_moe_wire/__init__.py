"""The contract between the storage daemon and its clients: messages, record layouts, checksums, initial values, errors, and shared rules.

The daemon and its clients import this package; this package imports neither of them, nor torch. The comments in `v1/bank.proto` and
`v1/expert.proto` are the specification: read them first. This module offers the types that describe a bank (a named set of experts), and
`errors`, which has every error that a call can raise.
"""

from typing import TYPE_CHECKING

from ooc_moe_wire.lazy_names import lazy_names

if TYPE_CHECKING:
    from ooc_moe_wire import errors as errors
    from ooc_moe_wire.initializers import Initializer as Initializer
    from ooc_moe_wire.layout import BankSpec as BankSpec
    from ooc_moe_wire.layout import Layout as Layout
    from ooc_moe_wire.layout import TensorSpec as TensorSpec

_MODULES = {
    "BankSpec": "layout",
    "Initializer": "initializers",
    "Layout": "layout",
    "TensorSpec": "layout",
    "errors": "",
}
__all__ = list(_MODULES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
