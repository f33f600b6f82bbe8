"""PyTorch's module hooks on every part of every model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from perceiver_core import Tokens, reads
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's own, for every module whose inputs need no gradients, such as the first one
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning"),
    # PyTorch's own, for modules that return a dictionary or a list
    pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output should be:UserWarning"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # reads with hooks are dense
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(inputs)
    sum(out.square().sum() for out in tree_leaves(outputs) if out.is_floating_point()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def has_gradient(output: object) -> bool:
    """Returns whether backward hooks see a gradient: of a tensor, or of tensors in a tuple, but not in a dictionary."""
    seen = output if isinstance(output, tuple) else (output,)
    return any(isinstance(x, Tensor) and x.requires_grad for x in seen)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_every_part(name: str) -> None:
    """Each is called as often as the module, with its real values, and changes neither outputs nor gradients."""
    model, inputs = make(name)
    expected, out = gradients(model, inputs), model(inputs)
    before, after, backward, pre_backward = Counter(), Counter(), Counter(), Counter()
    needed: Counter[str] = Counter()

    def attach(part: str, module: nn.Module) -> None:
        def forward_hook(_: nn.Module, args: object, output: object) -> None:
            after[part] += 1
            needed[part] += has_gradient(output)

        def backward_hook(_: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: Any) -> None:
            backward[part] += 1
            assert any(x is not None and x.isfinite().all() for x in grad_output if x is None or isinstance(x, Tensor))

        module.register_forward_pre_hook(lambda *_: before.update([part]))
        module.register_forward_hook(forward_hook)
        module.register_full_backward_hook(backward_hook)
        module.register_full_backward_pre_hook(lambda *_: pre_backward.update([part]))

    for part, module in model.named_modules():
        if not isinstance(module, CONTAINERS):
            attach(part, module)
    torch.testing.assert_close(model(inputs), out, **CLOSE)
    for counter in (before, after, needed):
        counter.clear()
    torch.testing.assert_close(gradients(model, inputs), expected, **CLOSE)
    if name == "multimodal":  # the chunks of its decoder are called again in the backward pass, as far as is needed
        for counter in (before, after, needed):
            for part in [part for part in counter if part.startswith("decoder")]:
                del counter[part]
    assert before == after
    parts = {part for part in needed if needed[part]}
    assert {part: backward[part] for part in parts} == {part: needed[part] for part in parts}
    assert {part: pre_backward[part] for part in parts} == {part: needed[part] for part in parts}


def test_a_full_backward_hook_of_an_adapter_gets_the_gradient_of_the_content() -> None:
    model, inputs = make("projected")
    seen: list[tuple[Tensor | None, ...]] = []
    kept: list[Tokens] = []
    model.adapter.register_forward_hook(lambda module, args, output: kept.append(output))
    model.adapter.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output))
    gradients(model, inputs)
    [(d_content, d_tables, d_mask, d_modalities)] = seen
    assert d_tables is None and d_mask is None and d_modalities is None  # PyTorch does not look into the inner tuple
    content = kept[0].content.detach().requires_grad_()
    outputs = model.head(model.encoder(Tokens(content, kept[0].position_tables)))
    (expected,) = torch.autograd.grad(outputs.square().sum(), content)
    torch.testing.assert_close(d_content, expected, **CLOSE)


def test_a_forward_hook_may_replace_tokens() -> None:
    model, inputs = make("image")
    expected = model(inputs * 2)
    model.adapter.stem.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(model(inputs), expected, **CLOSE)
    model.adapter.register_forward_hook(lambda module, args, tokens: pc.Tokens(tokens.content, tokens.position_tables))
    torch.testing.assert_close(model(inputs), expected, **CLOSE)


@pytest.mark.parametrize("part", ["input_norm", "attention.key", "attention.value"])
def test_a_hook_on_a_projection_fires_or_the_read_says_why_not(part: str) -> None:
    """Structured and factored reads use the weights of these parts without calling them."""
    model, inputs = make("image", reads.Auto())
    for read in model.encoder.reads:
        read.get_submodule(part).register_forward_hook(lambda *_: fired.append(part))
    fired: list[str] = []
    model(inputs)
    assert len(fired) == 2  # the second and third step share keys and values
    pc.reads.set_strategy(model, reads.Structured())
    with pytest.raises(ValueError, match="has a hook, which expects it to be called"):
        model(inputs)


def test_latents_after_each_step() -> None:
    """Like `output_hidden_states` of transformers: three lines with forward hooks."""
    model, inputs = make("image")
    states: list[Tensor] = []
    for transformer in model.encoder.transformers:
        transformer.register_forward_hook(lambda module, args, output: states.append(output))
    out = model(inputs)
    assert [tuple(state.shape) for state in states] == [(2, 5, 12)] * 3
    torch.testing.assert_close(model.head(states[-1]), out)


def test_symbolic_tracing_is_refused() -> None:
    """torch.fx records operations on stand-ins, which are no tensors. torch.export traces with tensors."""
    model, _ = make("image")
    with pytest.raises(ValueError, match="co_varnames is too small"):  # of a forward that is decorated
        torch.fx.symbolic_trace(model)
