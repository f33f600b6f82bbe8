"""What a configuration may name: the parts that this library, or its user, has registered.

A model is saved as the constructor calls that made it (`to_config`) and built again from them (`from_config`).
Only registered names are ever called; nothing is imported, evaluated or unpickled.

    {"part": name, argument: ...}      a part, made by calling the class of that name
    {"partial": name, argument: ...}   functools.partial of a class or function
    {"name": name}                     the class or function itself
    {"same": path}                     the part that stands at an earlier path ("adapter.positions") once more
    {"dict": {key: ...}}               a dictionary; lists, numbers, strings, true, false and null are themselves

A torch.Generator, which draws what is dropped in training, is written as null: chance is no part of a model.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

T = TypeVar("T", bound=Callable[..., Any])

Json = Any  # what the json module reads and writes
_KINDS = ("part", "partial", "name", "same", "dict")
_named: dict[str, Callable[..., Any]] = {}
_names: dict[Callable[..., Any], str] = {}
_adopted: dict[type, tuple[str, ...]] = {}  # for classes of other libraries, the arguments that may be given
_budget = threading.local()


def register(thing: T, *, name: str | None = None) -> T:
    """Lets `save` and `load` write and build a class or function. Use it as a decorator.

    A class's constructor arguments are recorded as they are given, so a part needs no configuration
    class. Where an argument is a module (or a list of modules), keep it as an attribute of the same name:
    what stands there when the model is saved is what is written.

    Arguments are written by name, so `**kwargs` may be taken, `*args` and positional-only ones may not.
    Registering once more what has the same module and qualified name (a notebook cell that is run again)
    replaces it.

    Args:
        thing: a class (a part) or a function (a kernel, a sharing scheme).
        name: what stands for it in `config.json`; its own qualified name unless given.

    Raises:
        ValueError: the name is taken by something else; a lambda without a name; a constructor argument
            that has no name, or a reserved one.

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
        raise ValueError(f"{_label(thing)} has no name of its own; write a function, or register(..., name='...')")
    taken = _named.get(name)
    if taken is not None and _label(taken) != _label(thing):
        raise ValueError(
            f"name {name!r} is taken by {_label(taken)}; "
            f"register {_label(thing)} with another: register(..., name='...')"
        )
    if inspect.isclass(thing) and thing not in _names:
        _record_arguments(thing)
    if taken is not None and "<locals>" in taken.__qualname__:
        _names.pop(taken, None)  # the same text with other variables around it: not the same thing
    _named[name], _names[thing] = thing, name
    return thing


def register_external(thing: type, *arguments: str) -> None:
    """Registers a class of another library, with the arguments that its instances keep as attributes."""
    _named[thing.__name__], _names[thing], _adopted[thing] = thing, thing.__name__, arguments


def _record_arguments(part: type) -> None:
    construct = cast(Callable[..., None], part.__init__)  # type: ignore[misc]
    signature = inspect.signature(construct)
    if construct not in (nn.Module.__init__, object.__init__):  # those take *args and refuse them
        _check_names(part, list(signature.parameters.values())[1:])

    @functools.wraps(construct)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is part:  # not when a subclass calls its parent's constructor
            self.__dict__["_arguments"] = _by_name(signature, self, *args, **kwargs)
        construct(self, *args, **kwargs)

    part.__init__ = recording  # type: ignore[misc]


def _check_names(part: type, parameters: list[inspect.Parameter]) -> None:
    for parameter in parameters:
        if parameter.name in _KINDS:
            raise ValueError(
                f"{part.__qualname__} has an argument named {parameter.name!r}, which is reserved; rename it"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{part.__qualname__} takes {parameter} without a name; take a list, or a named argument")


def _by_name(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, those of `**kwargs` among them, without `self`."""
    given: dict[str, Any] = {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(args[0]).__name__}: {error}") from None
    for name, value in list(bound.arguments.items())[1:]:
        flat = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given.update(value if flat else {name: value})
    return {name: _copied(value) for name, value in given.items()}


def _copied(value: Any) -> Any:
    """Lists and dictionaries as they are now: their owner may change them later."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_config(value: Any) -> Json:
    """What `from_config` needs to make `value` again, as JSON.

    Raises:
        ValueError: a part that is not registered, or a value that JSON has no word for.

    Example:
        >>> from functools import partial
        >>> import perceiver_core as pc
        >>> pc.registry.to_config(partial(pc.CrossAttend, num_heads=2))
        {'partial': 'CrossAttend', 'num_heads': 2}
    """
    return _describe(value, "", {})


def _describe(value: Any, at: str, seen: dict[int, str]) -> Json:
    value = None if isinstance(value, torch.Generator) else value
    if value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_describe(item, _join(at, index), seen) for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": _describe_each(value, at, seen)}
    if isinstance(value, functools.partial):
        if value.args:
            raise ValueError(
                f"{at or 'the model'} is a functools.partial of positional arguments; name them: {value!r:.60}"
            )
        return {"partial": _name(value.func, at), **_describe_each(value.keywords, at, seen)}
    if type(value) in _names:
        if id(value) in seen:
            return {"same": seen[id(value)]}
        seen[id(value)] = at
        return {"part": _names[type(value)], **_describe_each(_arguments(value, at), at, seen)}
    if inspect.isclass(value) or inspect.isroutine(value):
        return {"name": _name(value, at)}
    if isinstance(value, nn.Module):
        raise ValueError(_unregistered(type(value), at))
    raise ValueError(
        f"{at or 'the model'} is {_short(value)}, which JSON has no word for. Give numbers, strings, None, lists, "
        "dictionaries with names for keys, or registered parts"
    )


def _describe_each(values: dict[str, Any], at: str, seen: dict[int, str]) -> dict[str, Json]:
    return {key: _describe(item, _join(at, key), seen) for key, item in values.items()}


def _arguments(part: Any, at: str) -> dict[str, Any]:
    """The arguments that make a part as it is now."""
    if type(part) in _adopted:
        found = {name: getattr(part, name) for name in _adopted[type(part)]}
        return {name: value is not None if name == "bias" else value for name, value in found.items()}
    if "_arguments" not in vars(part):
        raise ValueError(f"{at or 'the model'} was made before {_label(type(part))} was registered; make it again")
    return {name: _current(part, name, given) for name, given in part._arguments.items()}


def _current(part: Any, name: str, given: Any) -> Any:
    if isinstance(given, nn.Module):
        now = getattr(part, name, given)
        return now if isinstance(now, nn.Module) else given
    if isinstance(given, list) and given and all(isinstance(item, nn.Module) for item in given):
        now = getattr(part, name, given)
        return list(now) if isinstance(now, nn.ModuleList) else given
    return given


def settings(module: nn.Module) -> str:
    """A module's class and what it was told, in a line, to see whether it has been changed since it was made.

    Without the settings that the class names in `changes_no_result`: how something is computed, not what.
    """
    of = type(module)
    if of in _names and of not in _adopted:
        free = getattr(of, "changes_no_result", ())
        names = [name for name in inspect.signature(of).parameters if name in vars(module) and name not in free]
        kept = {name: vars(module)[name] for name in names}
        told = ", ".join(f"{name}={_describe_or_type(value)}" for name, value in kept.items())
    else:  # torch's own modules say all that matters; others, and lists of weights, may say where they are
        listing = isinstance(module, (nn.ParameterDict, nn.ParameterList))
        told = module.extra_repr() if of.__module__.startswith("torch.") and not listing else ""
    return f"{_label(of)}({told})"


def _describe_or_type(value: Any) -> Json:
    try:
        return to_config(value)
    except ValueError:
        return type(value).__name__


def from_config(config: Json) -> Any:
    """Makes the value that `to_config` wrote down.

    Raises:
        ValueError: a name that is not registered, arguments that do not fit, or a malformed description.

    Example:
        >>> import perceiver_core as pc
        >>> pc.registry.from_config({"part": "MLP", "dim": 32, "activation": {"part": "GEGLU"}}).expand.out_features
        64
    """
    try:
        return _build(config, "", {})
    except RecursionError as error:
        raise ValueError("the description is nested too deeply; no model is") from error


def _build(config: Json, at: str, made: dict[str, Any]) -> Any:
    if isinstance(config, list):
        return [_build(item, _join(at, index), made) for index, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    kinds = [kind for kind in _KINDS if kind in config]
    if len(kinds) != 1:
        raise ValueError(f"{at or 'the model'} must hold exactly one of {_KINDS}; found {_short(sorted(config)[:5])}")
    kind, named = kinds[0], config[kinds[0]]
    rest = {key: item for key, item in config.items() if key != kind}
    if kind in ("name", "same", "dict") and rest:
        raise ValueError(f"{at or 'the model'} must hold {kind!r} alone; found {_short(sorted(rest)[:5])} beside it")
    if kind == "same":
        return _earlier(named, at, made)
    if kind == "dict":
        return {key: _build(item, _join(at, key), made) for key, item in _a_dict(named, at).items()}
    thing = _lookup(named, at)
    arguments = {key: _build(item, _join(at, key), made) for key, item in rest.items()}
    if kind == "name":
        return thing
    _check_adopted(thing, arguments, at)
    if kind == "partial":
        return functools.partial(thing, **arguments)
    made[at] = _make(thing, arguments, at)
    return made[at]


def _make(thing: Callable[..., Any], arguments: dict[str, Any], at: str) -> Any:
    if not inspect.isclass(thing):
        raise ValueError(f"{at or 'the model'} names {_names[thing]!r}, which is not a part but a function")
    _count()
    try:
        return thing(**arguments)
    except Exception as error:  # of any kind: constructors are given here what no caller would give them
        why = str(error) or type(error).__name__
        raise ValueError(f"{at or 'the model'}: {_names[thing]} cannot be built from its description: {why}") from error


def _earlier(path: object, at: str, made: dict[str, Any]) -> Any:
    if not isinstance(path, str) or path not in made:
        raise ValueError(f"{at or 'the model'} is the same as {_short(path)}, but no part stands there before it")
    return made[path]


def _a_dict(value: object, at: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise ValueError(f"{at or 'the model'} must hold an object under 'dict'; got {_short(value)}")
    return value


def _check_adopted(thing: Callable[..., Any], arguments: dict[str, Any], at: str) -> None:
    """Other libraries' classes take arguments that a file must not choose: a device, to take memory there."""
    if inspect.isclass(thing) and thing in _adopted and not arguments.keys() <= set(_adopted[thing]):
        raise ValueError(
            f"{at or 'the model'} gives {_names[thing]} {_short(sorted(arguments))}; "
            f"it may have {list(_adopted[thing])}"
        )


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Bounds how many modules this thread may build or put into others, so that a small file cannot ask for many.

    Raises:
        ValueError: inside, at the first one too many.
    """
    _install_counter()
    before, _budget.left = getattr(_budget, "left", None), modules
    try:
        yield
    finally:
        _budget.left = before


@functools.cache
def _install_counter() -> None:
    # Stays: removing a hook while another thread builds a model would break the loop over hooks there.
    register_module_module_registration_hook(_count)


def _count(*_: object) -> None:
    left = getattr(_budget, "left", None)
    if left is not None:
        if left <= 0:
            raise ValueError("the configuration asks for more modules than the file has weights for")
        _budget.left = left - 1


def _lookup(name: object, at: str) -> Callable[..., Any]:
    if not isinstance(name, str) or name not in _named:
        raise ValueError(
            f"{at or 'the model'} names {_short(name)}, which is not registered. If it is your own, "
            "import the module that registers it before loading"
        )
    return _named[name]


def _name(thing: Callable[..., Any], at: str) -> str:
    known = (inspect.isclass(thing) or inspect.isroutine(thing)) and thing in _names
    if not known:
        raise ValueError(_unregistered(thing, at))
    return _names[thing]


def _unregistered(thing: object, at: str) -> str:
    return (
        f"{at or 'the model'} is {_label(thing)}, which is not registered. "
        "Put @perceiver_core.register above its definition and make the model again; a class that is not yours, into a "
        "module of yours"
    )


def _label(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


def _short(value: object) -> str:
    text = f"{value!r}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _join(at: str, key: object) -> str:
    return f"{at}.{key}" if at else f"{key}"


for _plain in (nn.Identity, nn.Tanh, nn.Sigmoid):
    register_external(_plain)
register_external(nn.ReLU, "inplace")
register_external(nn.SiLU, "inplace")
register_external(nn.GELU, "approximate")
register_external(nn.LayerNorm, "normalized_shape", "eps", "elementwise_affine", "bias")
register_external(nn.RMSNorm, "normalized_shape", "eps", "elementwise_affine")
