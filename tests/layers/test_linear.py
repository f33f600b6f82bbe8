"""Linear layers with oneDNN equal nn.Linear: results, gradients, second derivatives, and fallbacks to PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from perceiver_core.layers import init, linear
from perceiver_core.layers.linear import apply_linear

there = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")), reason="no oneDNN"
)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes all products use oneDNN on any processor; returns their shapes (rows, terms, columns)."""
    seen: list[tuple[int, ...]] = []
    forward = linear._Product.forward

    def noted(ctx: object, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((*a.shape, b.shape[0]))
        return forward(ctx, a, b, bias)

    monkeypatch.setattr(linear._Product, "forward", staticmethod(noted))
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    for name, value in {"MIN_PRODUCTS": 1, "MIN_WIDTH": 1, "MAX_DEPTH": 2**40}.items():
        monkeypatch.setattr(linear, name, value)
    return seen


class Applied(nn.Module):
    """Calls its layer as the blocks do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.layer, x)


def layer_of(*, bias: bool = True, seed: int = 0) -> Applied:
    torch.manual_seed(seed)
    layer = init.linear(17, 13, bias=bias)
    assert type(layer) is nn.Linear
    if bias:
        nn.init.normal_(layer.bias)
    return Applied(layer)


def outcome(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the gradients, and the gradients of their squares."""
    leaves = [x.detach().clone().requires_grad_(), *layer.parameters()]
    out = layer(leaves[0])
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [x.detach() for x in (out, *first, *second)]


LAYOUTS = {
    "rows": lambda: torch.randn(11, 17),
    "one": lambda: torch.randn(17),
    "a batch": lambda: torch.randn(2, 3, 5, 17),
    "part of wider rows": lambda: torch.randn(11, 40)[:, 3:20],
    "columns": lambda: torch.randn(17, 11).T,
    "the same row again": lambda: torch.randn(1, 17).expand(11, 17),
    "turned": lambda: torch.randn(5, 2, 17).transpose(0, 1),
}


@there
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_nn_linear_up_to_rounding(layout: str, bias: bool, products: list[tuple[int, ...]]) -> None:
    layer, x = layer_of(bias=bias), LAYOUTS[layout]()
    exact = Applied(nn.Linear(17, 13, bias=bias)).double()
    exact.load_state_dict(layer.state_dict())
    exact = exact.layer
    for actual, wanted in zip(outcome(layer, x), outcome(exact, x.double()), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0.0, atol=2e-6 * float(wanted.abs().max()))
    rows = x.numel() // 17
    assert products[:3] == [(rows, 17, 13), (rows, 13, 17), (13, rows, 17)]


@there
@pytest.mark.parametrize("given", ["tokens", "weights"])
def test_only_required_gradients_are_computed(given: str, products: list[tuple[int, ...]]) -> None:
    layer, x = layer_of(), torch.randn(11, 17, requires_grad=given == "tokens")
    layer.requires_grad_(given == "weights")
    layer(x).sum().backward()
    assert products == [(11, 17, 13), (11, 13, 17) if given == "tokens" else (13, 11, 17)]


@there
def test_no_tokens(products: list[tuple[int, ...]]) -> None:
    layer = layer_of()
    assert layer(torch.empty(0, 5, 17)).shape == (0, 5, 13)


@there
@pytest.mark.parametrize("bias", ["with gaps", "the same again", "one for all", "one row"])
def test_any_memory_layout_of_the_bias(bias: str, products: list[tuple[int, ...]]) -> None:
    """A bias without contiguous memory of its own is copied or left to PyTorch."""
    layer, x = layer_of(), torch.randn(11, 17)
    wide = torch.randn(13, 2)
    made = {
        "with gaps": wide[:, 0],
        "the same again": torch.full((1,), 3.0).expand(13),
        "one for all": wide[0, 0],
        "one row": wide[:, :1].T,
    }[bias]
    actual = functional_call(layer, {"layer.weight": layer.layer.weight, "layer.bias": made}, x)
    torch.testing.assert_close(actual, F.linear(x, layer.layer.weight) + made)


@there
def test_only_tensors_that_gradients_need_are_saved(products: list[tuple[int, ...]]) -> None:
    """Tensors that gradients do not need may be changed in place, as with nn.Linear."""
    frozen, layer, x = layer_of().requires_grad_(False), layer_of(), torch.randn(11, 17)
    hidden = x.clone().requires_grad_() * 1
    out = frozen(hidden)
    with torch.no_grad():
        hidden.add_(1)
    out.sum().backward()
    out = layer(x)
    with torch.no_grad():
        layer.layer.weight.add_(1)
    out.sum().backward()
    layer.layer.weight.requires_grad_(False)
    with torch.inference_mode():
        y = torch.randn(11, 17)
    layer(y).sum().backward()
    assert len(products) > 3


@there
@pytest.mark.usefixtures("products")
def test_a_missing_gradient_is_none() -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> None:
            return None

    layer = layer_of()
    Nothing.apply(layer(torch.randn(11, 17))).sum().backward()
    assert layer.layer.weight.grad is None and layer.layer.bias.grad is None


@there
@pytest.mark.usefixtures("products")
def test_weights_are_accessed_once_and_their_sizes_are_used() -> None:
    """A parametrization may change with every access; weights may be sliced after construction."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counted.calls += 1
            return weight

    layer, x = layer_of(), torch.randn(11, 17)
    nn.utils.parametrize.register_parametrization(layer.layer, "weight", Counted(), unsafe=True)
    Counted.calls = 0
    layer(x)
    assert Counted.calls == 1
    cut = layer_of()
    cut.layer.weight, cut.layer.bias = nn.Parameter(cut.layer.weight[:7]), nn.Parameter(cut.layer.bias[:7])
    torch.testing.assert_close(cut(x), F.linear(x, cut.layer.weight, cut.layer.bias))


@there
def test_batched_second_derivatives(products: list[tuple[int, ...]]) -> None:
    """torch.func and modes that begin after the forward pass use a graph recorded without them."""
    layer, x = layer_of(), torch.randn(11, 17, requires_grad=True)
    y = layer(x)
    each = vmap(lambda v: torch.autograd.grad(y, x, v.expand(11, 13), retain_graph=True)[0])(torch.eye(13)[:3])
    torch.testing.assert_close(each, layer.layer.weight[:3, None].expand(3, 11, 17))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 11 * 17 * 13
    assert len(products) == 1


@pytest.mark.usefixtures("products")
def test_sparse_inputs() -> None:
    layer, x = layer_of(bias=False), torch.randn(11, 17).to_sparse()
    torch.testing.assert_close(layer(x), F.linear(x.to_dense(), layer.layer.weight))


@pytest.mark.refusal
@pytest.mark.usefixtures("products")
def test_weights_on_the_meta_device_raise() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        layer_of().to("meta")(torch.randn(11, 17))


@pytest.mark.usefixtures("products")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_inputs() -> None:
    assert apply_linear(nn.Linear(0, 5), torch.randn(3, 0)).shape == (3, 5)


def hooked(layer: nn.Linear, calls: list[str]) -> None:
    layer.register_forward_hook(lambda *_: calls.append("forward"))


def watched_backward(layer: nn.Linear, calls: list[str]) -> None:
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))


def replaced(layer: nn.Linear, calls: list[str]) -> None:
    layer.forward = lambda x: calls.append("replaced") or nn.Linear.forward(layer, x)  # type: ignore[method-assign]


@pytest.mark.parametrize("watch", [hooked, watched_backward, replaced])
def test_layers_are_called_if_anything_observes_them(
    watch: Callable[[nn.Linear, list[str]], None], products: list[tuple[int, ...]]
) -> None:
    layer, calls = layer_of(), []
    watch(layer.layer, calls)
    layer(torch.randn(11, 17, requires_grad=True)).sum().backward()
    assert len(calls) == 1
    assert products == []


def test_layers_are_called_if_all_modules_are_observed(
    products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, calls = layer_of(), torch.randn(11, 17), []
    hook = register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    layer(x)
    hook.remove()
    assert calls == [nn.Linear, Applied]
    for owner, method in ((nn.Module, "__call__"), (nn.Linear, "forward")):
        with monkeypatch.context() as patch:
            original = getattr(owner, method)
            patch.setattr(owner, method, lambda *args, o=original, m=method: calls.append(m) or o(*args))
            layer(x)
    assert calls[2:] == ["__call__", "__call__", "forward"]
    assert products == []


@pytest.mark.compile  # fx traces proxies, which shape checking does not accept
@pytest.mark.usefixtures("products")
def test_it_is_traced_by_fx() -> None:
    layer, x = layer_of(), torch.randn(11, 17)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


@there
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_is_faster", lambda: True)
    assert linear.is_faster()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not linear.is_faster()


@pytest.mark.usefixtures("products")
def test_a_wrong_width_raises_the_error_of_pytorch() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer_of()(torch.randn(11, 16))


class TestFallback:
    """Transforms and modes see ordinary operators, and results are equal to the last bit."""

    def test_other_dtypes_and_devices(self, products: list[tuple[int, ...]]) -> None:
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            layer, x = layer_of().to(dtype), torch.randn(11, 17, dtype=dtype)
            assert torch.equal(layer(x), F.linear(x, layer.layer.weight, layer.layer.bias))
        assert layer_of().to("meta")(torch.empty(11, 17, device="meta")).shape == (11, 13)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer_of()(torch.randn(11, 17)).dtype == torch.bfloat16
        assert products == []

    def test_torch_func(self, products: list[tuple[int, ...]]) -> None:
        layer, x = layer_of(), torch.randn(3, 11, 17)
        weights = dict(layer.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(layer, weights, x).square().sum()

        each = vmap(torch.func.grad(loss), (None, 0))(weights, x)
        assert each["layer.weight"].shape == (3, 13, 17)
        direction = {name: torch.ones_like(value) for name, value in weights.items()}
        _, slope = jvp(lambda weights: loss(weights, x), (weights,), (direction,))
        torch.testing.assert_close(slope, sum(g.sum() for g in each.values()), rtol=1e-4, atol=1e-2)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            slope = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(slope, layer.layer.weight.sum(1).expand(3, 11, 13))
        assert products == []

    def test_modes(self, products: list[tuple[int, ...]]) -> None:
        layer, x = layer_of(), torch.randn(11, 17)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 11 * 17 * 13
        assert products == []

    @pytest.mark.compile
    @pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:torch.jit.TracerWarning")
    def test_export_and_traces(self, products: list[tuple[int, ...]]) -> None:
        layer, x = layer_of(), torch.randn(11, 17)
        wanted = F.linear(x, layer.layer.weight, layer.layer.bias)
        exported = torch.export.export(layer, (x,))
        assert {str(node.target) for node in exported.graph.nodes if node.op == "call_function"} == {
            "aten.linear.default"
        }
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for made in (exported.module(), compiled, torch.jit.trace(layer, x, check_trace=False)):
            torch.testing.assert_close(made(x), wanted)
        assert products == []

    def test_subclasses(self, products: list[tuple[int, ...]]) -> None:
        class Tagged(Tensor):
            pass

        assert isinstance(layer_of()(torch.randn(11, 17).as_subclass(Tagged)), Tagged)
        assert products == []


def test_small_products_and_long_sums_use_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    taken = {
        (rows, inner, columns): linear.uses_onednn(torch.empty(rows, inner), torch.empty(columns, inner))
        for rows, inner, columns in [
            *[(64, 64, 64), (256, 512, 512), (4, 1024, 1024), (64, 50_000, 64), (2**21, 3, 1)],
        ]
    }
    assert list(taken.values()) == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_supported_processors(capability: str, vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear, "_vendor", lambda: f"vendor_id\t: {vendor}")
    assert linear._is_faster.__wrapped__() == expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not linear._is_faster.__wrapped__()


def test_the_vendor_is_read_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear._vendor()
    monkeypatch.setattr(linear.Path, "read_text", lambda _: "processor : 0\n")
    assert "Intel" in linear._vendor()
