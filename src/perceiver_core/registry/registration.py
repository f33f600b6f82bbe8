"""Registration of classes and functions; recording of constructor arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar, cast

from torch import nn

from perceiver_core.registry.names import TAGS, _external, _named, _names, enter, label
from perceiver_core.registry.plain import plain
from perceiver_core.registry.snapshot import RECORD, Attribute, Node, Record, attribute, each_partial_once, snapshot

T = TypeVar("T", bound=Callable[..., object])


def register(thing: T, *, name: str | None = None) -> T:
    """Let `save` and `load` write and build a class or function. Use it as a decorator.

    The constructor arguments of a class are recorded when it is called, so a part needs no configuration class. The
    record is data: numbers, strings, lists and descriptions of parts and partials. Keep a module that is an argument
    (or a list or dictionary of modules) as an attribute of the same name: the module in this attribute is written when
    the model is saved. Arguments that cannot be described, such as a lambda, are refused by `save` only.

    Numbers of NumPy and containers of configuration libraries are converted to Python's own before the constructor.

    Arguments are written by name, so a constructor may take `**kwargs`, but no `*args` or positional-only arguments. A
    definition with the module and qualified name of an earlier one (a notebook cell that is run again) replaces it.

    Args:
        thing: Class (a part) or function (a kernel, a sharing scheme).
        name: Name in `config.json`; the qualified name by default.

    Raises:
        ValueError: The name is taken by something else; a lambda without a name; a constructor argument without a
            name, or with a reserved one.

    Example:
        >>> import perceiver_core as pc
        >>> from torch import nn
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
    name = name or thing.__qualname__
    if "<lambda>" in name:
        raise ValueError(f"{label(thing)} has no name of its own; write a function, or register(..., name='...')")
    signature = _signature(thing) if inspect.isclass(thing) and thing not in _names else None
    enter(thing, name)
    if signature is not None:
        _record_arguments(cast(type, thing), signature)
    return thing


def register_external(thing: type, *arguments: str) -> None:
    """Register a class of another library.

    Args:
        thing: Class, which is named by its own name in `config.json`.
        arguments: Names of the constructor arguments that are written and may be read from a file. Instances keep
            them as attributes.

    Example:
        >>> from torch import nn
        >>> import perceiver_core as pc
        >>> pc.registry.register_external(nn.ReLU, "inplace")
        >>> pc.registry.to_config(nn.ReLU())
        {'part': 'ReLU', 'inplace': False}
    """
    _named[thing.__name__], _names[thing], _external[thing] = thing, thing.__name__, arguments


def _signature(part: type) -> inspect.Signature:
    """Return the signature of a constructor, if all arguments can be written by name."""
    construct = part.__init__  # type: ignore[misc]
    signature = inspect.signature(construct)
    if construct in (nn.Module.__init__, object.__init__):  # those take *args and refuse them
        return signature
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.name in TAGS:
            raise ValueError(
                f"{part.__qualname__} has an argument named {parameter.name!r}, which is reserved; rename it"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{part.__qualname__} takes {parameter} without a name; take a list, or a named argument")
    return signature


def _record_arguments(part: type, signature: inspect.Signature) -> None:
    construct = cast(Callable[..., None], part.__init__)  # type: ignore[misc]

    @functools.wraps(construct)
    def recording(self: object, *args: object, **kwargs: object) -> None:
        args = tuple(plain(value) for value in args)
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        if type(self) is not part:  # a subclass calls its parent's constructor
            construct(self, *args, **kwargs)
            return
        given = _by_name(signature, self, *args, **kwargs)
        # Copied before the call, which may change lists; the paths of modules are known only after it.
        modules = {name: _copied(value) for name, value in given.items() if _holds_a_module(value)}
        with each_partial_once():
            nodes = {name: None if name in modules else snapshot(value) for name, value in given.items()}
            construct(self, *args, **kwargs)
            nodes.update((name, _kept(self, name, value)) for name, value in modules.items())
        self.__dict__[RECORD] = Record(nodes)

    part.__init__ = recording  # type: ignore[misc]


def _by_name(signature: inspect.Signature, *args: object, **kwargs: object) -> dict[str, object]:
    """Return the arguments of a call, those of `**kwargs` among them, without `self`."""
    given: dict[str, object] = {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(args[0]).__name__}: {error}") from None
    for name, value in list(bound.arguments.items())[1:]:
        flat = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given.update(value if flat else {name: value})
    return given


def _copied(value: object) -> object:
    """Return copies of lists and dictionaries, and other values unchanged."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _holds_a_module(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_a_module, value))
    if isinstance(value, dict):
        return any(map(_holds_a_module, value.values()))
    return isinstance(value, nn.Module)


def _kept(part: object, name: str, value: object) -> Node:
    """Return the attribute paths at which a part keeps the modules of an argument.

    The attribute of the argument's name has precedence over other paths. Modules that the part does not contain (it
    copies them, or uses them in its constructor only) are described as they are now.
    """
    now = attribute(part, name)
    if isinstance(value, nn.Module) and isinstance(now, nn.Module):
        if now is value or not isinstance(now, (nn.ModuleList, nn.ModuleDict)):
            return Attribute(name)
    elif isinstance(value, list) and isinstance(now, nn.ModuleList):
        if all(isinstance(item, nn.Module) for item in value):
            return Attribute(name, several=True)
    elif isinstance(value, dict) and isinstance(now, nn.ModuleDict) and list(value) == list(now):
        return Attribute(name, several=True)
    inside = part.named_modules() if isinstance(part, nn.Module) else ()
    return _found(value, {id(module): path for path, module in inside})


def _found(value: object, paths: dict[int, str]) -> Node:
    if isinstance(value, list):
        return [_found(item, paths) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _found(item, paths) for key, item in value.items()}
    return Attribute(paths[id(value)]) if id(value) in paths else snapshot(value)


for _plain in (nn.Identity, nn.Tanh, nn.Sigmoid):
    register_external(_plain)
register_external(nn.ReLU, "inplace")
register_external(nn.SiLU, "inplace")
register_external(nn.GELU, "approximate")
register_external(nn.LayerNorm, "normalized_shape", "eps", "elementwise_affine", "bias")
register_external(nn.RMSNorm, "normalized_shape", "eps", "elementwise_affine")
