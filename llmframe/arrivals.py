"""Arrivals: the Dask accessor is there as soon as both Dask and llmframe are, whichever a user imports first.

Dask asks for nobody's accessors when it is imported, and to import it for everybody would cost a second.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AWAITED = "dask.dataframe"
OURS = "llmframe.dask"


def await_dask() -> None:
    """Import the accessor now, or when `dask.dataframe` has been."""
    if AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Awaiting())


def _register() -> None:
    with suppress(ImportError):  # an older Dask without what we need: its own import must not fail for that
        importlib.import_module(OURS)


class _Awaiting(MetaPathFinder):
    """Finds nothing by itself: it looks on when the awaited module is found, once."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads as the module's own loader does, and imports the accessor after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
