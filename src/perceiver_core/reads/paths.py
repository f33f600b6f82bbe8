"""The ways to read tokens, and the one place that chooses. All give the same answer; they differ in time and memory.

    Dense       tokens written out, normalized, projected to keys and values; then the kernel
    Factored    keys and values from the content and one table an axis; then the kernel
    Structured  no keys and no values, see `kernels.grid`

`Auto`, what a read does unless told otherwise, takes the one that its cost model thinks fastest. Another path in
its place is forced; a path left out of `Auto(strategies=...)` is forbidden. `explain` says what a model does and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core import masks
from perceiver_core.kernels import fastest, sdpa
from perceiver_core.reads.factored import FactoredKeysValues, Norm, factor
from perceiver_core.masks import Mask
from perceiver_core.kernels.sdpa import Kernel, kernel_for
from perceiver_core.kernels.grid import gpu, native
from perceiver_core.reads import costs as model
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.reads.costs import Cost, MEASURED, Machine, Request, Sizes, USUAL
from perceiver_core.linear import Linear
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

MOST = 2**30  # bytes that may be written out

# Without an eps, an RMSNorm in half precision takes that of float32, in which it computes; in early PyTorch (2.6) its
# own, which nearly levels numbers as small as this one.
OWN_EPS = bool(nn.functional.rms_norm(torch.full((1,), 2.0**-10, dtype=torch.bfloat16, device="cpu"), (1,)) < 0.5)


@runtime_checkable
class Strategy(Protocol):
    """A way to read tokens."""

    def why_not(self, request: Request) -> str:
        """Why this path cannot serve a request; empty if it can."""
        ...

    def cost(self, request: Request, costs: Machine) -> Cost:
        """What it would take."""
        ...

    def read(self, request: Request) -> KeysValues | FactoredKeysValues:
        """What the attention reads."""
        ...


@partial(register, name="reads.Dense")
@dataclass(frozen=True)
class Dense:
    """Tokens are written out, normalized and projected to keys and values. Serves every request."""

    def why_not(self, request: Request) -> str:
        """Empty: it can."""
        return ""

    def cost(self, request: Request, costs: Machine) -> Cost:
        """See `costs.dense`."""
        return model.dense(Sizes.of(request), costs)

    def read(self, request: Request) -> KeysValues:
        """Keys and values of all tokens."""
        tokens = request.tokens
        dense = tokens.materialize() if isinstance(tokens, Tokens) else tokens
        where = {} if request.positions is None else {"positions": request.positions}
        made: KeysValues = request.attention.keys_values(request.norm(dense), mask=_mask(request), **where)
        return made


@partial(register, name="reads.Factored")
@dataclass(frozen=True)
class Factored:
    """Keys and values are formed from the content and one table an axis; tokens are never written out.

    For `Tokens`, a LayerNorm, an RMSNorm or no norm, and plain linear projections.
    """

    def why_not(self, request: Request) -> str:
        """What cannot be taken apart."""
        return _whole(request)

    def cost(self, request: Request, costs: Machine) -> Cost:
        """See `costs.factored`."""
        return model.factored(Sizes.of(request), costs)

    def read(self, request: Request) -> KeysValues | FactoredKeysValues:
        """Keys and values of all tokens; or, of many, those of a slab at a time, where no kernel was chosen."""
        factored = _factor(request, self)
        if factored.large() and not _bound_to_kernel(request):
            return factored._replace(mask=_present(request, factored), form=True)
        keys, values = factored.formed(checks.product_dtype(factored.content))
        return KeysValues(request.attention.finish_keys(keys, request.positions), values, _mask(request))


@partial(register, name="reads.Structured")
@dataclass(frozen=True)
class Structured:
    """No keys and no values: see `kernels.grid`.

    For what `Factored` serves, with the default kernel and without rotary positions, norms of the keys, grouped
    queries, dropout of attention weights (in training) and masks of other things than tokens.
    """

    def why_not(self, request: Request) -> str:
        """What a structured read does not compute."""
        return _whole(request) or _bound_to_kernel(request)

    def cost(self, request: Request, costs: Machine) -> Cost:
        """See `costs.structured`: that of the compiled loop."""
        return model.structured(Sizes.of(request), costs)

    def missing(self, request: Request) -> str:
        """What the compiled loop that the cost is of is without; empty if it is there. It is compiled if need be.

        Without it the read is made by plain PyTorch: in little memory, but slowly.
        """
        content = request.tokens.content if isinstance(request.tokens, Tokens) else request.tokens
        if content.device.type == "cpu":
            return "" if native.available() else "it would need a C++ compiler"
        return gpu.missing(content.device, content.shape[-1])

    def read(self, request: Request) -> FactoredKeysValues:
        """What is read, in its parts."""
        factored = _factor(request, self)
        return factored._replace(mask=_present(request, factored))


@partial(register, name="reads.Auto")
@dataclass(frozen=True)
class Auto:
    """The fastest of some paths on a CPU or a CUDA GPU, by a cost model; on other devices `Dense`, if it is among them.

    On a CPU `Dense` is not taken where it would write out more than a gibibyte and another path can serve: the others
    go through a large input in slabs. On a GPU `Factored` is not taken where another can serve: its slabs are made for
    caches.

    Args:
        strategies: the paths to choose from. One that is left out is forbidden.
        machine: how fast the machine is; the usual costs of the device unless given.

    Example:
        >>> import perceiver_core as pc
        >>> from perceiver_core import reads
        >>> read = pc.CrossAttend(32, 10, strategy=reads.Auto(strategies=[reads.Factored(), reads.Dense()]))
    """

    strategies: Sequence[Strategy] = (Structured(), Factored(), Dense())
    machine: Machine | None = None

    def __post_init__(self) -> None:
        if not self.strategies:
            raise ValueError("strategies must name a path at least; got none. reads.Dense() serves every read")
        for path in self.strategies:
            check_strategy(path)

    def why_not(self, request: Request) -> str:
        """Why none of the paths can."""
        reasons = [path.why_not(request) for path in self.strategies]
        return "" if "" in reasons else "; ".join(reasons)

    def cost(self, request: Request, costs: Machine) -> Cost:
        """That of the path it takes."""
        return self.choose(request).cost(request, costs)

    def choose(self, request: Request) -> Strategy:
        """The path it takes."""
        able = [path for path in self.strategies if not path.why_not(request)]
        if not able:
            raise ValueError(
                f"no path of {list(self.strategies)} can serve this read: {self.why_not(request)}. Add reads.Dense()"
            )
        sizes = Sizes.of(request)
        if sizes.device not in USUAL:
            able = _if_any(able, Dense)  # where nothing is known, what PyTorch's own kernels are best at
        elif sizes.device == "cuda":
            able = _if_any(able, (Structured, Dense))
        elif sizes.written > MOST:
            able = [path for path in able if not isinstance(path, Dense)] or able
        if len(able) == 1:
            return able[0]
        seconds = [path.cost(request, self.costs_for(sizes.device)).seconds for path in able]
        best = able[seconds.index(min(seconds))]
        if isinstance(best, Structured) and best.missing(request):
            return Auto([path for path in able if path is not best], self.machine).choose(request)
        return best

    def costs_for(self, device: str) -> Machine:
        """How fast a device is."""
        return self.machine or USUAL.get(device, MEASURED)

    def read(self, request: Request) -> KeysValues | FactoredKeysValues:
        """What the chosen path makes."""
        return self.choose(request).read(request)


def _if_any(paths: list[Strategy], kinds: type | tuple[type, ...]) -> list[Strategy]:
    """Those of some kinds, or all where there is none of these."""
    return [path for path in paths if isinstance(path, kinds)] or paths


def set_strategy(module: nn.Module, path: Strategy) -> None:
    """Makes all reads in a module take a path. It is not saved with the model, which a path does not change.

    Raises:
        ValueError: a model that reads nothing.

    Example:
        >>> import perceiver_core as pc
        >>> from perceiver_core import reads
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> reads.set_strategy(encoder, reads.Dense())
    """
    check_strategy(path)
    for read in reads_of(module).values():
        read.strategy = path


def check_strategy(path: Strategy) -> None:
    """Raises unless this is a path, an object and not its class.

    Raises:
        TypeError: anything else.
    """
    if isinstance(path, type) or not isinstance(path, Strategy):
        shown = path.__name__ if isinstance(path, type) else repr(path)
        raise TypeError(f"path must be an object such as reads.Dense() or reads.Auto(); got {shown}")


def reads_of(module: nn.Module) -> dict[str, Any]:
    """The reads in a module by name: what has a path and can say what it asks of it.

    Raises:
        ValueError: a module that reads nothing.
    """
    reads = {name: part for name, part in module.named_modules() if hasattr(part, "path") and hasattr(part, "request")}
    if not reads:
        raise ValueError(
            f"the module must have reads (CrossAttend), which take a path; {type(module).__name__} has none"
        )
    return reads


def kernel_of(request: Request) -> Kernel | None:
    """Which of PyTorch's kernels meets the keys and values of a read; None where another kernel was chosen."""
    attention = request.attention
    if not isinstance(attention, MultiHeadAttention) or attention.kernel not in (fastest, sdpa):
        return None
    key, value = (layer.weight.shape[0] // attention.num_kv_heads for layer in (attention.key, attention.value))
    content = request.tokens.content if isinstance(request.tokens, Tokens) else request.tokens
    return kernel_for(key, value, checks.product_dtype(content), content.device, _mask(request))


def _whole(request: Request) -> str:
    """Why keys and values cannot be taken apart, or nothing."""
    tokens, attention = request.tokens, request.attention
    if not isinstance(tokens, Tokens):
        return "the input is a tensor, whose positions are mixed with its content; give Tokens"
    if type(attention) is not MultiHeadAttention:
        return f"the attention is a {type(attention).__name__}, not a MultiHeadAttention"
    if type(request.norm) not in (nn.LayerNorm, nn.RMSNorm, nn.Identity):
        return f"the norm is a {type(request.norm).__name__}, not a LayerNorm, RMSNorm or Identity"
    parts = (request.norm, attention.key, attention.value)
    if any(type(part) not in (nn.Linear, Linear) for part in parts[1:]):
        return "a projection to keys or values is not a plain nn.Linear"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(part, kind) for part in parts for kind in hooks):
        return "a hook waits for the keys, the values or the normalized tokens"
    if any("forward" in vars(part) for part in parts):
        return "the forward of a projection or of the norm was replaced"
    return ""


def _bound_to_kernel(request: Request) -> str:
    """What only a kernel on keys and values does, or nothing."""
    attention = request.attention
    if attention.kernel is not fastest:
        return f"the kernel {getattr(attention.kernel, '__name__', attention.kernel)} was chosen"
    if type(attention.rotary) is not nn.Identity:
        return "rotary positions turn the keys"
    if type(attention.key_norm) is not nn.Identity:
        return "the keys of each head are normalized"
    if attention.num_kv_heads != attention.num_heads:
        return "several heads share their keys and values"
    if attention.training and attention.dropout:
        return "attention weights are dropped in training"
    rules, tensors = masks.taken_apart(masks.of_tokens(request.mask))
    if rules or any(_per_query(mask) for mask in tensors):
        return "the mask differs between queries"
    return ""


def _per_query(mask: Tensor) -> bool:
    return mask.ndim < 2 or mask.shape[-2] != 1 or (mask.ndim > 2 and mask.shape[-3] != 1)


def _mask(request: Request) -> Mask | None:
    """The tokens' own mask and the one beside it."""
    present = request.tokens.flat_mask() if isinstance(request.tokens, Tokens) else None
    return masks.and_(None if present is None else masks.Padding(present), masks.of_tokens(request.mask))


def _present(request: Request, factored: FactoredKeysValues) -> Tensor | None:
    """The same as one tensor, on the grid."""
    _, tensors = masks.taken_apart(masks.of_tokens(request.mask))
    present = factored.mask
    batch, n = factored.content.shape[0], prod(factored.grid)
    like = factored.content.new_empty(()).expand(batch, 1, n, 1)
    for mask in tensors:
        masks.fits(mask, like, like)
        keep = mask.expand(batch, 1, 1, n).reshape(batch, *factored.grid)
        present = keep if present is None else present & keep
    return present


def _factor(request: Request, path: Strategy) -> FactoredKeysValues:
    if reason := path.why_not(request):
        raise ValueError(f"{path} cannot serve this read: {reason}. Choose another path, such as reads.Auto()")
    attention = request.attention
    parts = [(linear.weight, linear.bias) for linear in (attention.key, attention.value)]
    assert isinstance(request.tokens, Tokens)  # as `why_not` found
    return factor(request.tokens, _norm(request.norm, request.tokens.content.dtype), *parts, heads=attention.num_kv_heads)


def _norm(norm: Any, dtype: torch.dtype) -> Norm | None:
    if isinstance(norm, nn.Identity):
        return None
    if isinstance(norm, nn.LayerNorm):
        return Norm(norm.eps, norm.weight, norm.bias)
    like = dtype if OWN_EPS else torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(like).eps if norm.eps is None else norm.eps
    return Norm(eps, norm.weight, None, center=False)
