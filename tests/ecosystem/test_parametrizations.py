"""Models with parametrized weights: weight norm, spectral norm, orthogonal matrices, and parametrizations of a user."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's own: the older weight_norm, which is tested too
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
OLDER = {
    "weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in MODELS for kind in KINDS if kind == "weight norm" or name in ("image", "flow", "text")],
)
def test_every_linear_layer(name: str, kind: str, tmp_path: Path) -> None:
    """The model computes with the parametrized weights, is not saved before they are kept, and then is."""
    model, inputs = make(name)
    expected = copy.deepcopy(model)
    for layer in linears(model):
        KINDS[kind](layer, "weight")
    model.eval()
    with torch.no_grad():
        for layer, plain in zip(linears(model), linears(expected), strict=True):
            plain.weight.copy_(layer.weight)
    torch.testing.assert_close(model(inputs), expected(inputs), **CLOSE)
    with pytest.raises(ValueError, match=r"computes weight from other tensors.*parametrize\.remove_parametrizations"):
        pc.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for layer in linears(model):
        parametrize.remove_parametrizations(layer, "weight")
    again = pc.load(pc.save(model, tmp_path))
    torch.testing.assert_close(again(inputs), expected(inputs), **CLOSE)


@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.parametrize("name", ["image", "text", "flow", "frames", "hierarchical"])
def test_norms_by_hooks(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    add, remove = OLDER[kind]
    for layer in linears(model):
        add(layer)
    model.eval()
    actual = model(inputs)
    with pytest.raises(ValueError, match=r"computes weight from other tensors"):
        pc.save(model, tmp_path)
    for layer in linears(model):
        remove(layer)
    torch.testing.assert_close(pc.load(pc.save(model, tmp_path))(inputs), actual, **CLOSE)


class Doubled(nn.Module):
    """Keeps half of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(model: nn.Module, parametrization: Callable[[], nn.Module] = Doubled) -> list[tuple[nn.Module, str]]:
    """Parametrizes every parameter of every module: weights, biases, latents, tables, embeddings, queries and gates.

    A tied weight is parametrized where it is first: PyTorch parametrizes attributes of modules and not tensors, so that
    an attribute of another module keeps the original.
    """
    changed, seen = [], set()
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                changed.append((module, name))
    for module, name in changed:
        parametrize.register_parametrization(module, name, parametrization())
    return changed


TIED = "text"  # its head uses the vectors of its embedding


@pytest.mark.parametrize("name", [name for name in MODELS if name != TIED])
def test_every_parameter(name: str, tmp_path: Path) -> None:
    """Outputs and gradients are those of the plain model, up to the factor of the parametrization."""
    model, inputs = make(name)
    expected = copy.deepcopy(model)
    changed = parametrized(model)
    assert len(changed) == len(list(expected.parameters()))
    actual, wanted = model(inputs), expected(inputs)
    torch.testing.assert_close(actual, wanted, **CLOSE)
    for outputs in (actual, wanted):
        sum(out.square().mean() for out in tree_leaves(outputs)).backward()
    for path, parameter in expected.named_parameters():
        owner, _, attribute = path.rpartition(".")
        original = model.get_parameter(f"{owner}.parametrizations.{attribute}.original".lstrip("."))
        if parameter.grad is None:
            assert original.grad is None
        else:
            torch.testing.assert_close(original.grad, 2 * parameter.grad, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"computes \w+(, \w+)* from other tensors"):
        pc.save(model, tmp_path)
    for module, attribute in changed:
        parametrize.remove_parametrizations(module, attribute)
    torch.testing.assert_close(pc.load(pc.save(model, tmp_path))(inputs), wanted, **CLOSE)


@pytest.mark.parametrize("parts", ["projections", "norm", "bias"])
def test_structured_reads_see_the_parametrized_weights_or_refuse(parts: str) -> None:
    model, inputs = make("image", pc.reads.Auto())
    expected = copy.deepcopy(model)
    for read in model.encoder.reads:
        attention = read.attention
        for layer, name in {
            "projections": [(attention.key, "weight"), (attention.value, "weight")],
            "norm": [(read.input_norm, "weight")],
            "bias": [(attention.value, "bias")],
        }[parts]:
            parametrize.register_parametrization(layer, name, Doubled())
    torch.testing.assert_close(model(inputs), expected(inputs), **CLOSE)
    for read in pc.explain_reads(model, inputs):
        assert read.strategy == pc.reads.Dense()
        assert "Structured cannot: " in read.why and "Factored cannot: " in read.why
    for strategy in (pc.reads.Structured(), pc.reads.Factored()):
        pc.reads.set_strategy(model, strategy)
        with pytest.raises(ValueError, match=r"cannot compute this read: the (projection|norm)"):
            model(inputs)


def test_cached_parametrizations() -> None:
    model, inputs = make("image")
    expected = model(inputs)
    parametrized(model)
    with parametrize.cached():
        torch.testing.assert_close(model(inputs), expected, **CLOSE)


def test_a_parametrized_embedding_and_its_tied_head() -> None:
    """PyTorch leaves the other module of a tie with the original tensor."""
    model, inputs = make(TIED)
    expected = model(inputs)
    parametrize.register_parametrization(model.embedding, "vectors", Doubled())
    assert model.head.vectors is model.embedding.parametrizations.vectors.original
    with torch.no_grad():
        model.head.vectors.mul_(2)  # both are the same tensor
        model.embedding.parametrizations.vectors[0] = nn.Identity()
    torch.testing.assert_close(model(inputs), expected, **CLOSE)


def test_spectral_norm_in_training() -> None:
    """The power iteration runs once for each forward pass, and the largest singular value becomes 1."""
    model, inputs = make("image")
    for layer in linears(model):
        parametrizations.spectral_norm(layer, "weight")
    model.train()
    for _ in range(30):
        model(inputs)
    model.eval()
    for layer in linears(model):
        assert abs(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) - 1) < 0.05


def test_parametrized_models_are_copied() -> None:
    model, inputs = make("image")
    parametrized(model)
    torch.testing.assert_close(copy.deepcopy(model)(inputs), model(inputs), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported"):
        pickle.dumps(model)  # PyTorch's own rule
    again, _ = make("image")
    parametrized(again)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(inputs), model(inputs), rtol=0, atol=0)
