"""The seven Perceiver classes of transformers and ours: one function, by the files that transformers writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core.checkpoints.state import state_tensors
from perceiver_core.interop import load_transformers, save_transformers
from perceiver_core.interop.published_models import build
from perceiver_core.interop.published_weights import from_transformers

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")

SMALL = {
    "num_latents": 7,
    "d_latents": 24,
    "d_model": 26,
    "num_blocks": 2,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 5,
}
TEXT = {
    "qk_channels": 16,
    "v_channels": 24,
    "num_cross_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 23,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "PerceiverForMaskedLM": TEXT | {"d_model": 32, "self_attention_widening_factor": 2},
    "PerceiverForSequenceClassification": TEXT | {"cross_attention_widening_factor": 3},
    "PerceiverForImageClassificationLearned": {"image_size": 6},
    "PerceiverForImageClassificationFourier": {},
    "PerceiverForImageClassificationConvProcessing": {"use_query_residual": False},
    "PerceiverForOpticalFlow": {"train_size": [5, 7]},
    "PerceiverForMultimodalAutoencoding": {
        "image_size": 8,
        "num_frames": 3,
        "audio_samples_per_frame": 32,
        "samples_per_patch": 16,
        "output_shape": [1, 3, 8, 8],
        "output_num_channels": 18,
    },
}
KINDS = list(SPECIAL)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(kind: str, **more: Any) -> nn.Module:
    """transformers' model, its weights far from where they start."""
    torch.manual_seed(0)
    model = getattr(theirs, kind)(transformers.PerceiverConfig(**(SMALL | SPECIAL[kind] | more))).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


def their_inputs(kind: str, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both are called with: theirs by name, ours by name."""
    config = model.config
    if "MaskedLM" in kind or "Sequence" in kind:
        length = config.max_position_embeddings
        ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, length // 2 :] = False
        return {"inputs": ids, "attention_mask": mask.long()}, {"inputs": ids, "mask": mask}
    if kind == "PerceiverForOpticalFlow":
        frames = drawn(2, 2, 3, *config.train_size)
        pair = pc.adapters.FramePair(positions=None)
        patches = pair.patches(frames).unflatten(-1, (2, 27)).permute(0, 3, 4, 1, 2)
        return {"inputs": patches}, {"inputs": frames}
    if kind == "PerceiverForMultimodalAutoencoding":
        samples = config.num_frames * config.audio_samples_per_frame
        label = torch.zeros(2, config.num_labels, dtype=torch.float64)
        film = drawn(2, config.num_frames, 3, config.image_size, config.image_size)
        inputs = {"image": film, "audio": drawn(2, samples, 1, seed=1), "label": label}
        points = {"image": torch.tensor([3, 0, 100, 191]), "audio": torch.tensor([5, 1, 2])}
        ours = {"image": film, "audio": inputs["audio"][..., 0], "label": label}
        theirs = {"inputs": inputs, "subsampled_output_points": {**points, "label": None}}
        return theirs, {"inputs": ours, "query_inputs": points}
    shape = (6, 6) if "Learned" in kind else (13, 17) if "Fourier" in kind else (23, 37)
    pictures = drawn(2, 3, *shape)
    return {"inputs": pictures}, {"inputs": pictures}


def flat(outputs: Any) -> list[Tensor]:
    found = outputs if isinstance(outputs, dict) else {"": outputs}
    return [found[name] for name in sorted(found)]


@pytest.fixture(autouse=True)
def positions_in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers computes positions in float32 and frequencies in PyTorch's default dtype, not in the model's."""

    def points(sizes: Any, output_range: Any = (-1.0, 1.0), device: Any = None) -> Tensor:
        axes = [torch.linspace(*output_range, size, dtype=torch.float64) for size in sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)

    monkeypatch.setattr(theirs, "build_linear_positions", points)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_outputs_and_gradients_are_theirs(kind: str, tmp_path: Any) -> None:
    model = reference(kind)
    model.save_pretrained(tmp_path)
    ours = load_transformers(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    given, own = their_inputs(kind, model)
    wanted, found = flat(model(**given).logits), flat(ours(**own))
    if kind == "PerceiverForOpticalFlow":
        wanted = [wanted[0].movedim(-1, 1)]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    along = [drawn(*out.shape, seed=5 + i) for i, out in enumerate(found)]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted, list(parameters.values()), along, allow_unused=True)
    own_parameters = dict(ours.named_parameters())
    own_gradients = torch.autograd.grad(found, list(own_parameters.values()), along, allow_unused=True)
    mine = dict(zip(own_parameters, own_gradients, strict=True))
    state = {
        name: torch.zeros_like(x) if mine.get(name) is None else mine[name] for name, x in state_tensors(ours).items()
    }
    mine = from_transformers(config_of(tmp_path), transposed_stem=False).save(state)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(mine[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("text", ["PerceiverForMaskedLM", "PerceiverForSequenceClassification"])
def test_text_under_any_mask(text: str, tmp_path: Any) -> None:
    model = reference(text)
    model.save_pretrained(tmp_path)
    ours = load_transformers(tmp_path)
    length = model.config.max_position_embeddings
    ids = torch.randint(model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(1))
    places = torch.arange(length)
    mask = torch.stack([places < 9, places >= 9, (places < 5) | (places > 11), places % 3 == 1])
    wanted = model(inputs=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(ids, mask=mask), wanted, rtol=1e-9, atol=1e-9)


def agree(model: nn.Module, kind: str, folder: Any) -> None:
    """The same outputs as ours, from what transformers writes."""
    ours = load_transformers(folder)
    given, own = their_inputs(kind, model)
    wanted = flat(model(**given).logits)
    wanted = [wanted[0].movedim(-1, 1)] if kind == "PerceiverForOpticalFlow" else wanted
    torch.testing.assert_close(flat(ours(**own)), wanted, rtol=1e-9, atol=1e-9)


def test_reads_as_wide_as_their_queries(kind: str, tmp_path: Any) -> None:
    widths = {"cross_attention_shape_for_attention": "q", "qk_channels": None, "v_channels": None}
    model = reference(kind, **widths)
    model.save_pretrained(tmp_path)
    agree(model, kind, tmp_path)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"])
def test_activations(activation: str, tmp_path: Any) -> None:
    for kind in ("PerceiverForImageClassificationFourier", "PerceiverForOpticalFlow"):
        model = reference(kind, hidden_act=activation)
        model.save_pretrained(tmp_path / kind)
        agree(model, kind, tmp_path / kind)
        ours = load_transformers(tmp_path / kind)
        save_transformers(ours, tmp_path / f"{kind}_again", config=model.config)
        agree(model, kind, tmp_path / f"{kind}_again")


def test_no_self_attends(kind: str, tmp_path: Any) -> None:
    model = reference(kind, num_self_attends_per_block=0)
    model.save_pretrained(tmp_path)
    agree(model, kind, tmp_path)


def test_weights_in_several_files(kind: str, tmp_path: Any) -> None:
    model = reference(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    agree(model, kind, tmp_path)


def test_what_deepmind_computes_is_written_by_its_activation(tmp_path: Any) -> None:
    kind = "PerceiverForImageClassificationFourier"
    model = reference(kind)
    model.save_pretrained(tmp_path / "theirs")
    deep = pc.interop.DEEPMIND_NUMERICS
    ours = load_transformers(tmp_path / "theirs", numerics=deep)
    save_transformers(ours, tmp_path / "ours", config=tmp_path / "theirs", numerics=deep)
    again = getattr(theirs, kind).from_pretrained(tmp_path / "ours").eval()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float64}
    given, own = their_inputs(kind, model)
    torch.testing.assert_close(ours(**own), again(**given).logits, rtol=1e-9, atol=1e-9)
    assert (again(**given).logits - model(**given).logits).abs().max() > 1e-6


def config_of(folder: Any) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_what_is_written_is_what_transformers_reads(kind: str, tmp_path: Any) -> None:
    model = reference(kind)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_transformers(tmp_path / "theirs")
    with torch.no_grad():
        for weight in ours.parameters():
            weight.mul_(1.5)
    save_transformers(ours, tmp_path / "ours", config=config_of(tmp_path / "theirs"))
    again, told = getattr(theirs, kind).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float64
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    given, own = their_inputs(kind, model)
    wanted = flat(again.eval()(**given).logits)
    wanted = [wanted[0].movedim(-1, 1)] if kind == "PerceiverForOpticalFlow" else wanted
    torch.testing.assert_close(flat(ours(**own)), wanted, rtol=1e-9, atol=1e-9)


def test_it_is_saved_and_loaded_as_any_model(kind: str, tmp_path: Any) -> None:
    model = reference(kind)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_transformers(tmp_path / "theirs")
    again = pc.load(pc.save(ours, tmp_path / "ours")).eval()
    _, own = their_inputs(kind, model)
    torch.testing.assert_close(flat(again(**own)), flat(ours(**own)), rtol=0.0, atol=0.0)


PUBLISHED = {
    "PerceiverForMaskedLM": ({"d_latents": 1280, "qk_channels": 256, "v_channels": 1280}, 201_108_230, 457),
    "PerceiverForImageClassificationLearned": (
        {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6,
         "num_cross_attention_heads": 1, "image_size": 224, "num_labels": 1000}, 62_255_848, 141,
    ),
    "PerceiverForImageClassificationFourier": (
        {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6,
         "num_cross_attention_heads": 1, "num_labels": 1000}, 48_440_627, 136,
    ),
    "PerceiverForImageClassificationConvProcessing": (
        {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6,
         "num_cross_attention_heads": 1, "num_labels": 1000}, 48_646_522, 142,
    ),
    "PerceiverForOpticalFlow": (
        {"num_latents": 2048, "d_latents": 512, "num_self_attends_per_block": 24, "num_self_attention_heads": 16,
         "num_cross_attention_heads": 1}, 41_057_134, 425,
    ),
    "PerceiverForMultimodalAutoencoding": (
        {"num_latents": 784, "d_latents": 512, "num_self_attends_per_block": 8, "num_self_attention_heads": 8,
         "num_cross_attention_heads": 1, "num_labels": 700}, 19_858_855, 183,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_published_sizes(kind: str) -> None:
    config, parameters, tensors = PUBLISHED[kind]
    config = config | {"architectures": [kind]}
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    names = from_transformers(config, transposed_stem=False).theirs
    assert len([name for name in names if not name.endswith(("running_mean", "running_var", "tracked"))]) == (
        tensors - (3 if "Conv" in kind else 0)
    )
