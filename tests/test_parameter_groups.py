"""Parameter groups: which parameters decay, the layers in the order in which models run them, and optimizers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import perceiver_core as pc
from perceiver_core import adapters, heads, positions
from tests.integration.whole_models import MODELS, encoder, make

each_model = pytest.mark.parametrize("name", MODELS)
BLOCKS = (pc.CrossAttend, pc.SelfAttend, pc.JointAttend)


def groups_of(model, **options):
    return pc.parameter_groups(model, **{"weight_decay": 0.1, **options})


def names_of(model, groups, wanted=lambda group: True):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in groups if wanted(group) for parameter in group["params"]]


def layers_of(model, **options):
    """Layer of each parameter, by name."""
    groups = groups_of(model, layer_decay=0.5, **options)
    return {name: group["layer"] for group in groups for name in names_of(model, [group])}


def perceiver(**options):
    adapter = adapters.Audio(4, positions=positions.LearnedGrid((7,), dim=6))
    made = encoder(adapter.dim, **options)
    return pc.Perceiver(adapter, made, heads.Classification(made.dim, 3))


class TestEveryParameterOnce:
    @each_model
    @pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}, {"layer_decay": 0.7, "lr": 0.1}], ids=str)
    def test_trainable_parameters(self, name, options):
        model, _ = make(name)
        groups = groups_of(model, **options)
        assert sorted(names_of(model, groups)) == sorted(name for name, _ in model.named_parameters())
        assert len({group["name"] for group in groups}) == len(groups)
        assert all(group["params"] for group in groups)
        assert all(("lr" in group) == ("lr" in options) for group in groups)
        assert all(("lr_scale" in group) == (options == {"layer_decay": 0.7}) for group in groups)

    def test_frozen_parameters_are_left_out(self):
        model = perceiver()
        model.encoder.requires_grad_(False)
        names = names_of(model, groups_of(model, layer_decay=0.5))
        assert sorted(names) == sorted(name for name, _ in model.named_parameters() if not name.startswith("encoder"))
        assert groups_of(model.requires_grad_(False)) == []

    def test_layers_do_not_depend_on_what_is_frozen(self):
        model = perceiver()
        before = layers_of(model)
        model.encoder.reads.requires_grad_(False)
        after = layers_of(model)
        assert after == {name: before[name] for name in after}


class TestDecay:
    @each_model
    def test_it_is_timms_rule_except_for_arrays_of_vectors(self, name):
        """timm, optim/_param_groups.py, `param_groups_weight_decay`: no decay for `ndim <= 1` and names in ".bias"."""
        model, _ = make(name)
        timm = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(".bias")}
        free = set(names_of(model, groups_of(model), lambda group: not group["weight_decay"]))
        vectors = {name for name in timm if name.rpartition(".")[2] in ("latents", "vectors", "offsets", "scales")}
        assert timm - vectors == set(names_of(model, groups_of(model), lambda group: group["weight_decay"]))
        assert vectors <= free
        assert vectors

    def test_parts_of_torch(self):
        model = nn.ModuleDict(
            {
                "linear": nn.Linear(3, 1),
                "conv": nn.Conv1d(3, 5, 2),
                "cell": nn.GRUCell(3, 5),
                "bilinear": nn.Bilinear(2, 3, 4),
                "attention": nn.MultiheadAttention(4, 2, add_bias_kv=False),
                "layer_norm": nn.LayerNorm((3, 5)),
                "batch_norm": nn.BatchNorm2d(3),
                "prelu": nn.PReLU(3),
                "embedding": nn.Embedding(3, 5),
                "lstm": nn.LSTM(3, 5),
            }
        )
        assert names_of(model, groups_of(model), lambda group: group["weight_decay"]) == [
            *("linear.weight", "conv.weight", "cell.weight_ih", "cell.weight_hh", "bilinear.weight"),
            *("attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
        ]

    def test_user_defined_modules(self):
        class Linear(nn.Module):  # as transformers' Conv1D: a weight that multiplies, without torch's class
            def __init__(self):
                super().__init__()
                self.weight, self.bias = nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(5))

        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.scale = nn.Parameter(torch.ones(7, 5)), nn.Parameter(torch.ones(5))
                self.weight = nn.Parameter(torch.ones(1, 1, 5))  # a gate

        class Scaled(nn.Linear):
            def __init__(self):
                super().__init__(3, 5)
                self.gain = nn.Parameter(torch.ones(5))

        class Vectors(nn.Embedding):
            pass

        model = nn.ModuleList([Linear(), Positions(), Scaled(), Vectors(3, 5)])
        decaying = names_of(model, groups_of(model), lambda group: group["weight_decay"])
        assert decaying == ["0.weight", "2.weight"]

        def matrices(module, name, parameter):
            return parameter.ndim == 2

        groups = groups_of(model, decays=matrices)
        assert "1.table" in names_of(model, groups, lambda group: group["weight_decay"])

    def test_a_parameter_of_several_modules_decays_only_if_it_does_in_each(self):
        table, head = nn.Embedding(5, 3), nn.Linear(3, 5)
        head.weight = table.weight
        for parts in ([table, head], [head, table]):
            model = nn.ModuleList(parts)
            assert names_of(model, groups_of(model), lambda group: group["weight_decay"]) == []

    def test_parametrized_and_pruned_layers(self):
        model = nn.ModuleDict({name: nn.Linear(3, 5) for name in ("spectral", "normed", "pruned")})
        parametrizations.spectral_norm(model["spectral"])
        parametrizations.weight_norm(model["normed"])
        prune.l1_unstructured(model["pruned"], "weight", amount=3)
        decaying = names_of(model, groups_of(model), lambda group: group["weight_decay"])
        assert {"spectral.parametrizations.weight.original", "normed.parametrizations.weight.original1"} <= {*decaying}
        assert "pruned.weight_orig" in decaying
        assert not [name for name in decaying if "bias" in name]


class TestLayers:
    @each_model
    def test_blocks_are_numbered_as_the_model_runs_them_last(self, name):
        """Against the order of the calls of a forward pass, observed by hooks."""
        model, inputs = make(name)
        names, calls = {id(part): path for path, part in model.named_modules()}, []
        for part in model.modules():
            if isinstance(part, BLOCKS):
                part.register_forward_pre_hook(lambda part, args: calls.append(names[id(part)]))
        model(inputs)
        last = {path: position for position, path in enumerate(calls)}
        order = sorted(last, key=last.get)
        layers = layers_of(model)
        for number, path in enumerate(order, 1):
            assert {layer for name, layer in layers.items() if name.startswith(f"{path}.")} == {number}
        inside = [name for name in layers if any(name.startswith(f"{path}.") for path in order)]
        assert {layers[name] for name in layers.keys() - {*inside}} <= set(range(len(order) + 2))

    def test_an_unshared_perceiver_has_the_layers_of_beit(self):
        """BEiT, optim_factory.py, `get_num_layer_for_vit`: 0 for embeddings, then the blocks, the rest last."""
        model, layers = perceiver(share=False, depth=2, num_reads=2), {}
        blocks = ("reads.0.", "transformers.0.blocks.0.", "transformers.0.blocks.1.")
        blocks += ("reads.1.", "transformers.1.blocks.0.", "transformers.1.blocks.1.")
        for name, _ in model.named_parameters():
            if name in ("encoder.latents", "adapter.positions.vectors"):
                layers[name] = 0
            else:
                layers[name] = next((i for i, block in enumerate(blocks, 1) if name.startswith(f"encoder.{block}")), 7)
        assert layers_of(model) == layers
        for group in groups_of(model, layer_decay=0.5, lr=0.2):
            assert group["lr"] == 0.2 * 0.5 ** (7 - group["layer"])
        for group in groups_of(model, layer_decay=0.5):
            assert group["lr_scale"] == 0.5 ** (7 - group["layer"])

    @pytest.mark.parametrize(
        ("share", "order"),
        [
            (True, ["reads.0", "reads.1", "transformers.0.blocks.0", "transformers.0.blocks.1"]),
            (pc.sharing.all_, ["reads.0", "transformers.0.blocks.0", "transformers.0.blocks.1"]),
            (
                lambda steps: pc.sharing.Sharing(reads=(0, 1, 0), transformers=(0, 1, 0)),
                [
                    *("reads.1", "transformers.1.blocks.0", "transformers.1.blocks.1"),
                    *("reads.0", "transformers.0.blocks.0", "transformers.0.blocks.1"),
                ],
            ),
        ],
        ids=["paper", "all", "alternating"],
    )
    @pytest.mark.parametrize("num_repeats", [1, 3])
    def test_shared_blocks_count_once_where_they_are_used_last(self, share, order, num_repeats):
        transformer = partial(pc.LatentTransformer, num_repeats=num_repeats)
        model = perceiver(share=share, num_reads=3, depth=2, latent_transformer=transformer)
        layers = layers_of(model)
        for number, path in enumerate(order, 1):
            assert {layer for name, layer in layers.items() if name.startswith(f"encoder.{path}.")} == {number}
        assert layers["head.logits.weight"] == len(order) + 1

    def test_a_tied_embedding_counts_as_head(self):
        model, _ = make("text")
        layers = layers_of(model)
        assert layers["embedding.vectors"] == layers["head.bias"] == layers["norm.weight"] == 4
        assert layers["embedding.positions.vectors"] == 0

    def test_queries_belong_to_the_decoder(self):
        layers = layers_of(make("sound")[0])
        decoder = layers["decoder.cross_attention.attention.query.weight"]
        assert layers["queries.vectors"] == decoder
        assert layers["decoder.output.weight"] == layers["head.samples.weight"] == decoder + 1

    def test_aggregates_belong_to_the_next_block(self):
        layers = layers_of(make("gated")[0])
        block = layers["encoder.transformers.0.blocks.0.norm.weight"]
        assert layers["encoder.transformers.0.aggregates.0.norm.weight"] == block + 1

    def test_blocks_and_transformers_of_other_classes(self):
        class Block(nn.Module):
            def __init__(self, dim, *, num_heads):
                super().__init__()
                self.linear = nn.Linear(dim, dim)

        blocks = perceiver(latent_transformer=partial(pc.LatentTransformer, block=Block), depth=2)
        layers = layers_of(blocks)
        assert [layers[f"encoder.transformers.0.blocks.{i}.linear.weight"] for i in (0, 1)] == [3, 4]

        def transformer(dim, *, depth, num_heads):
            return nn.TransformerEncoder(
                nn.TransformerEncoderLayer(dim, num_heads, 8), depth, enable_nested_tensor=False
            )

        layers = layers_of(perceiver(latent_transformer=transformer, depth=2))
        assert [layers[f"encoder.transformers.0.layers.{i}.linear1.weight"] for i in (0, 1)] == [3, 4]

        layers = layers_of(perceiver(latent_transformer=lambda dim, **options: nn.Linear(dim, dim)))
        assert (layers["encoder.transformers.0.weight"], layers["head.logits.weight"]) == (3, 4)

    def test_a_model_of_models(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = nn.Linear(3, 3)
                self.first, self.second = perceiver(num_reads=1), pc.Resampler(12, num_latents=3, depth=1, num_heads=2)
                self.top = nn.Linear(3, 3)

        layers = layers_of(Both())
        assert (layers["stem.weight"], layers["second.layers.0.norm.weight"], layers["top.weight"]) == (0, 3, 4)
        assert layers["first.head.logits.weight"] == layers["second.latents"] == 3

    def test_a_model_without_blocks_has_one_layer(self):
        groups = groups_of(nn.Linear(3, 5), layer_decay=0.5, lr=0.1)
        assert [(group["layer"], group["lr"]) for group in groups] == [(0, 0.1), (0, 0.1)]


class TestWrappers:
    def test_compiled_replicated_and_recomputed_models_have_the_groups_of_the_model(self):
        model = make("multimodal")[0]
        expected = groups_of(model, layer_decay=0.5)
        for wrapped in (torch.compile(model), nn.DataParallel(model), nn.Sequential(model)):
            assert same(groups_of(wrapped, layer_decay=0.5), expected)
        model.encoder.transformers[0].blocks[0] = torch.compile(model.encoder.transformers[0].blocks[0])
        model.decoder.cross_attention = torch.compile(model.decoder.cross_attention)
        assert same(groups_of(pc.checkpoint_activations(model), layer_decay=0.5), expected)

    def test_distributed_data_parallel(self, tmp_path):
        model = make("multimodal")[0]
        expected = groups_of(model, layer_decay=0.5)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            assert same(groups_of(nn.parallel.DistributedDataParallel(model), layer_decay=0.5), expected)
        finally:
            torch.distributed.destroy_process_group()


def same(groups, others):
    """Compares groups with parameters by identity."""
    plain = [[{**group, "params": [*map(id, group["params"])]} for group in each] for each in (groups, others)]
    return plain[0] == plain[1]


class TestOptimizers:
    def test_adamw_shrinks_what_decays_at_the_rate_of_its_layer(self):
        model = perceiver(share=False)
        groups = groups_of(model, weight_decay=0.2, layer_decay=0.5, lr=0.1)
        before = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW(groups).step()
        for group in groups:
            for parameter in group["params"]:
                torch.testing.assert_close(parameter, before[id(parameter)] * (1 - group["lr"] * group["weight_decay"]))
        assert {group["weight_decay"] for group in groups} == {0.0, 0.2}

    def test_states_of_optimizers_and_schedulers_are_restored(self):
        states = []
        for _ in range(2):
            optimizer = torch.optim.AdamW(groups_of(perceiver(), layer_decay=0.5, lr=0.1))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
            states.append((optimizer, scheduler))
        states[1][0].load_state_dict(states[0][0].state_dict())
        assert [group["name"] for group in states[1][0].param_groups][:2] == ["layer_0.no_decay", "layer_1.decay"]
        lr = [group["lr"] for group in states[1][0].param_groups]
        assert lr[0] == pytest.approx(0.5 * 0.1 * 0.5**4) and lr[-1] == pytest.approx(0.05)

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
    def test_muon_takes_the_matrices_of_the_blocks(self):
        model, inputs = make("image")
        groups = groups_of(model, layer_decay=1.0, lr=0.02)
        last = groups[-1]["layer"]
        hidden = [group for group in groups if group["weight_decay"] and 0 < group["layer"] < last]
        rest = [group for group in groups if all(group is not other for other in hidden)]
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizers = [torch.optim.Muon(hidden), torch.optim.AdamW(rest)]  # Muon refuses all but matrices
        model(inputs).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        assert "head.logits.weight" in names_of(model, rest)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be at least 0; got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number; got nan"),
        ({"layer_decay": 0.0}, r"layer_decay must lie in \(0, 1\]; got 0.0"),
        ({"layer_decay": 1.1}, r"layer_decay must lie in \(0, 1\]; got 1.1"),
        ({"lr": -1.0}, "lr must be at least 0; got -1.0"),
    ],
)
def test_invalid_numbers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        groups_of(nn.Linear(3, 5), **options)
