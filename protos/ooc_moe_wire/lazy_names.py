"""Lets a package offer names whose modules are imported only when a name is used (PEP 562).

`import ooc_moe` must not import torch, and yet `ooc_moe.TieredMoE` must work. The `__init__.py` of each of the four packages uses this:

    if TYPE_CHECKING:
        from ooc_moe.moe.layer import TieredMoE as TieredMoE    # For type checkers and editors.

    _MODULES = {"TieredMoE": "moe.layer"}
    __all__ = list(_MODULES)
    if not TYPE_CHECKING:
        __getattr__, __dir__ = lazy_names(__name__, _MODULES)   # Hidden from type checkers, which would accept any name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Makes the functions `__getattr__` and `__dir__` of a package that imports a name's module when the name is first used.

    Args:
        package: the package's `__name__`.
        modules: for each name the module below the package that defines it. A name that is a submodule itself maps to "".
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not modules[name]:
            return import_module(f"{package}.{name}")  # Becomes an attribute of the package by being imported.
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # The next access finds it without coming here.
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names
