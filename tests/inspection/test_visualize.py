"""Plots: maps equal the attention weights, and plotted elements are distinguishable."""

from functools import partial

import numpy as np
import pytest
import torch

import perceiver_core as pc
from perceiver_core.inspection import visualize

GRID = (13, 7)


@pytest.fixture
def model() -> pc.Perceiver:
    torch.manual_seed(0)
    image = pc.adapters.Image(
        num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=3, max_resolution=16)
    )
    read = partial(pc.CrossAttend, num_heads=2, attention=partial(pc.MultiHeadAttention, qk_dim=10, dropout=0.5))
    encoder = pc.Encoder(
        image.dim, num_latents=5, dim=11, num_reads=3, depth=1, num_heads=1, cross_attention=read, share=False
    )
    return pc.Perceiver(image, encoder, pc.heads.Classification(11, num_classes=2))


def test_map_sums_to_one_over_the_grid(model: pc.Perceiver) -> None:
    weights = visualize.attention_map(model, torch.randn(2, 3, *GRID))
    assert weights.shape == (2, 2, 5, *GRID)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 2, 5))


def test_map_equals_the_formula_at_every_read(model: pc.Perceiver) -> None:
    pictures = torch.randn(2, 3, *GRID)
    model.eval()
    tokens = model.adapter(pictures)
    x = model.encoder.latents.expand(2, -1, -1)
    for step in range(3):
        read = model.encoder.reads[step]
        q = read.attention.query(read.query_norm(x)).unflatten(-1, (2, 5)).transpose(1, 2)
        k = read.attention.key(read.input_norm(tokens.materialize())).unflatten(-1, (2, 5)).transpose(1, 2)
        expected = (q @ k.mT / 5**0.5).softmax(-1).unflatten(-1, GRID)
        torch.testing.assert_close(visualize.attention_map(model, pictures, read=step), expected)
        x = model.encoder.transformers[step](read(x, tokens))


@pytest.mark.parametrize("read", [0, 1, 2, -1])
def test_map_of_a_read_that_shares_its_weights(read: int) -> None:
    torch.manual_seed(0)
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=3, max_resolution=16))
    encoder = pc.Encoder(image.dim, num_latents=5, dim=11, num_reads=3, depth=1, num_heads=1)
    shared = pc.Perceiver(image, encoder, pc.heads.Identity())
    pictures = torch.randn(2, 3, *GRID)
    weights = visualize.attention_map(shared, pictures, read=read)
    assert weights.shape == (2, 1, 5, *GRID)
    torch.testing.assert_close(weights.flatten(3), encoder.attention_map(image(pictures), read=read))


def test_map_of_selected_latents_and_of_the_last_read(model: pc.Perceiver) -> None:
    pictures = torch.randn(2, 3, *GRID)
    every = visualize.attention_map(model, pictures, read=2)
    torch.testing.assert_close(visualize.attention_map(model, pictures, queries=[4, 1]), every[:, :, [4, 1]])


def test_map_of_a_masked_input_is_zero_there(model: pc.Perceiver) -> None:
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[:, 4:] = False
    weights = visualize.attention_map(model, torch.randn(2, 3, *GRID), mask=mask)
    assert weights[..., 4:, :].abs().max() == 0
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 2, 5))


def test_map_leaves_the_model_in_its_mode(model: pc.Perceiver) -> None:
    model.train()
    model.head.eval()
    first, second = (visualize.attention_map(model, torch.ones(1, 3, *GRID)) for _ in range(2))
    torch.testing.assert_close(first, second)  # no dropout
    assert model.training
    assert not model.head.training


def test_map_over_plain_tensors_keeps_their_one_axis() -> None:
    encoder = pc.Encoder(6, num_latents=5, dim=11, depth=1, num_heads=1)
    model = pc.Perceiver(torch.nn.Identity(), encoder, pc.heads.Identity())
    assert visualize.attention_map(model, torch.randn(2, 17, 6)).shape == (2, 1, 5, 17)


def test_map_of_a_different_input_for_each_read() -> None:
    where = pc.positions.Fourier(num_axes=1, num_bands=3, max_resolution=16)
    both = pc.adapters.PerRead([pc.adapters.Audio(patch_size=patch, positions=where) for patch in (4, 3)])
    encoder = pc.Encoder(both.dim, num_latents=5, dim=11, num_reads=2, depth=1, num_heads=1, share=False)
    model = pc.Perceiver(both, encoder, pc.heads.Identity())
    sounds = (torch.randn(2, 44), torch.randn(2, 21))
    assert visualize.attention_map(model, sounds, read=0).shape == (2, 1, 5, 11)
    assert visualize.attention_map(model, sounds, read=1).shape == (2, 1, 5, 7)


def test_overlay_is_brightest_where_the_weight_is() -> None:
    weights = torch.zeros(5, 3)
    weights[1, 2] = 1.0
    picture = visualize.overlay(torch.zeros(1, 50, 33), weights)
    assert picture.shape == (50, 33, 3)
    assert picture.dtype == np.uint8
    row, column = np.unravel_index(picture.sum(-1).argmax(), (50, 33))
    assert 10 <= row < 20
    assert column >= 22


def test_overlay_of_strength_zero_is_the_image() -> None:
    grey = torch.linspace(0, 1, 77).reshape(1, 7, 11)
    picture = visualize.overlay(grey, torch.rand(2, 3), strength=0.0)
    np.testing.assert_array_equal(picture[..., 0], (grey[0] * 255).round().numpy().astype(np.uint8))
    color = torch.rand(3, 7, 11)
    assert not np.array_equal(visualize.overlay(color, torch.rand(2, 3), strength=0.0)[..., 0], picture[..., 0])


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("picture", "weights", "strength", "message"),
    [
        (torch.rand(2, 5, 7), torch.rand(5, 7), 0.5, "1 or 3 channels"),
        (torch.rand(5, 7), torch.rand(5, 7), 0.5, "1 or 3 channels"),
        (torch.rand(3, 5, 7), torch.rand(35), 0.5, "weights must have 2 axes"),
        (torch.rand(3, 5, 7), torch.rand(5, 7), 1.5, r"strength must lie in \[0, 1\]; got 1.5"),
    ],
)
def test_invalid_overlays_raise(picture: torch.Tensor, weights: torch.Tensor, strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize.overlay(picture, weights, strength=strength)


def test_position_features_are_those_of_the_grid() -> None:
    where = pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=16)
    figure = visualize.position_features(where, (5, 7))
    assert len(figure.axes) == where.dim
    shown = np.stack([axes.images[0].get_array() for axes in figure.axes], -1)
    expected = where(pc.positions.grid_points((5, 7), like=torch.zeros(())))
    np.testing.assert_allclose(shown, expected.numpy(), atol=1e-6)


def test_position_features_limits_channels_and_shows_one_axis_as_one_image() -> None:
    many = pc.positions.Gaussian(num_axes=2, num_features=50)
    assert len(visualize.position_features(many, (5, 7), limit=9).axes) == 9
    line = visualize.position_features(pc.positions.Fourier(num_axes=1, num_bands=4, max_resolution=16), (31,))
    assert line.axes[0].images[0].get_array().shape == (9, 31)
    with pytest.raises(ValueError, match="one or two axes"):
        visualize.position_features(pc.positions.Fourier(num_axes=3, num_bands=4), (3, 5, 7))


def test_architecture_gives_one_color_to_one_set_of_weights() -> None:
    def colors(share: bool | pc.sharing.Scheme) -> list[tuple[float, ...]]:
        encoder = pc.Encoder(6, num_latents=5, dim=11, num_reads=3, depth=1, num_heads=1, share=share)
        figure = visualize.architecture(pc.Perceiver(torch.nn.Identity(), encoder, pc.heads.Identity()))
        boxes = [patch.get_facecolor() for patch in figure.axes[0].patches if hasattr(patch, "get_boxstyle")]
        return boxes[2:-1]

    assert len(set(colors(pc.sharing.all_))) == 2
    assert len(set(colors(True))) == 3
    assert len(set(colors(False))) > 3


def test_architecture_of_perceiver_io_has_queries_and_decoder() -> None:
    encoder = pc.Encoder(6, num_latents=5, dim=11, num_reads=2, depth=1, num_heads=1)
    queries, decoder = pc.queries.Learned(3, dim=7), pc.Decoder(11, query_dim=7)
    figure = visualize.architecture(pc.PerceiverIO(torch.nn.Identity(), encoder, queries, decoder))
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words.index("queries\nLearned") < words.index("decoder\nDecoder") < words.index("head\nIdentity")
    right = max(patch.get_bbox().x1 for patch in figure.axes[0].patches if hasattr(patch, "get_boxstyle"))
    assert right < figure.axes[0].get_xlim()[1]


@pytest.mark.refusal
def test_architecture_of_other_models_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a Perceiver or PerceiverIO, with an Encoder; got Linear"):
        visualize.architecture(torch.nn.Linear(2, 3))


def test_plots_without_matplotlib_name_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"perceiver-core\[plots\]"):
        visualize.overlay(torch.rand(3, 5, 7), torch.rand(5, 7))
    with pytest.raises(ImportError, match=r"perceiver-core\[plots\]"):
        visualize.position_features(pc.positions.Fourier(num_axes=1, num_bands=4), (31,))
