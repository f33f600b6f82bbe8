"""Registered classes and functions, and configurations that refer to them.

A model is saved as its constructor calls (`to_config`) and rebuilt from them (`from_config`).
Only registered names are ever called; nothing is imported, evaluated or unpickled. A configuration is JSON:

    {"part": name, argument: ...}      a part: an instance of the registered class of that name
    {"partial": name, argument: ...}   functools.partial of a registered class or function
    {"name": name}                     the registered class or function itself
    {"same": path}                     the part at an earlier path ("adapter.positions") once more
    {"dict": {key: ...}}               a dictionary; lists, numbers, strings, true, false and null are themselves

A torch.Generator, which draws random numbers in training, is written as null: it is no part of a model.
"""

from perceiver_core.registry.configuration import at_most as at_most
from perceiver_core.registry.configuration import from_config, to_config
from perceiver_core.registry.configuration import settings as settings
from perceiver_core.registry.names import Json as Json
from perceiver_core.registry.registration import register, register_external

__all__ = ["from_config", "register", "register_external", "to_config"]
