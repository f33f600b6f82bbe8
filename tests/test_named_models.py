"""Models by name: sizes stated in papers, heads for other numbers of classes, features, and errors."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import named_models

NEEDED = {"perceiver_ar": {"vocab_size": 11}}
CLASSIFIERS = sorted(
    name for name, make in named_models._MODELS.items() if "num_classes" in inspect.signature(make).parameters
)
each_model = pytest.mark.parametrize("name", pc.list_models())


def on_no_device(name, **options):
    with torch.device("meta"):
        return pc.create(name, **{**NEEDED.get(name, {}), **options})


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


STATED = {
    "perceiver_imagenet": 44.9,  # Jaegle et al. 2021, section 4.1
    "perceiver_io_language": 201,  # Jaegle et al. 2022, table 1
    "perceiver_io_language_base": 223,
    "perceiver_io_language_large": 425,  # 425.6 are 425 there
    "perceiver_io_imagenet": 48.4,  # appendix A
    "perceiver_io_imagenet_learned": 62.3,
    "perceiver_io_flow": 41,  # appendix H
}


@pytest.mark.parametrize("name", STATED)
def test_numbers_of_parameters_are_those_of_the_papers(name):
    millions = count(on_no_device(name)) / 1e6
    assert STATED[name] in (round(millions, 1), round(millions), int(millions))


TRANSFORMERS = {
    "perceiver_io_imagenet": ("PerceiverForImageClassificationFourier", {"d_model": 261}),
    "perceiver_io_imagenet_conv": ("PerceiverForImageClassificationConvProcessing", {"d_model": 322}),
    "perceiver_io_imagenet_learned": ("PerceiverForImageClassificationLearned", {"d_model": 512, "image_size": 224}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_image_classifiers_have_the_size_of_those_in_transformers(name):
    """Sizes of transformers' conversion of the published weights, convert_perceiver_haiku_to_pytorch.py."""
    transformers = pytest.importorskip("transformers")
    kind, sizes = TRANSFORMERS[name]
    config = transformers.PerceiverConfig(
        num_latents=512,
        d_latents=1024,
        num_blocks=8,
        num_self_attends_per_block=6,
        num_labels=1000,
        **{"num_self_attention_heads": 8, "num_cross_attention_heads": 1, **sizes},
    )
    with torch.device("meta"):
        theirs = getattr(transformers, kind)(config)
    assert count(on_no_device(name)) == count(theirs)


@pytest.mark.parametrize(("name", "dim", "blocks"), [("perceiver_small", 384, 12), ("perceiver_base", 768, 12)])
def test_small_and_base_have_the_blocks_of_deit(name, dim, blocks):
    model = on_no_device(name)
    # timm's Block: two norms, 4 d^2 + 4 d of attention, 8 d^2 + 5 d of the MLP
    assert count(model.encoder.transformers) == blocks * (12 * dim**2 + 13 * dim)
    assert count(model) < {384: 24e6, 768: 92e6}[dim]


VARIANTS = {  # deepmind/hierarchical_perceiver, perceiver.py: groups, blocks, latents, channels, heads of all levels
    "hip_mini": [(16, 1, 16), (2, 1, 1), (128, 64, 128), (128, 1024, 128), (4, 32, 4), 32],
    "hip16": [
        *((16, 4, 1, 1, 1, 4, 16), (2, 2, 18, 2, 1, 1, 1)),
        *((128, 256, 256, 64, 256, 256, 128), (128, 256, 512, 1024, 512, 256, 128), (4, 8, 16, 32, 16, 8, 4), 32),
    ],
    "hip256": [
        *((256, 64, 16, 4, 1, 1, 1, 4, 16, 64, 256), (1, 1, 2, 2, 18, 2, 1, 1, 1, 1, 1)),
        *((32, 64, 128, 256, 256, 64, 256, 256, 128, 64, 32), (64, 96, 128, 256, 512, 1024, 256, 128, 64, 32, 16)),
        *((1, 2, 4, 8, 16, 32, 16, 8, 4, 2, 1), 16),
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_hierarchical_perceivers_have_the_published_levels(name):
    model = on_no_device(name)
    levels = [part.level for part in (*model.encoding, *model.decoding)]
    sizes = ("num_groups", "depth", "num_latents", "dim", "num_heads")
    assert [tuple(getattr(level, size) for level in levels) for size in sizes] == VARIANTS[name][:5]
    assert model.positions.dim == VARIANTS[name][5]


@each_model
def test_every_model_is_saved_and_documented(name):
    assert named_models._MODELS[name].__doc__.count("Reference:") or "reference" in named_models._MODELS[name].__doc__
    model = on_no_device(name)
    config = pc.registry.to_config(model)
    with torch.device("meta"):
        again = pc.registry.from_config(config)
    assert count(again) == count(model)


class TestNumberOfClasses:
    def test_classifiers(self):
        assert [
            *("perceiver_audioset", "perceiver_base", "perceiver_imagenet", "perceiver_io_imagenet"),
            *("perceiver_io_imagenet_conv", "perceiver_io_imagenet_learned", "perceiver_io_multimodal"),
            *("perceiver_io_text", "perceiver_modelnet40", "perceiver_small"),
        ] == CLASSIFIERS

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_it_changes_only_the_head(self, name):
        model, other = (dict(on_no_device(name, **options).named_parameters()) for options in ({}, {"num_classes": 7}))
        changed = {path for path in model if model[path].shape != other[path].shape}
        assert model.keys() == other.keys()
        if name == "perceiver_io_multimodal":  # the label is an input, too
            assert {path.partition(".")[0] for path in changed} == {"adapter", "encoder", "head"}
        else:
            assert len(changed) == 2
            assert all(path.startswith(("head.", "decoder.output.")) for path in changed)
            assert {other[path].shape[0] for path in changed} == {7}

    @pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name != "perceiver_io_multimodal"])
    def test_none_leaves_features(self, name):
        model, features = on_no_device(name), on_no_device(name, num_classes=0)
        missing = dict(model.named_parameters()).keys() - dict(features.named_parameters()).keys()
        assert {path.rpartition(".")[0] for path in missing} in ({"head.logits"}, {"decoder.output"})

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["perceiver_modelnet40", "perceiver_io_text"])
    def test_features_are_the_input_of_the_last_layer(self, name):
        options = {"max_length": 13} if name == "perceiver_io_text" else {}
        inputs = torch.arange(26).view(2, 13) if options else torch.rand(2, 23, 3)
        torch.manual_seed(0)
        model, features = (
            on_no_device(name, **options).to_empty(device="cpu").eval(),
            on_no_device(name, num_classes=0, **options),
        )
        for parameter in model.parameters():  # the library's own truncated normals would take seconds
            nn.init.uniform_(parameter, -0.05, 0.05)
        model.encoder.latents = nn.Parameter(model.encoder.latents[:7])  # fewer, for speed
        features.encoder.latents = model.encoder.latents
        assert features.load_state_dict(model.state_dict(), assign=True, strict=False).missing_keys == []
        last = model.head.logits if name == "perceiver_modelnet40" else model.decoder.output
        with torch.no_grad():
            actual = features.eval()(inputs)
            assert actual.shape == (2, last.in_features)
            torch.testing.assert_close(last(actual), model(inputs), rtol=1e-5, atol=1e-5)

    @pytest.mark.refusal
    def test_multimodal_models_need_classes(self):
        with pytest.raises(ValueError, match="num_labels as a whole number from 1"):
            on_no_device("perceiver_io_multimodal", num_classes=0)
        with pytest.raises(ValueError, match="num_classes must be a whole number of at least 0; got -1"):
            on_no_device("perceiver_imagenet", num_classes=-1)


class TestNames:
    def test_patterns(self):
        names = pc.list_models()
        assert names == sorted(names) and len(names) == len(set(names)) == 19
        assert pc.list_models("*io*") == [name for name in names if "io" in name]
        assert pc.list_models("hip[12]?[56]") == ["hip256"]
        assert pc.list_models("none") == []

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        ("name", "options", "error", "message"),
        [
            ("perciever_imagenet", {}, ValueError, "got 'perciever_imagenet'. Did you mean 'perceiver_imagenet' or "),
            ("resnet", {}, ValueError, r"name must be one of list_models\(\); got 'resnet'$"),
            (
                "perceiver_imagenet",
                {"num_class": 3},
                TypeError,
                r"create\('perceiver_imagenet'\).*mean 'num_classes'\?",
            ),
            ("perceiver_imagenet", {"pretrained": True}, TypeError, "'pretrained'; it accepts num_classes$"),
            ("hip16", {"num_classes": 3}, TypeError, "'num_classes'; it accepts input_dim, num_tokens$"),
            ("perceiver_ar", {}, TypeError, "missing 1 required positional argument: 'vocab_size'"),
        ],
    )
    def test_wrong_names_raise(self, name, options, error, message):
        with pytest.raises(error, match=message):
            pc.create(name, **options)

    def test_models_are_modules(self):
        assert all(isinstance(on_no_device(name), nn.Module) for name in ("hip_mini", "idefics2_resampler"))
