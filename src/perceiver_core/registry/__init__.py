"""Registry of classes and functions, and JSON configurations that refer to them by name.

`to_config` describes a model by its constructor calls, and `from_config` rebuilds the model from the description. It
calls only registered classes and functions, and does not import, evaluate or unpickle anything. A configuration
contains these JSON objects:

    {"part": name, argument: ...}      an instance of the registered class `name`, called a part
    {"partial": name, argument: ...}   a functools.partial of a registered class or function
    {"name": name}                     a registered class or function itself
    {"same": path}                     the same object as the part at an earlier path, such as "adapter.positions"
    {"dict": {key: ...}}               a dictionary with string keys

Lists, numbers, strings, true, false and null represent themselves. A torch.Generator is written as null, because the
state of a random number generator is not saved with a model.
"""

from perceiver_core.registry.configuration import at_most as at_most
from perceiver_core.registry.configuration import from_config, to_config
from perceiver_core.registry.configuration import settings as settings
from perceiver_core.registry.names import Json as Json
from perceiver_core.registry.registration import register, register_external

__all__ = ["from_config", "register", "register_external", "to_config"]
