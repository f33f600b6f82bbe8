"""Random draws from a generator of the user's: the same when activation checkpointing computes a pass again."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perceiver_core as pc
from perceiver_core.layers import random_draws
from perceiver_core.layers.random_draws import RepeatableDraws

EXACT = {"rtol": 0, "atol": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def encoder(input_dim: int, **options: Any) -> pc.Encoder:
    torch.manual_seed(0)
    return pc.Encoder(input_dim, num_latents=11, dim=14, depth=1, num_heads=2, num_reads=2, **options)


def with_dropped_latents(generator: torch.Generator | None) -> nn.Module:
    return encoder(10, latent_dropout=pc.DropLatents(0.5, generator=generator))


def with_dropped_tokens(generator: torch.Generator | None) -> nn.Module:
    adapter = pc.adapters.DropTokens(pc.adapters.Grid(10, positions=None), rate=0.5, generator=generator)
    return pc.Perceiver(adapter, encoder(10), pc.heads.Identity())


def with_dropped_modalities(generator: torch.Generator | None) -> nn.Module:
    torch.manual_seed(1)
    adapter = pc.adapters.Multimodal(
        {name: pc.adapters.Grid(10, positions=None) for name in ("a", "b")},
        modality_dropout={"a": 0.5, "b": 0.5},
        token_mask_rate={"a": 0.5},
        generator=generator,
    )
    return pc.Perceiver(adapter, encoder(adapter.dim), pc.heads.Identity())


class WithPrefixDropout(nn.Module):
    """A Perceiver AR with the generator of its forward passes."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        embedding = pc.adapters.TokenEmbedding(vocab_size=11, dim=14)
        self.model = pc.PerceiverAR(embedding, num_latents=3, depth=1, num_heads=1, prefix_dropout=0.5)
        self.generator = generator

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, generator=self.generator)


MODELS: dict[str, tuple[Callable[[torch.Generator | None], nn.Module], Callable[[int], Any]]] = {
    "DropLatents": (with_dropped_latents, lambda seed: drawn(3, 17, 10, seed=seed)),
    "DropTokens": (with_dropped_tokens, lambda seed: drawn(3, 17, 10, seed=seed)),
    "Multimodal": (
        with_dropped_modalities,
        lambda seed: {"a": drawn(3, 17, 10, seed=seed), "b": drawn(3, 5, 10, seed=seed)},
    ),
    "PerceiverAR": (WithPrefixDropout, lambda seed: torch.randint(11, (3, 23), generator=seeded(seed))),
}
each_model = pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=MODELS)


def checkpointed(model: nn.Module, x: Any) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def passes(
    model: nn.Module, inputs: Callable[[int], Any], call: Callable[[nn.Module, Any], Tensor], order: tuple[int, ...]
) -> list[Any]:
    """Runs forward passes, then their backward passes in an order; returns outputs and gradients."""
    outs = [call(model, inputs(seed)) for seed in range(len(order))]
    gradients = {
        i: torch.autograd.grad(outs[i].square().sum(), list(model.parameters()), allow_unused=True) for i in order
    }
    return [outs, [gradients[i] for i in sorted(gradients)]]


@each_model
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "default generator"])
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_gradients_are_those_without_checkpointing(make, inputs, order, own) -> None:
    results = []
    for call in (lambda model, x: model(x), checkpointed):
        model = make(seeded() if own else None).double().train()
        torch.manual_seed(7)
        results.append(passes(model, inputs, call, order))
    torch.testing.assert_close(*results, **EXACT)


@each_model
def test_draws_of_passes_differ(make, inputs) -> None:
    """The test above would otherwise compare nothing."""
    model = make(seeded()).double().train()
    outs = [model(inputs(0)) for _ in range(4)]
    assert any(out.shape != outs[0].shape or not torch.equal(out, outs[0]) for out in outs[1:])


@each_model
def test_a_generator_decides_the_draws(make, inputs) -> None:
    """Equal seeds of the user's generator give equal draws, whatever the state of the default one."""
    outs = []
    for seed, default in ((0, 1), (0, 2), (5, 1)):
        model = make(seeded(seed)).double().train()
        torch.manual_seed(default)
        outs.append([model(inputs(0)) for _ in range(4)])
    torch.testing.assert_close(outs[0], outs[1], **EXACT)
    assert any(not torch.equal(a, b) for a, b in zip(outs[0], outs[2], strict=True))


@each_model
def test_checkpointed_blocks_around_random_draws(make, inputs) -> None:
    """With checkpoint_activations, for modules that draw and for the blocks inside them."""
    results = []
    for change in (
        lambda model: model,
        lambda model: pc.checkpoint_activations(model, (pc.Encoder, pc.Perceiver, pc.PerceiverAR)),
        lambda model: pc.checkpoint_activations(
            model, (pc.DropLatents, pc.adapters.DropTokens, pc.adapters.Multimodal, pc.CrossAttend)
        ),
    ):
        model = change(make(seeded()).double().train())
        torch.manual_seed(7)
        results.append(passes(model, inputs, lambda model, x: model(x), (1, 0)))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    torch.testing.assert_close(results[2], results[0], **EXACT)


@each_model
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_passes_from_one_state_of_the_default_generator(make, inputs, order) -> None:
    """Seeding the default generator before each pass does not make them one."""
    results = []

    def seeded_anew(call: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        def run(model: nn.Module, x: Any) -> Tensor:
            torch.manual_seed(7)
            return call(model, x)

        return run

    for call in (lambda model, x: model(x), checkpointed):
        model = make(seeded()).double().train()
        results.append(passes(model, inputs, seeded_anew(call), order))
    torch.testing.assert_close(*results, **EXACT)


@each_model
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_checkpoints_with_other_hooks_inside(make, inputs, order) -> None:
    def offloaded(model: nn.Module, x: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    results = []
    for call in (lambda model, x: model(x), lambda model, x: checkpoint(offloaded, model, x, use_reentrant=False)):
        model = make(seeded()).double().train()
        torch.manual_seed(7)
        results.append(passes(model, inputs, call, order))
    torch.testing.assert_close(*results, **EXACT)


@each_model
def test_the_default_generator_is_not_used(make, inputs) -> None:
    model = make(seeded()).double().train()
    state = torch.get_rng_state()
    for call in (lambda model, x: model(x), checkpointed):
        call(model, inputs(0)).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_can_be_used_twice() -> None:
    model = with_dropped_latents(seeded()).double().train()
    loss = checkpointed(model, drawn(3, 17, 10)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), first, **EXACT)


def test_reentrant_checkpoints() -> None:
    results = []
    for reentrant in (None, True):
        model, x = with_dropped_latents(seeded()).double().train(), drawn(3, 17, 10).requires_grad_()
        torch.manual_seed(7)
        losses = []
        for _ in range(2):
            out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=True)
            losses.append(out.square().sum())
            torch.rand(1)  # moves the default generator, by which reentrant passes are told apart
        for loss in losses:
            loss.backward()
        results.append([x.grad, *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*results, **EXACT)


@each_model
def test_no_draws_in_evaluation(make, inputs) -> None:
    generator = seeded()
    before = generator.get_state(), torch.get_rng_state()
    model = make(generator).double().eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(model(inputs(0)), model(inputs(0)), **EXACT)
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), state)


@each_model
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copied_model_draws_what_the_model_draws(make, inputs, again) -> None:
    model = make(seeded()).double().train()
    model(inputs(0))
    twin = again(model)
    for seed in range(3):
        torch.testing.assert_close(twin(inputs(seed)), model(inputs(seed)), **EXACT)


def test_a_model_can_be_written_by_torch_save() -> None:
    model, file = with_dropped_latents(seeded()).train(), io.BytesIO()
    x = drawn(3, 17, 10).float()
    model(x)
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x), **EXACT)


class TestRepeatableDraws:
    def test_without_a_generator_it_is_the_default_one(self):
        state = torch.get_rng_state()
        assert RepeatableDraws().generator(None) is None
        assert torch.equal(torch.get_rng_state(), state)

    def test_only_a_limited_number_of_states_is_kept(self, monkeypatch):
        monkeypatch.setattr(random_draws, "MAX_STATES", 5)
        draws, generator = RepeatableDraws(), seeded()
        for seed in range(17):
            torch.manual_seed(seed)
            draws.generator(generator)
        assert len(draws._states) == 5
        assert len(draws._frames) == 0

    def test_states_of_a_checkpoint_are_dropped_with_its_graph(self):
        model = with_dropped_latents(seeded()).train()
        x, frames = drawn(3, 17, 10).float(), model.latent_dropout._draws._frames
        outs = [checkpointed(model, x) for _ in range(3)]
        assert len(frames) == 3
        del outs[0]
        gc.collect()
        assert len(frames) == 2

    def test_a_model_in_evaluation_after_training_is_saved_without_its_generator(self, tmp_path):
        model = with_dropped_latents(seeded()).train()
        x = drawn(3, 17, 10).float()
        model(x)
        again = pc.load(pc.save(model, tmp_path))
        torch.testing.assert_close(again.eval()(x), model.eval()(x), **EXACT)
        assert again.latent_dropout.generator is None
