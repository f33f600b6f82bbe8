"""Registration of classes and functions, and recording of constructor arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar, cast

from torch import nn

from perceiver_core import argument_types
from perceiver_core.argument_errors import explained
from perceiver_core.registry.keywords import refuse_unknown
from perceiver_core.registry.names import TAGS, _external, _named, _names, _replaced, label
from perceiver_core.registry.snapshot import RECORD, Attribute, Node, Record, each_partial_once, leaves, plain, snapshot

T = TypeVar("T", bound=Callable[..., object])


def register(thing: T, *, name: str | None = None) -> T:
    """Register a class or function, so that models that use it can be saved and loaded. Can be used as a decorator.

    Each instance of a registered class (called a part) records its constructor arguments, so no configuration class is
    needed. The record contains only data: numbers, strings, lists, and descriptions of parts and functools.partials. If
    an argument is a module (or a list or dictionary of modules), store it in an attribute of the same name, because
    `save` describes the module that is in this attribute when `save` is called. Arguments that cannot be described,
    such as lambdas, raise an error only in `save`.

    NumPy numbers and containers of configuration libraries are converted to Python's built-in types before the
    constructor is called. The arguments of this library's own classes are checked against their annotations.

    Arguments are saved by name. Therefore, a constructor may take `**kwargs`, but no `*args` or positional-only
    arguments. A new definition with the same module and qualified name replaces the earlier definition, for example
    when a notebook cell is run again.

    Args:
        thing: Class, or function such as a kernel or a sharing scheme.
        name: Name in `config.json`. Defaults to the qualified name.

    Raises:
        ValueError: If `thing` is neither a class nor a function, or is a lambda and `name` is not passed.
        ValueError: If a different class or function is registered under this name.
        ValueError: If a constructor argument cannot be passed by name, or has a reserved name such as "part".

    Example:
        >>> @pc.register
        ... class Scale(nn.Module):
        ...     def __init__(self, factor: float) -> None:
        ...         super().__init__()
        ...         self.factor = factor
        >>> pc.registry.to_config(Scale(2.0))
        {'part': 'Scale', 'factor': 2.0}
    """
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        raise ValueError(f"register takes a class or a function; got {thing!r}. Register its class instead")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string; got {name!r:.80}")
    name = name or thing.__qualname__
    if "<lambda>" in name:
        raise ValueError(f"{label(thing)} has no name of its own; write a function, or register(..., name='...')")
    names = _argument_names(thing) if inspect.isclass(thing) and thing not in _names else None
    taken = _named.get(name)
    if taken is not None and label(taken) != label(thing):
        raise ValueError(
            f"name {name!r} is taken by {label(taken)}; register {label(thing)} with another: register(..., name='...')"
        )
    if taken is not None and taken is not thing and "<locals>" in taken.__qualname__:
        # A local definition with the same code may use other enclosing variables, so the earlier one is unregistered.
        _names.pop(taken, None)
        _replaced[name] = _replaced.get(name, 0) + 1
    _named[name], _names[thing] = thing, name
    if names is not None:
        _record_arguments(cast(type, thing), names)
    return thing


def register_external(thing: type, *arguments: str) -> None:
    """Register a class of another library, so that models that use it can be saved and loaded.

    Args:
        thing: Class to register. Its name in `config.json` is its `__name__`.
        arguments: Names of the constructor arguments that are saved. Instances must have attributes with these names.
            Configurations with other arguments of this class are rejected.

    Example:
        >>> pc.registry.register_external(nn.ReLU, "inplace")
        >>> pc.registry.to_config(nn.ReLU())
        {'part': 'ReLU', 'inplace': False}
    """
    _named[thing.__name__], _names[thing], _external[thing] = thing, thing.__name__, arguments


def _argument_names(part: type) -> list[str]:
    """Check that the arguments of a class's constructor can be saved by name, and return their names."""
    construct = part.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(construct).parameters.values())[1:]
    for parameter in parameters if construct not in (nn.Module.__init__, object.__init__) else ():
        if parameter.name in TAGS:
            raise ValueError(
                f"{part.__qualname__} has an argument named {parameter.name!r}, which is reserved; rename it"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{part.__qualname__} takes {parameter} without a name; take a list, or a named argument")
    return [parameter.name for parameter in parameters]


def _record_arguments(part: type, names: list[str]) -> None:
    construct = cast(Callable[..., None], part.__init__)  # type: ignore[misc]
    accepted = set(names)
    checks_types = part.__module__.partition(".")[0] == __name__.partition(".")[0]
    hints = functools.cache(lambda: argument_types.hints_of(construct) if checks_types else {})
    # follow_wrapped=False, because a decorator of the constructor may accept additional keywords.
    outer = inspect.signature(construct, follow_wrapped=False).parameters.values()
    num_positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in outer) - 1  # but self
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer)

    @functools.wraps(construct)
    def recording(self: object, *args: object, **kwargs: object) -> None:
        if not takes_any and not kwargs.keys() <= accepted:
            refuse_unknown(f"{part.__qualname__}()", kwargs, names)
        args = tuple(plain(value) for value in args)
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        given = dict(zip(names, args, strict=False)) | kwargs  # the call below rejects surplus or unknown arguments
        if len(args) <= num_positional:
            argument_types.check(given, hints())
        if type(self) is not part:  # a subclass calls its parent's constructor
            construct(self, *args, **kwargs)
            return
        # Copied before the call, because it may modify lists. The paths of modules are known only after the call.
        copies = {name: _copied(given[name]) for name in dict.fromkeys([*names, *given]) if name in given}
        with each_partial_once():
            construct(self, *args, **kwargs)
            self.__dict__[RECORD] = Record({name: _recorded(self, name, value) for name, value in copies.items()})

    part.__init__ = recording  # type: ignore[misc]
    for name, method in list(vars(part).items()) if checks_types and issubclass(part, nn.Module) else ():
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(part, name, explained(method))


def _copied(value: object) -> object:
    value = plain(value, mappings=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _recorded(part: object, name: str, value: object) -> Node:
    """Describe a constructor argument of a part (an instance of a registered class) as plain data.

    A module is described by the path of the attribute that holds it, preferably the attribute called `name`. The part
    may not hold the module, because the constructor copies it or uses it only temporarily. Then the module's current
    state is described.
    """
    if not any(isinstance(leaf, nn.Module) for leaf in leaves(value)):
        return snapshot(value)
    now = getattr(part, name, None)
    if isinstance(value, nn.Module) and isinstance(now, nn.Module):
        if now is value or not isinstance(now, (nn.ModuleList, nn.ModuleDict)):
            return Attribute(name)
    elif isinstance(value, list) and isinstance(now, nn.ModuleList):
        if all(isinstance(item, nn.Module) for item in value):
            return Attribute(name, several=True)
    elif isinstance(value, dict) and isinstance(now, nn.ModuleDict) and list(value) == list(now):
        return Attribute(name, several=True)
    inside = part.named_modules() if isinstance(part, nn.Module) else ()
    return snapshot(value, {id(module): path for path, module in inside})


for _plain in (nn.Identity, nn.Tanh, nn.Sigmoid):
    register_external(_plain)
register_external(nn.ReLU, "inplace")
register_external(nn.SiLU, "inplace")
register_external(nn.GELU, "approximate")
register_external(nn.LayerNorm, "normalized_shape", "eps", "elementwise_affine", "bias")
register_external(nn.RMSNorm, "normalized_shape", "eps", "elementwise_affine")
