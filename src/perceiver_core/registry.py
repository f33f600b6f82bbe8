"""What a configuration may name: the parts that this library, or its user, has registered.

A model is saved as the constructor calls that made it (`describe`) and built again from them (`build`).
Only registered names are ever called; nothing is imported, evaluated or unpickled.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from torch import nn

T = TypeVar("T", bound=Callable[..., Any])

Json = Any  # what the json module reads and writes
_RESERVED = ("part", "partial", "name", "dict")
_named: dict[str, Callable[..., Any]] = {}
_names: dict[Callable[..., Any], str] = {}
_describe: dict[type, Callable[[Any], dict[str, Any]]] = {}
_parts_left: ContextVar[int | None] = ContextVar("parts_left", default=None)


def register(thing: T, *, name: str | None = None) -> T:
    """Lets `save` and `load` write and build a class or function. Use it as a decorator.

    A class's constructor arguments are recorded as they are given, so a part needs no configuration
    class. Where an argument is a module, keep it as an attribute of the same name: what stands there
    when the model is saved is what is written.

    Args:
        thing: a class (a part) or a function (a kernel, a sharing scheme).
        name: what stands for it in `config.json`; its own qualified name unless given.

    Raises:
        ValueError: the name is taken by something else, or a constructor argument has a reserved name.

    Example:
        >>> import perceiver_core as pc
        >>> from torch import nn
        >>> @pc.register
        ... class Scale(nn.Module):
        ...     def __init__(self, factor: float) -> None:
        ...         super().__init__()
        ...         self.factor = factor
        >>> pc.registry.describe(Scale(2.0))
        {'part': 'Scale', 'factor': 2.0}
    """
    name = name or thing.__qualname__
    taken = _named.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (thing.__module__, thing.__qualname__):
        raise ValueError(
            f"name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; "
            f"register {thing.__module__}.{thing.__qualname__} with another: register(..., name='...')"
        )
    if inspect.isclass(thing):
        _record_arguments(thing)
    _named[name], _names[thing] = thing, name
    return thing


def adopt(thing: type, describe: Callable[[Any], dict[str, Any]]) -> None:
    """Registers a class of another library by a function that reads an instance's arguments off it."""
    _named[thing.__name__], _names[thing] = thing, thing.__name__
    _describe[thing] = describe


def _record_arguments(part: type) -> None:
    construct = cast(Callable[..., None], part.__init__)  # type: ignore[misc]
    signature = inspect.signature(construct)
    reserved = [p for p in signature.parameters if p in _RESERVED]
    if reserved:
        raise ValueError(f"{part.__qualname__} has an argument named {reserved[0]!r}, which is reserved; rename it")

    @functools.wraps(construct)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is part:  # not when a subclass calls its parent's constructor
            _spend_one()
            bound = signature.bind(self, *args, **kwargs).arguments
            self.__dict__["_arguments"] = dict(list(bound.items())[1:])
        construct(self, *args, **kwargs)

    part.__init__ = recording  # type: ignore[misc]
    _describe[part] = _recorded


def _recorded(part: Any) -> dict[str, Any]:
    def current(name: str, given: Any) -> Any:
        now = getattr(part, name, given)
        return now if isinstance(given, nn.Module) and isinstance(now, nn.Module) else given

    return {name: current(name, given) for name, given in part._arguments.items()}


def describe(value: Any) -> Json:
    """What `build` needs to make `value` again, as JSON.

    Raises:
        ValueError: a part that is not registered, or a value that JSON has no word for.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): describe(item) for key, item in value.items()}}
    if isinstance(value, functools.partial):
        if value.args:
            raise ValueError(f"functools.partial({_label(value.func)}, ...) holds positional arguments; name them")
        return {"partial": _name(value.func), **{key: describe(item) for key, item in value.keywords.items()}}
    if type(value) in _describe:
        arguments = _describe[type(value)](value)
        return {"part": _name(type(value)), **{key: describe(item) for key, item in arguments.items()}}
    if callable(value) and not isinstance(value, nn.Module):
        return {"name": _name(value)}
    raise ValueError(
        f"{_label(type(value))} cannot be saved: it is not registered. "
        "Put @perceiver_core.register above its class, or leave it out of the constructor"
    )


def build(config: Json) -> Any:
    """Makes the value that `describe` wrote down.

    Raises:
        ValueError: a name that is not registered, arguments that do not fit, or a malformed description.
    """
    if isinstance(config, list):
        return [build(item) for item in config]
    if not isinstance(config, dict):
        return config
    kinds = [word for word in _RESERVED if word in config]
    if len(kinds) != 1:
        raise ValueError(f"each object must hold exactly one of {_RESERVED}; found {sorted(config)[:5]}")
    kind = kinds[0]
    rest = {key: build(item) for key, item in config.items() if key != kind}
    if kind == "dict":
        return {key: build(item) for key, item in config["dict"].items()}
    thing = _lookup(config[kind])
    if kind == "name":
        return thing
    if kind == "partial":
        return functools.partial(thing, **rest)
    if not inspect.isclass(thing):
        raise ValueError(f"{config[kind]!r} is not a part but a function")
    try:
        return thing(**rest)
    except TypeError as error:
        raise ValueError(f"{config[kind]} cannot be built from its description: {error}") from error


@contextmanager
def at_most(parts: int) -> Iterator[None]:
    """Bounds how many recorded parts may be made inside, so that a small file cannot ask for a huge model."""
    token = _parts_left.set(parts)
    try:
        yield
    finally:
        _parts_left.reset(token)


def _spend_one() -> None:
    left = _parts_left.get()
    if left is None:
        return
    if left <= 0:
        raise ValueError("the configuration asks for more parts than the file has weights for")
    _parts_left.set(left - 1)


def _lookup(name: object) -> Callable[..., Any]:
    if not isinstance(name, str) or name not in _named:
        raise ValueError(
            f"{name!r} is not a registered part. If it is your own, import the module that registers it before loading"
        )
    return _named[name]


def _name(thing: Callable[..., Any]) -> str:
    if thing not in _names:
        raise ValueError(f"{_label(thing)} is not registered; put @perceiver_core.register above its definition")
    return _names[thing]


def _label(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


def _nothing(_: nn.Module) -> dict[str, Any]:
    return {}


for _activation in (nn.Identity, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid):
    adopt(_activation, _nothing)
adopt(nn.GELU, lambda module: {"approximate": module.approximate})
for _norm in (nn.LayerNorm, nn.RMSNorm):
    adopt(
        _norm,
        lambda module: {
            "normalized_shape": list(module.normalized_shape),
            "eps": module.eps,
            "elementwise_affine": module.elementwise_affine,
        },
    )
