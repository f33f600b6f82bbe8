"""Models under compile, autocast, activation checkpointing, torch.func and second derivatives."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from perceiver_core import (
    CrossAttend,
    Encoder,
    LatentTransformer,
    MultiHeadAttention,
    Perceiver,
    SelfAttend,
    adapters,
    checkpoint_activations,
    heads,
    positions,
    reads,
    sharing,
)
from perceiver_core.kernels import chunked, fastest, reference, sdpa

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KERNELS = {"fastest": fastest, "sdpa": sdpa, "reference": reference, "chunked": partial(chunked, chunk_size=5)}
STRATEGIES = {"dense": reads.Dense(), "factored": reads.Factored(), "structured": reads.Structured()}
FOURIER = partial(positions.Fourier, num_bands=2, max_resolution=7)
ANY = reads.Auto()
ADAPTERS = {
    "pixels": lambda: adapters.Image(3, positions=FOURIER(2)),
    "patches": lambda: adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.Patches, patch_size=(2, 3))),
    "convolved": lambda: adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.ConvStem, dim=4)),
    "learned": lambda: adapters.Image(1, positions=positions.LearnedGrid((3, 5), dim=4)),
    "audio": lambda: adapters.Audio(5, positions=FOURIER(1)),
    "points": lambda: adapters.PointCloud(2, positions=FOURIER(3)),
}
SHAPES = {
    "pixels": lambda b, n: (b, 3, n, 7),
    "patches": lambda b, n: (b, 3, n, 7),
    "convolved": lambda b, n: (b, 3, n, 13),
    "learned": lambda b, n: (b, 1, n, 7),
    "audio": lambda b, n: (b, 5 * n + 2),
    "points": lambda b, n: (b, n, 5),
}


def model_of(kind="points", *, share=sharing.paper, kernel=fastest, reads=3, dropout=0.0, latents=5, strategy=ANY):
    torch.manual_seed(0)
    adapter = ADAPTERS[kind]()
    attention = partial(MultiHeadAttention, kernel=kernel)
    encoder = Encoder(
        adapter.dim,
        num_latents=latents,
        dim=14,
        num_reads=reads,
        depth=1,
        num_heads=7,
        share=share,
        cross_attention=partial(CrossAttend, attention=attention, dropout=dropout, strategy=strategy),
        latent_transformer=partial(LatentTransformer, block=partial(SelfAttend, attention=attention, dropout=dropout)),
    )
    return Perceiver(adapter, encoder, heads.Classification(encoder.dim, 11))


def batch_of(kind="points", b=2, n=13, *, masked=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(SHAPES[kind](b, n), generator=generator) * 2 - 1
    if not masked:
        return (x,), {}
    mask = torch.rand(b, n, generator=generator) < 0.6
    mask[:, 0] = True
    return (x,), {"mask": mask}


def outputs_and_gradients(model, call, args, options):
    model.zero_grad()
    out = call(*args, **options)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


SIZED = ["pixels", "audio", "points"]


@pytest.mark.compile
@pytest.mark.usefixtures("fresh")
class TestCompile:
    def agrees(self, model, batches, *, backend="aot_eager", **options):
        # In float64: a compiled model may use another read strategy, which rounds differently.
        compiled = torch.compile(model.double(), fullgraph=True, backend=backend, **options)
        for args, named in batches:
            args = torch.utils._pytree.tree_map(Tensor.double, args)
            actual = outputs_and_gradients(model, compiled, args, named)
            expected = outputs_and_gradients(model, model, args, named)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("kind", ADAPTERS)
    def test_every_adapter(self, kind):
        self.agrees(model_of(kind, reads=1), [batch_of(kind)])

    @pytest.mark.parametrize("share", [sharing.none, sharing.all_, sharing.paper])
    def test_every_scheme_with_a_mask(self, share):
        self.agrees(model_of(share=share, reads=2), [batch_of(masked=True)])

    # Dynamo instantiates the Function to look at it, which PyTorch deprecates.
    @pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("kernel", [reference, partial(chunked, chunk_size=5)], ids=["reference", "chunked"])
    def test_kernels(self, kernel):
        self.agrees(model_of(kernel=kernel, reads=1), [batch_of(masked=True)])

    @pytest.mark.parametrize("kind", SIZED)
    def test_varying_sizes_compile_once(self, kind):
        batches = [batch_of(kind, b, n, masked=kind == "points") for b, n in ((2, 13), (3, 17), (5, 11))]
        with torch._dynamo.config.patch(error_on_recompile=True):
            self.agrees(model_of(kind, reads=1), batches, dynamic=True)

    @pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
    @pytest.mark.parametrize("kind", ["pixels", "audio"])
    def test_every_strategy(self, kind, strategy):
        batches = [batch_of(kind, b, n) for b, n in ((2, 13), (3, 17))]
        with torch._dynamo.config.patch(error_on_recompile=True):
            self.agrees(model_of(kind, reads=2, strategy=strategy), batches, dynamic=True)

    def test_inputs_per_read(self):
        torch.manual_seed(0)
        both = adapters.PerRead([ADAPTERS["pixels"](), ADAPTERS["audio"]()])
        encoder = Encoder(both.dim, num_latents=5, dim=14, num_reads=2, depth=1, num_heads=7, share=False)
        model = Perceiver(both, encoder, heads.Regression(14))
        self.agrees(model, [(((torch.rand(2, 3, 7, 5), torch.rand(2, 23)),), {})])

    def test_recomputed_activations(self):
        self.agrees(checkpoint_activations(model_of(reads=1)), [batch_of(masked=True)])

    @pytest.mark.slow
    def test_inductor(self):
        if torch.__version__.startswith("2.6."):
            pytest.skip("the inductor of PyTorch 2.6 gives the attention kernel float32 log-sum-exps for float64")
        self.agrees(model_of(reads=2), [batch_of(masked=True)], backend="inductor")

    @pytest.mark.slow
    def test_inductor_in_single_precision(self):
        model, (args, options) = model_of(reads=2, strategy=reads.Dense()), batch_of(masked=True)
        compiled = torch.compile(model, fullgraph=True)
        actual = outputs_and_gradients(model, compiled, args, options)
        torch.testing.assert_close(actual, outputs_and_gradients(model, model, args, options), rtol=1e-3, atol=1e-4)


class TestAutocast:
    @pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=str)
    @pytest.mark.parametrize("kind", ["pixels", "points"])
    def test_outputs_and_gradients_are_close_to_float32(self, kind, dtype, tolerance, kernel):
        model = model_of(kind, kernel=kernel)
        args, options = batch_of(kind, masked=kind == "points")

        def narrow(*args, **options):
            with torch.autocast("cpu", dtype):
                return model(*args, **options)

        wide_out, *wide = outputs_and_gradients(model, model, args, options)
        out, *gradients = outputs_and_gradients(model, narrow, args, options)
        assert out.dtype == dtype
        assert 0 < (out.float() - wide_out).norm() < tolerance / 5 * wide_out.norm()
        actual, expected = (torch.cat([gradient.flatten() for gradient in given]) for given in (gradients, wide))
        assert 0 < (actual - expected).norm() < tolerance * expected.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_models(self, dtype):
        model = model_of().to(dtype)
        (x,), options = batch_of(masked=True)
        out = model(x.to(dtype), **options)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), model_of()(x, **options), rtol=0.1, atol=0.1)


class Saved:
    """Number of bytes that autograd saves for the backward pass, without parameters."""

    def __init__(self, model):
        self.bytes, self.own = 0, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() not in self.own:
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


class TestActivationCheckpointing:
    @pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
    @pytest.mark.parametrize("kind", ["pixels", "points"])
    @pytest.mark.parametrize("share", [sharing.none, sharing.paper])
    def test_outputs_gradients_and_state_are_unchanged(self, kind, share, strategy):
        plain = model_of(kind, share=share, strategy=strategy)
        model = checkpoint_activations(model_of(kind, share=share, strategy=strategy))
        args, options = batch_of(kind, masked=kind == "points")
        actual = outputs_and_gradients(model, model, args, options)
        torch.testing.assert_close(actual, outputs_and_gradients(plain, plain, args, options), rtol=0, atol=0)
        torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)

    def test_dropout_is_the_same_in_both_passes(self):
        args, options = batch_of()
        actual = []
        for model in (model_of(dropout=0.5), checkpoint_activations(model_of(dropout=0.5))):
            torch.manual_seed(1)
            actual.append(outputs_and_gradients(model, model, args, options))
        torch.testing.assert_close(*actual, rtol=0, atol=0)

    def test_less_memory_is_kept(self):
        kept = []
        for change in (nn.Identity(), checkpoint_activations):
            model = change(model_of(latents=47, reads=5))
            saved = Saved(model)
            with saved.hooks:
                model(*batch_of(n=11)[0])
            kept.append(saved.bytes)
        assert kept[1] < kept[0] / 3

    def test_only_selected_blocks(self):
        model = checkpoint_activations(model_of(), blocks=(SelfAttend,))
        changed = {type(module) for module in model.modules() if "forward" in vars(module)}
        assert changed == {SelfAttend}

    def test_a_copy_computes_with_its_own_weights(self):
        model = checkpoint_activations(model_of(kernel=reference))
        twin = copy.deepcopy(model)
        (x,), _ = batch_of()
        before = model(x).detach()
        with torch.no_grad():
            for parameter in twin.encoder.parameters():
                parameter.zero_()
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        out = twin(x)
        torch.testing.assert_close(out, twin.head(torch.zeros(2, 5, 14)), rtol=0, atol=0)
        twin.encoder.latents.data.normal_()
        outputs_and_gradients(twin, twin, (x,), {})
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_functional_call_uses_the_passed_weights(self):
        model = checkpoint_activations(model_of())
        (x,), _ = batch_of()
        other = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
        plain = model_of()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(1.5)
        torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), plain(x), **CLOSE)


class TestFunctional:
    def loss(self, model):
        def of(parameters, x):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        return of, {name: parameter.detach() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
    def test_gradients(self, kernel):
        model = model_of(kernel=kernel).double()
        x = batch_of()[0][0].double()
        loss, parameters = self.loss(model)
        actual = torch.func.grad(loss)(parameters, x)
        loss(dict(model.named_parameters()), x).backward()
        torch.testing.assert_close(actual, {n: p.grad for n, p in model.named_parameters()}, **CLOSE)

    @pytest.mark.parametrize("kind", ["pixels", "audio", "points"])
    @pytest.mark.parametrize("kernel", [reference, partial(chunked, chunk_size=5)], ids=["reference", "chunked"])
    def test_per_sample_gradients(self, kind, kernel):
        model = model_of(kind, kernel=kernel).double()
        x = batch_of(kind, b=3)[0][0].double()
        loss, parameters = self.loss(model)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
        for i in range(3):
            alone = torch.func.grad(loss)(parameters, x[i : i + 1])
            torch.testing.assert_close({n: g[i] for n, g in each.items()}, alone, **CLOSE)

    def test_per_sample_gradients_with_structured_reads(self):
        model = model_of("pixels", kernel=fastest, strategy=reads.Structured(), reads=1).double()
        x = batch_of("pixels", b=3)[0][0].double()

        def loss(read, x):
            tokens = model.adapter(x)
            return (
                torch.func.functional_call(model.encoder.reads[0], read, (model.encoder.latents[None], tokens))
                .sin()
                .sum()
            )

        weights = {name: parameter.detach() for name, parameter in model.encoder.reads[0].named_parameters()}
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x.unsqueeze(1))
        for i in range(3):
            alone = torch.func.grad(loss)(weights, x[i : i + 1])
            torch.testing.assert_close({n: g[i] for n, g in each.items()}, alone, **CLOSE)

    def test_ensembles(self):
        models = [model_of(kernel=reference) for _ in range(3)]  # PyTorch has no batching rule for its own
        for i, model in enumerate(models):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * i)
        (x,), _ = batch_of()
        parameters, buffers = torch.func.stack_module_state(models)
        outs = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(outs, torch.stack([model(x) for model in models]), **CLOSE)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func's own
    def test_forward_mode_equals_finite_differences(self):
        model = model_of(kernel=reference).double()
        x, toward = batch_of()[0][0].double(), batch_of(seed=1)[0][0].double()
        _, actual = torch.func.jvp(model, (x,), (toward,))
        step = 1e-6
        differences = (model(x + step * toward) - model(x - step * toward)) / (2 * step)
        torch.testing.assert_close(actual, differences, rtol=1e-6, atol=1e-7)

    def test_second_derivatives(self):
        model = model_of(kernel=reference, reads=2).double()
        (x,), _ = batch_of(n=3)
        x = x[:1].double().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda given: model(given).sum(-1), (x,), atol=1e-4)

    def test_a_penalty_on_gradients_trains(self):
        model = model_of(kernel=reference)
        x = batch_of()[0][0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert grads["encoder.latents"].abs().max() > 0
        assert all(gradient.isfinite().all() for gradient in grads.values())
