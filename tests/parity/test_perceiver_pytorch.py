"""perceiver-pytorch's models as ours: outputs and all gradients, by the same weights; and which models are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file, save_model

import perceiver_core as pc
from perceiver_core.interop import load_perceiver_pytorch

theirs = pytest.importorskip("perceiver_pytorch")

GRIDS = {1: (17,), 2: (5, 7), 3: (2, 3, 5)}
PERCEIVER = {
    "num_freq_bands": 3,
    "depth": 2,
    "max_freq": 7.0,
    "input_channels": 3,
    "input_axis": 2,
    "num_latents": 5,
    "latent_dim": 14,
    "cross_heads": 1,
    "latent_heads": 2,
    "cross_dim_head": 11,
    "latent_dim_head": 6,
    "num_classes": 13,
    "weight_tie_layers": False,
    "fourier_encode_data": True,
    "self_per_cross_attn": 1,
}
PERCEIVERS = {
    "base": {},
    "one layer": {"depth": 1},
    "two tied": {"weight_tie_layers": True},
    "three tied": {"depth": 3, "weight_tie_layers": True},
    "three untied": {"depth": 3},
    "no self-attend": {"self_per_cross_attn": 0},
    "two self-attends, tied": {"self_per_cross_attn": 2, "weight_tie_layers": True, "depth": 3},
    "heads": {"cross_heads": 3, "latent_heads": 5},
    "widths": {"cross_dim_head": 4, "latent_dim_head": 9, "latent_dim": 22, "num_latents": 7},
    "bands": {"num_freq_bands": 5, "max_freq": 23},
    "one band": {"num_freq_bands": 1},
    "sequence": {"input_axis": 1, "input_channels": 2},
    "video": {"input_axis": 3, "input_channels": 1, "self_per_cross_attn": 2},
    "no positions": {"fourier_encode_data": False, "input_channels": 11},
    "no head": {"final_classifier_head": False},
    "inverted": {"inverted_cross_attn": True, "cross_heads": 2},
    "attention residuals": {"attn_residual": True, "attn_residual_rank": 3, "depth": 3},
    "attention residuals, tied": {"attn_residual": True, "depth": 3, "weight_tie_layers": True},
}
IO = {
    "depth": 3,
    "dim": 11,
    "queries_dim": 13,
    "logits_dim": 17,
    "num_latents": 5,
    "latent_dim": 14,
    "cross_heads": 1,
    "latent_heads": 2,
    "cross_dim_head": 7,
    "latent_dim_head": 6,
    "weight_tie_layers": False,
    "decoder_ff": False,
}
IOS = {
    "base": {},
    "no layer": {"depth": 0},
    "one layer": {"depth": 1},
    "tied": {"weight_tie_layers": True},
    "feed-forward": {"decoder_ff": True},
    "no logits": {"logits_dim": None},
    "no logits, feed-forward, tied": {"logits_dim": None, "decoder_ff": True, "weight_tie_layers": True},
    "heads": {"cross_heads": 3, "latent_heads": 5},
    "widths": {"cross_dim_head": 2, "latent_dim_head": 9, "latent_dim": 22, "num_latents": 7, "queries_dim": 3},
    "inverted": {"inverted_cross_attn": True},
    "attention residuals": {"attn_residual": True, "attn_residual_rank": 3},
    "attention residuals, tied": {"attn_residual": True, "weight_tie_layers": True},
}
SAID = (
    "max_freq",
    "input_channels",
    "input_axis",
    "cross_heads",
    "latent_heads",
    "fourier_encode_data",
    "inverted_cross_attn",
)  # not inferred


def made(model, config):
    """Theirs, with weights that all matter."""
    torch.manual_seed(0)
    their = getattr(theirs, model)(**config).double()
    with torch.no_grad():
        for parameter in their.parameters():  # norms start at 1, biases at 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return their


def agree(our, their, config, outs, given):
    """The same outputs, and the same gradients of all weights and of what went in."""
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)
    toward = torch.randn_like(outs[0])
    for out in outs:
        (out * toward).sum().backward()
    for ours, of_them in given:
        torch.testing.assert_close(ours.grad, of_them.grad, rtol=0, atol=1e-8)
    gradients = {name: p.grad for name, p in their.state_dict(keep_vars=True).items()}
    wanted = dict(load_perceiver_pytorch(gradients, **config).named_parameters())  # under our names
    found = dict(our.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(
            parameter.grad, wanted[name].data, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def state(their):
    return copy.deepcopy(their).state_dict()


def twice(x):
    """The same for both models."""
    return x.clone().requires_grad_(), x.clone().requires_grad_()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("changes", PERCEIVERS.values(), ids=PERCEIVERS.keys())
def test_outputs_and_gradients_of_perceiver(changes, masked):
    config = PERCEIVER | changes
    their = made("Perceiver", config)
    our = load_perceiver_pytorch(state(their), **config)
    assert isinstance(our, pc.Perceiver) and not our.training
    data = twice(torch.randn(2, *GRIDS[config["input_axis"]], config["input_channels"], dtype=torch.float64))
    mask = torch.rand(data[0].shape[:-1]) < 0.6 if masked else None
    agree(our, their, config, (our(data[0], mask=mask), their(data[1], mask=mask)), [data])


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("batched", [False, True], ids=["q d", "b q d"])
@pytest.mark.parametrize("changes", IOS.values(), ids=IOS.keys())
def test_outputs_and_gradients_of_perceiver_io(changes, batched, masked):
    config = IO | changes
    their = made("PerceiverIO", config)
    our = load_perceiver_pytorch(state(their), **config)
    assert isinstance(our, pc.PerceiverIO) and not our.training
    data = twice(torch.randn(2, 19, config["dim"], dtype=torch.float64))
    asked = twice(torch.randn(*((2,) if batched else ()), 23, config["queries_dim"], dtype=torch.float64))
    mask = torch.rand(data[0].shape[:-1]) < 0.6 if masked else None
    outs = our(data[0], mask=mask, query_inputs=asked[0]), their(data[1], mask=mask, queries=asked[1])
    agree(our, their, config, outs, [data, asked])


@pytest.mark.refusal
def test_flat_masks_must_be_reshaped():
    """Theirs takes them too; ours asks for the shape of the grid."""
    their = made("Perceiver", PERCEIVER)
    our, data = load_perceiver_pytorch(state(their), **PERCEIVER), torch.randn(2, 5, 7, 3, dtype=torch.float64)
    mask = torch.rand(2, 35) < 0.6
    torch.testing.assert_close(our(data, mask=mask.view(data.shape[:-1])), their(data, mask=mask), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5, 7\), one value a token; got \(2, 35\)"):
        our(data, mask=mask)


def test_latents_of_perceiver_io():
    their = made("PerceiverIO", IO)
    our, data = load_perceiver_pytorch(state(their), **IO), torch.randn(2, 19, 11, dtype=torch.float64)
    torch.testing.assert_close(our.encoder(our.adapter(data)), their(data), rtol=0, atol=1e-9)


def test_embeddings_of_perceiver():
    their = made("Perceiver", PERCEIVER)
    our, data = load_perceiver_pytorch(state(their), **PERCEIVER), torch.randn(2, 5, 7, 3, dtype=torch.float64)
    wanted = their(data, return_embeddings=True)
    torch.testing.assert_close(our.encoder(our.adapter(data)), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("model, base, cases", [("Perceiver", PERCEIVER, PERCEIVERS), ("PerceiverIO", IO, IOS)])
def test_what_shapes_tell_need_not_be_told(model, base, cases):
    for changes in cases.values():
        config = base | changes
        weights = state(made(model, config))
        told = {name: value for name, value in config.items() if name in SAID}
        whole, little = (load_perceiver_pytorch(weights, **given) for given in (config, told))
        assert {n: p.shape for n, p in whole.named_parameters()} == {n: p.shape for n, p in little.named_parameters()}
        if not (config["depth"] == 2 and config["weight_tie_layers"]):  # nothing is tied then
            assert pc.registry.to_config(whole) == pc.registry.to_config(little)


def test_widths_of_heads_tell_their_number():
    weights = state(made("Perceiver", PERCEIVER))
    our = load_perceiver_pytorch(weights, max_freq=7.0, cross_dim_head=11, latent_dim_head=6)
    assert (
        our.encoder.reads[0].attention.num_heads == 1 and our.encoder.transformers[0].blocks[0].attention.num_heads == 2
    )


def test_their_defaults_are_ours():
    their = theirs.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=3, num_classes=2)
    our, data = load_perceiver_pytorch(their.state_dict(), max_freq=10.0), torch.randn(1, 3, 5, 3)
    torch.testing.assert_close(our(data), their(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"weight_tie_layers": True, "depth": 3}], ids=["untied", "tied"])
def test_weights_are_theirs_without_a_copy(changes):
    their = theirs.Perceiver(**(PERCEIVER | changes))
    our = load_perceiver_pytorch(their.state_dict(), **(PERCEIVER | changes))
    places = {p.untyped_storage().data_ptr() for p in their.parameters()}
    assert {p.untyped_storage().data_ptr() for p in our.parameters()} == places
    assert all(p.requires_grad and p.is_leaf for p in our.parameters())


class TestDropout:
    """In training the same is drawn from the same seed, in the same order."""

    def both(self, model, config, *given):
        their = made(model, config)
        our = load_perceiver_pytorch(state(their), **config)
        outs = []
        for one, arguments in ((our, given[0]), (their, given[1])):
            torch.manual_seed(7)
            outs.append(one.train()(**arguments))
        return outs, our.eval()(**given[0])

    def data(self, *shape):
        return torch.randn(*shape, dtype=torch.float64)

    @pytest.mark.parametrize(
        "rates", [{"ff_dropout": 0.4}, {"attn_dropout": 0.4}, {"ff_dropout": 0.2, "attn_dropout": 0.3}]
    )
    def test_of_feed_forwards_and_attention(self, rates):
        data = self.data(2, 5, 7, 3)
        outs, without = self.both("Perceiver", PERCEIVER | rates, {"inputs": data}, {"data": data})
        torch.testing.assert_close(*outs, rtol=0, atol=1e-9)
        assert not torch.allclose(outs[0], without, atol=1e-3)

    @pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
    def test_of_tokens(self, masked):
        data, asked = self.data(2, 19, 11), self.data(23, 13)
        mask = torch.rand(2, 19) < 0.6 if masked else None
        ours, them = (
            {"inputs": data, "query_inputs": asked, "mask": mask},
            {"data": data, "queries": asked, "mask": mask},
        )
        outs, without = self.both("PerceiverIO", IO | {"seq_dropout_prob": 0.45}, ours, them)
        torch.testing.assert_close(*outs, rtol=0, atol=1e-9)
        assert not torch.allclose(outs[0], without, atol=1e-3)


class TestFiles:
    def test_a_safetensors_file(self, tmp_path):
        their = made("Perceiver", PERCEIVER)
        save_file(their.state_dict(), tmp_path / "model.safetensors")
        our, data = (
            load_perceiver_pytorch(tmp_path / "model.safetensors", **PERCEIVER),
            torch.randn(2, 5, 7, 3).double(),
        )
        torch.testing.assert_close(our(data), their(data), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("model, config", [("Perceiver", PERCEIVER | {"depth": 3}), ("PerceiverIO", IO)])
    def test_tied_layers_that_a_file_holds_once(self, model, config, tmp_path):
        their = made(model, config | {"weight_tie_layers": True})
        save_model(their, tmp_path / "model.safetensors")
        told = {name: value for name, value in config.items() if name in SAID}
        our, whole = (
            load_perceiver_pytorch(tmp_path / "model.safetensors", **told),
            load_perceiver_pytorch(their.state_dict(), **told),
        )
        assert pc.registry.to_config(our) == pc.registry.to_config(whole)
        torch.testing.assert_close(our.state_dict(), whole.state_dict())

    @pytest.mark.parametrize("model, config", [("Perceiver", PERCEIVER | {"depth": 3}), ("PerceiverIO", IO)])
    def test_tied_layers_that_are_there_once(self, model, config):
        config = config | {"weight_tie_layers": True}
        weights = state(made(model, config))
        once = {
            name: x
            for name, x in weights.items()
            if not name.startswith(("layers.2", *["layers.1"] * ("dim" in config)))
        }
        our, whole = load_perceiver_pytorch(once, **config), load_perceiver_pytorch(weights, **config)
        torch.testing.assert_close(our.state_dict(), whole.state_dict())

    def test_it_is_saved_and_loaded(self, tmp_path):
        config = PERCEIVER | {"depth": 3, "weight_tie_layers": True, "ff_dropout": 0.1, "attn_dropout": 0.2}
        our, data = load_perceiver_pytorch(state(made("Perceiver", config)), **config), torch.randn(2, 5, 7, 3).double()
        torch.testing.assert_close(pc.load(pc.save(our, tmp_path))(data), our(data))

    def test_io_is_saved_and_loaded(self, tmp_path):
        config = IO | {"weight_tie_layers": True, "seq_dropout_prob": 0.25, "decoder_ff": True}
        our, data = (
            load_perceiver_pytorch(state(made("PerceiverIO", config)), **config),
            torch.randn(2, 19, 11).double(),
        )
        again, asked = pc.load(pc.save(our, tmp_path)), torch.randn(23, 13).double()
        torch.testing.assert_close(again(data, query_inputs=asked), our(data, query_inputs=asked))
        assert again.adapter.rate == 0.25

    @pytest.mark.parametrize("model, base, cases", [("Perceiver", PERCEIVER, PERCEIVERS), ("PerceiverIO", IO, IOS)])
    def test_names_of_versions_before_0_11(self, model, base, cases):
        for changes in cases.values():
            config = base | changes
            new = state(made(model, config))
            old = {before(model, name): x for name, x in new.items()}
            torch.testing.assert_close(
                load_perceiver_pytorch(old, **config).state_dict(), load_perceiver_pytorch(new, **config).state_dict()
            )


def before(model, name):
    """What versions 0.8 to 0.10 call a weight."""
    io = model == "PerceiverIO"
    for new, old in (
        ("cross_attend_block.cross_attn.", "cross_attend_blocks.0."),
        ("cross_attend_block.cross_ff.", "cross_attend_blocks.1."),
        ("layers.", "layers."),
        ("self_attns.0." if io else "self_attns.", "" if io else "2."),
        ("cross_attn." if name.startswith("layers") else "\0", "0."),
        ("cross_ff." if name.startswith("layers") else "\0", "1."),
    ):
        name = name.replace(new, old)
    return name


@pytest.mark.refusal
class TestRefusals:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"max_freq": None}, "max_freq must be given"),
            ({"max_freq": float("nan")}, "max_freq must be given, a positive number.*got nan"),
            ({"max_freq": float("inf")}, "max_freq must be given, a positive number.*got inf"),
            ({"max_freq": True}, "max_freq must be given, a positive number.*got True"),
            ({"max_freq": 0.0}, "max_freq must be given, a positive number.*got 0.0"),
            ({"num_freq_bands": 4}, r"num_freq_bands=4 \+ 1\) must be 17, .*norm_context.weight.*; got 21"),
            ({"input_axis": 1}, r"input_axis=1 x .* must be 17"),
            ({"input_channels": 5}, r"input_channels=5 \+ .* must be 17"),
            ({"input_axis": 0}, "input_axis must be a whole number"),
            ({"num_latents": 6}, r"num_latents must be 5, which the weights have \(latents\); got 6"),
            ({"latent_dim": 15}, "latent_dim must be 14"),
            ({"depth": 3}, "depth must be 2, the number of layers in the weights; got 3"),
            ({"depth": 1}, "depth must be 2"),
            (
                {"cross_heads": 2},
                r"cross_heads=2 times cross_dim_head=11 must be 11, the rows of .*to_q.weight; got 22",
            ),
            ({"latent_heads": 5, "latent_dim_head": 2}, "latent_heads=5 times latent_dim_head=2 must be 12"),
            ({"latent_heads": 0}, "latent_heads must be a whole number of at least 1"),
            ({"num_classes": 12}, "num_classes must be 13"),
            ({"final_classifier_head": False}, "final_classifier_head must be True"),
            ({"self_per_cross_attn": 2}, "self_per_cross_attn must be 1"),
            ({"ff_dropout": 1.5}, r"ff_dropout must lie in \[0, 1\)"),
            ({"attn_residual": True}, r"attn_residual must be False, which the weights have \(attn_residuals"),
            ({"inverted_cross_attn": (False, True)}, r"the same for all layers; got \(False, True\)"),
        ],
    )
    def test_refused_arguments_of_perceiver(self, changes, message):
        with pytest.raises(ValueError, match=message):
            load_perceiver_pytorch(state(made("Perceiver", PERCEIVER)), **(PERCEIVER | changes))

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"dim": 12}, "dim must be 11"),
            ({"queries_dim": 12}, "queries_dim must be 13"),
            ({"logits_dim": None}, "logits_dim must be 17.*got None"),
            ({"decoder_ff": True}, "decoder_ff must be False"),
            (
                {"weight_tie_layers": True},
                "weight_tie_layers must be False, since layers after number 0 differ; got True",
            ),
            ({"seq_dropout_prob": 1.0}, r"seq_dropout_prob must lie in \[0, 1\)"),
        ],
    )
    def test_refused_arguments_of_perceiver_io(self, changes, message):
        with pytest.raises(ValueError, match=message):
            load_perceiver_pytorch(state(made("PerceiverIO", IO)), **(IO | changes))

    def test_refused_heads_that_were_not_told(self):
        with pytest.raises(ValueError, match=r"latent_heads=8 times latent_dim_head=64 must be 12.* Give latent_heads"):
            load_perceiver_pytorch(state(made("Perceiver", PERCEIVER)), max_freq=7.0, cross_heads=1)

    @pytest.mark.parametrize("model, config", [("Perceiver", PERCEIVER), ("PerceiverIO", IO)])
    def test_refused_names_of_arguments(self, model, config):
        with pytest.raises(TypeError, match=rf"{model} takes no \['dept'\]; it takes \['attn_"):
            load_perceiver_pytorch(state(made(model, config)), dept=3)

    def test_refused_attention_residuals_of_another_rank(self):
        weights = theirs.PerceiverIO(**IO, attn_residual=True).state_dict()
        with pytest.raises(ValueError, match="attn_residual_rank must be 64"):
            load_perceiver_pytorch(weights, **IO, attn_residual_rank=32)
        with pytest.raises(ValueError, match="attn_residual must be True"):
            load_perceiver_pytorch(weights, **IO, attn_residual=False)

    @pytest.mark.parametrize(
        "lost", ["latents", "layers.1.cross_ff.fn.net.2.bias", "layers.0.cross_attn.fn.to_q.weight"]
    )
    def test_refused_without_a_weight(self, lost):
        weights = state(made("Perceiver", PERCEIVER))
        del weights[lost]
        with pytest.raises(ValueError, match=rf"{lost}.* missing|missing \['{lost}'\]"):
            load_perceiver_pytorch(weights, **PERCEIVER)

    def test_refused_weights_are_named_five_at_most(self):
        weights = state(made("Perceiver", PERCEIVER))
        more = {f"more.{number}": torch.zeros(2) for number in range(7)}
        with pytest.raises(ValueError, match=r"unknown \['more.0', 'more.1', 'more.2', 'more.3', 'more.4'\]$"):
            load_perceiver_pytorch(weights | more, **PERCEIVER)

    def test_refused_shapes(self):
        weights = state(made("Perceiver", PERCEIVER))
        weights["layers.1.cross_attn.fn.to_kv.weight"] = torch.zeros(20, 17)
        with pytest.raises(
            ValueError, match=r"layers.1.cross_attn.fn.to_kv.weight has shape \(20, 17\) .*, not \(22, 17\)"
        ):
            load_perceiver_pytorch(weights, **PERCEIVER)
        with pytest.raises(ValueError, match=r"latents must have 2 axes at least .* its shape is \(5,\)"):
            load_perceiver_pytorch(weights | {"latents": torch.zeros(5)}, **PERCEIVER)

    def test_refused_models(self):
        with pytest.raises(TypeError, match=r"got Perceiver\. Give model\.state_dict\(\)"):
            load_perceiver_pytorch(made("Perceiver", PERCEIVER), **PERCEIVER)
        with pytest.raises(TypeError, match="got NoneType"):
            load_perceiver_pytorch(None)

    def test_refused_state_dicts(self, tmp_path):
        with pytest.raises(ValueError, match=r"first names are \['module.latents'"):
            load_perceiver_pytorch(
                {f"module.{name}": x for name, x in state(made("Perceiver", PERCEIVER)).items()}, max_freq=7.0
            )
        with pytest.raises(ValueError, match="'epoch' is of type int"):
            load_perceiver_pytorch({"epoch": 3})
        with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
            load_perceiver_pytorch(tmp_path / "nowhere.safetensors")
        (tmp_path / "model.pt").write_bytes(b"PK something")
        with pytest.raises(ValueError, match=r"model.pt is not a complete safetensors file.* weights_only=True"):
            load_perceiver_pytorch(tmp_path / "model.pt")
