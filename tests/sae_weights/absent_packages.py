"""For oracle scripts: empty modules in place of packages that authors' code imports and encode and decode do not use."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self._names = frozenset(names)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _empty
        return module

    def exec_module(self, module):
        pass


def _empty(name):
    if name.startswith("__"):
        raise AttributeError(name)  # it has no file, no version …
    return type(name, (), {})


def stand_in_for(*names):
    """Importing these packages, where they are not installed, gives modules whose every name is an empty class."""
    sys.meta_path.append(_Absent(names))
