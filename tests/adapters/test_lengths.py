"""Inputs of unequal size: an input by itself, padded with a mask and padded with lengths give the same outputs."""

from functools import partial

import pytest
import torch

import perceiver_core as pc
from perceiver_core import adapters, positions
from perceiver_core.positions import grid as positions_grid


def fixed(*grid, inner=None):
    inner = positions.Fourier(len(grid), num_bands=3, max_resolution=16) if inner is None else inner
    return positions.FixedGrid(inner, grid)


def perceiver(adapter, **encoder):
    encoder = pc.Encoder(adapter.dim, num_latents=3, dim=16, depth=1, num_heads=2, **encoder)
    return pc.Perceiver(adapter, encoder, pc.heads.Classification(16, num_classes=5)).eval()


WAVES = [(100,), (33,), (7,), (1,)]
PLANES = [(8, 9), (3, 11), (1, 1)]

# Name: (adapter, shapes of the inputs without batch axis).
CASES = {
    "grid of one axis": (lambda: adapters.Grid(3, positions=fixed(9)), [(n, 3) for n in (9, 4, 1)]),
    "grid of two axes": (lambda: adapters.Grid(3, positions=fixed(8, 11)), [(*s, 3) for s in PLANES]),
    "grid of three axes": (lambda: adapters.Grid(2, positions=fixed(4, 4, 4)), [(2, 3, 4, 2), (4, 1, 2, 2)]),
    "grid without positions": (lambda: adapters.Grid(3, positions=None), [(n, 3) for n in (9, 4, 1)]),
    "mono": (lambda: adapters.Audio(7, positions=fixed(20)), WAVES),
    "stereo": (lambda: adapters.Audio(7, positions=fixed(20), num_channels=2), [(2, *s) for s in WAVES]),
    "longer than the fixed grid": (lambda: adapters.Audio(7, positions=fixed(5)), WAVES),
    "learned grid": (lambda: adapters.Audio(7, positions=fixed(20, inner=positions.LearnedGrid((15,), 6))), WAVES),
    "learned embedding": (lambda: adapters.Audio(7, positions=positions.LearnedEmbedding(15, 6)), WAVES),
    "projected": (lambda: adapters.Audio(7, positions=positions.Projected(fixed(20), 6)), WAVES),
    "projected inside": (
        lambda: adapters.Audio(7, positions=fixed(20, inner=positions.Projected(positions.NeRF(1, 4), 6))),
        WAVES,
    ),
    "spectrogram": (lambda: adapters.Spectrogram(positions=fixed(8, 30)), [(8, n) for n in (30, 20, 1)]),
    "gaussian": (
        lambda: adapters.Spectrogram(positions=fixed(8, 30, inner=positions.Gaussian(2, 8, scale=1.0))),
        [(8, n) for n in (30, 20, 1)],
    ),
    "learned plane": (
        lambda: adapters.Spectrogram(positions=fixed(8, 30, inner=positions.LearnedGrid((4, 5), 6))),
        [(8, n) for n in (30, 20, 1)],
    ),
    "bins span the input": (lambda: adapters.Spectrogram(positions=fixed(None, 30)), [(8, n) for n in (30, 20, 1)]),
    "log-mel frames": (
        lambda: adapters.LogMel(8000, positions=fixed(9), num_mels=6, n_fft=32, hop_length=16),
        [(n,) for n in (130, 64, 63, 1)],
    ),
    "log-mel values": (
        lambda: adapters.LogMel(
            8000, positions=fixed(6, 9), num_mels=6, n_fft=32, hop_length=16, win_length=20, tokens_per_frame=6
        ),
        [(n,) for n in (130, 64, 63, 1)],
    ),
    "pixels": (lambda: adapters.Image(3, positions=fixed(8, 11)), [(3, *s) for s in PLANES]),
    "patches": (
        lambda: adapters.Image(3, positions=fixed(4, 4), stem=partial(adapters.Patches, patch_size=(2, 3))),
        [(3, *s) for s in PLANES],
    ),
    "projected pixels": (
        lambda: adapters.Image(3, positions=fixed(8, 11), stem=partial(adapters.Project, dim=4)),
        [(3, *s) for s in PLANES],
    ),
    "video": (
        lambda: adapters.Video(2, positions=fixed(3, 4, 4), patch_size=(2, 2, 3)),
        [(5, 2, 8, 9), (1, 2, 3, 11), (3, 2, 1, 1)],
    ),
    "frame pairs": (lambda: adapters.FramePair(positions=fixed(8, 11)), [(2, 3, *s) for s in PLANES]),
    "points": (lambda: adapters.PointCloud(1, positions=positions.Fourier(3, 3)), [(n, 4) for n in (9, 4, 1)]),
    "token dropout": (
        lambda: adapters.DropTokens(adapters.Audio(7, positions=fixed(20)), rate=0.5),
        WAVES,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reads", [1, 2])
def test_padding_changes_nothing(name, reads):
    torch.manual_seed(0)
    build, shapes = CASES[name]
    model, inputs = perceiver(build(), num_reads=reads), [torch.randn(shape) for shape in shapes]
    alone = torch.cat([model(x[None]) for x in inputs])
    batch, mask = adapters.pad(inputs, model.adapter)
    padded = torch.nn.functional.pad(batch, (0, 0) * 2)
    sized = getattr(model.adapter, "adapter", model.adapter)
    lengths = torch.tensor([[x.shape[axis] for axis in sized.axes_of(batch.ndim)] for x in inputs])
    for row, x in zip(padded, inputs, strict=True):  # whatever is behind the end of an input
        row.fill_(torch.nan)
        row[tuple(slice(size) for size in x.shape)] = x
    torch.testing.assert_close(model(batch, mask=mask), alone, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(model(padded, lengths=lengths), alone, rtol=2e-6, atol=2e-6)
    assert alone.std(0).min() > 1e-3  # the inputs differ


@pytest.mark.parametrize("name", [name for name in CASES if "without" not in name and name != "points"])
def test_positions_of_an_input_do_not_depend_on_the_padding(name):
    build, shapes = CASES[name]
    adapter = build().eval()
    x = torch.randn(shapes[-2])
    alone = adapter(x[None])
    batch, mask = adapters.pad([x, torch.randn(shapes[0])], adapter)
    padded = adapter(batch, mask=mask)
    corner = tuple(slice(size) for size in alone.grid)
    torch.testing.assert_close(padded.positions()[corner], alone.positions(), rtol=1e-6, atol=1e-6)


def test_ids_of_unequal_length_equal_each_by_itself():
    text = adapters.TokenEmbedding(11, 8, positions=positions.LearnedEmbedding(20, 8))
    model, inputs = perceiver(text), [torch.randint(11, (n,)) for n in (9, 4, 1)]
    batch, mask = adapters.pad(inputs, text)
    alone = torch.cat([model(x[None]) for x in inputs])
    torch.testing.assert_close(model(batch, mask=mask), alone)
    torch.testing.assert_close(model(batch, lengths=[9, 4, 1]), alone)


def test_rotary_positions_from_the_start_do_not_depend_on_the_padding():
    for from_end in (True, False):
        attention = partial(pc.MultiHeadAttention, rotary=positions.Rotary(base=10.0, from_end=from_end))
        read = partial(pc.CrossAttend, attention=attention, num_heads=2)
        torch.manual_seed(0)
        model = perceiver(adapters.Grid(4, positions=None), cross_attention=read)
        inputs = [torch.randn(n, 4) for n in (9, 4, 1)]
        batch, mask = adapters.pad(inputs, model.adapter)
        alone = torch.cat([model(x[None]) for x in inputs])
        equal = torch.allclose(model(batch, mask=mask), alone, rtol=1e-5, atol=1e-5)
        assert equal is not from_end


@pytest.mark.parametrize("model", ["io", "per read", "multimodal"])
def test_lengths_reach_the_adapters_of_every_model(model):
    torch.manual_seed(0)
    audio, plane = adapters.Audio(7, positions=fixed(20)), adapters.Spectrogram(positions=fixed(4, 9))
    waves, planes = [torch.randn(*s) for s in WAVES[:3]], [torch.randn(4, n) for n in (9, 5, 1)]
    (wave, _), (spectrogram, _) = adapters.pad(waves, audio), adapters.pad(planes, plane)
    lengths = ([100, 33, 7], [9, 5, 1])
    if model == "io":
        encoder = pc.Encoder(audio.dim, num_latents=3, dim=16, depth=1, num_heads=2)
        whole = pc.PerceiverIO(audio, encoder, pc.queries.Learned(4, 16), pc.Decoder(16, query_dim=16, out_dim=2))
        alone = torch.cat([whole(x[None]) for x in waves])
        torch.testing.assert_close(whole(wave, lengths=lengths[0]), alone, rtol=1e-5, atol=1e-5)
        return
    if model == "per read":
        both = adapters.PerRead([audio, plane])
        whole = perceiver(both, num_reads=2, share=False)
        alone = torch.cat([whole((x[None], y[None])) for x, y in zip(waves, planes, strict=True)])
        padded = whole((wave, spectrogram), lengths=lengths)
    else:
        both = adapters.Multimodal({"audio": audio, "plane": plane})
        whole = perceiver(both)
        each = [{"audio": x, "plane": y} for x, y in zip(waves, planes, strict=True)]
        alone = torch.cat([whole({name: x[None] for name, x in inputs.items()}) for inputs in each])
        inputs = {"audio": wave, "plane": spectrogram}
        padded = whole(inputs, lengths=dict(zip(inputs, lengths, strict=True)))
        batch, mask = adapters.pad(each, both)
        torch.testing.assert_close(whole(batch, mask=mask), alone, rtol=1e-5, atol=1e-5)
        absent = torch.tensor([True, False, True])
        missing = whole(inputs, mask={"audio": absent}, lengths={"plane": lengths[1], "audio": lengths[0]})
        torch.testing.assert_close(missing[1], whole({"plane": planes[1][None]})[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_lengths_and_mask_are_combined():
    audio = adapters.Audio(5, positions=None)
    mask = torch.tensor([[False, True, True, True]])
    assert audio(torch.randn(1, 20), mask=mask, lengths=[11]).mask.tolist() == [[False, True, True, False]]


def test_pad_without_an_adapter_masks_the_first_axis():
    batch, mask = adapters.pad([torch.ones(3, 2), torch.ones(1, 2)])
    assert batch.sum((1, 2)).tolist() == [6, 2]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    _, mask = adapters.pad([torch.ones(2, 3), torch.ones(2, 3)])
    assert mask.tolist() == [[True] * 2] * 2


def test_pad_keeps_gradients():
    inputs = [torch.randn(5, requires_grad=True), torch.randn(2, requires_grad=True)]
    batch, mask = adapters.pad(inputs)
    (batch * mask).sum().backward()
    assert all(x.grad.eq(1).all() for x in inputs)


def test_pad_of_modalities_that_samples_lack():
    audio, label = adapters.Audio(7, positions=fixed(20)), adapters.OneHotLabel(5)
    both = adapters.Multimodal({"audio": audio, "label": label, "plane": adapters.Spectrogram(positions=None)})
    waves = [torch.randn(n) for n in (30, 9)]
    samples = [
        {"label": torch.tensor(3), "plane": torch.randn(2, 4)},
        {"audio": waves[0], "label": torch.tensor(1)},
        {"audio": waves[1], "label": torch.tensor(4)},
    ]
    batch, mask = adapters.pad(samples, both)
    assert (sorted(batch), sorted(mask)) == (["audio", "label", "plane"], ["audio", "plane"])
    assert mask["audio"].sum(1).tolist() == [0, 5, 2]
    assert mask["plane"].flatten(1).any(1).tolist() == [True, False, False]
    model = perceiver(both)
    alone = [model({name: x[None] for name, x in sample.items()}) for sample in samples]
    torch.testing.assert_close(model(batch, mask=mask), torch.cat(alone), rtol=1e-5, atol=1e-5)
    _, mask = adapters.pad([samples[0], {"audio": waves[0]}], both)
    assert mask["label"].tolist() == [True, False]


def test_pad_of_an_input_per_read():
    both = adapters.PerRead([adapters.Audio(7, positions=None), adapters.Grid(2, positions=None)])
    inputs = [(torch.randn(20), torch.randn(3, 2)), (torch.randn(9), torch.randn(5, 2))]
    batch, mask = adapters.pad(inputs, both)
    assert [tuple(x.shape) for x in batch] == [(2, 20), (2, 5, 2)]
    assert [x.sum(1).tolist() for x in mask] == [[3, 2], [3, 5]]
    assert len(both(batch, mask=mask)) == 2


def test_absent_samples_may_have_any_length():
    audio = adapters.Audio(7, positions=fixed(20))
    both = adapters.Multimodal({"audio": audio, "label": adapters.OneHotLabel(5)})
    inputs = {"audio": torch.randn(3, 30), "label": torch.tensor([0, 1, 2])}
    present = torch.tensor([True, False, True])
    masks = [both(inputs, mask={"audio": present}, lengths={"audio": [9, n, 30]}).mask for n in (0, 7, 99)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0].sum(1).tolist() == [3, 1, 6]


def test_lengths_under_vmap():
    audio = adapters.Audio(5, positions=None)
    waveform, lengths = torch.randn(3, 2, 20), torch.tensor([[20, 7], [1, 5], [6, 20]])
    masks = torch.vmap(lambda x, n: audio(x, lengths=n).mask)(waveform, lengths)
    expected = [audio(x, lengths=n).mask for x, n in zip(waveform, lengths, strict=True)]
    assert torch.equal(masks, torch.stack(expected))


def test_gradients_reach_only_what_is_within_the_lengths():
    audio = adapters.Audio(5, positions=None)
    waveform = torch.randn(2, 20, requires_grad=True)
    audio(waveform, lengths=[20, 7]).materialize().sum().backward()
    assert waveform.grad[0].eq(1).all()
    assert waveform.grad[1].tolist() == [1] * 7 + [0] * 13


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1.5, 2.0], TypeError, "lengths must be whole numbers; got torch.float32"),
        ([True, True], TypeError, "lengths must be whole numbers; got torch.bool"),
        ([3], ValueError, r"lengths must be b or b 1 with b = 2, one row per sample; got shape \(1,\)"),
        ([[3, 4], [1, 2]], ValueError, r"lengths must be b or b 1 .* got shape \(2, 2\)"),
        ([0, 3], ValueError, r"lengths must lie in 1 ... \[20\], the padded size; got \[\[0\], \[3\]\]"),
        ([21, 3], ValueError, r"lengths must lie in 1 ... \[20\]"),
        ([3, None], TypeError, r"lengths must be a tensor or list of whole numbers; got \[3, None\]"),
        ("abc", TypeError, "lengths must be a tensor or list of whole numbers; got 'abc'"),
        ([[1], [2, 3]], TypeError, "lengths must be a tensor or list of whole numbers"),
    ],
)
def test_wrong_lengths_raise(lengths, error, message):
    with pytest.raises(error, match=message):
        adapters.Audio(5, positions=None)(torch.randn(2, 20), lengths=lengths)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("inputs", "adapter", "error", "message"),
    [
        ([], None, ValueError, "inputs must be a list of at least one input without batch axis; got none"),
        (torch.ones(2, 3), None, ValueError, "inputs must be a list .* got one tensor"),
        ([[1, 2]], None, TypeError, "inputs must be tensors; got list"),
        ([torch.ones(2), torch.ones(2, 1)], None, ValueError, "inputs must all have the same number of axes"),
        ([torch.ones(2, 3), torch.ones(1, 2)], None, ValueError, r"equal sizes along all axes but \(-2,\).* pass the"),
        ([torch.ones(2), torch.ones(0)], None, ValueError, r"input 1 has shape \(0,\). Drop it"),
        ([torch.ones(2), torch.ones(2).double()], None, TypeError, "inputs must have one dtype"),
        ([{"a": torch.ones(2)}], None, TypeError, "got dict. Pass the multimodal adapter"),
        ([torch.ones(2)], adapters.Multimodal({"a": adapters.Audio(2, positions=None)}), TypeError, "inputs must be"),
        (
            [torch.ones(2, 3), torch.ones(1, 2)],
            adapters.Audio(5, positions=None, num_channels=2),
            ValueError,
            r"inputs must have equal sizes along all axes but \(-1,\)",
        ),
        ([torch.ones(2)], adapters.OneHotLabel(3), TypeError, "adapter must accept inputs of unequal size"),
    ],
)
def test_what_pad_refuses(inputs, adapter, error, message):
    with pytest.raises(error, match=message):
        adapters.pad(inputs, adapter)


@pytest.mark.refusal
def test_one_length_per_axis_is_required_for_images():
    with pytest.raises(ValueError, match="lengths must be b 2 with b = 2, one row per sample"):
        adapters.Image(3, positions=None)(torch.rand(2, 3, 5, 6), lengths=[5, 5])


def test_a_stem_without_stride_refuses_lengths():
    class Stem(torch.nn.Identity):
        dim = 3

    image = adapters.Image(3, positions=None, stem=lambda channels: Stem())
    with pytest.raises(ValueError, match="lengths need a stem with the attribute stride"):
        image(torch.rand(1, 3, 5, 6), lengths=[[5, 5]])


class TestWarning:
    @pytest.fixture(autouse=True)
    def first_time(self, monkeypatch):
        monkeypatch.setattr(positions_grid, "_warned", set())

    @pytest.mark.parametrize(
        ("where", "lengths", "warns"),
        [
            (positions.Fourier(1, 3), [20, 7], True),
            (positions.LearnedGrid((4,), 3), [20, 7], True),
            (positions.Projected(positions.Gaussian(1, 3), 4), [20, 7], True),
            (positions.Fourier(1, 3), [20, 18], False),  # the same number of tokens
            (fixed(5), [20, 7], False),
            (positions.LearnedEmbedding(5, 3), [20, 7], False),
            (None, [20, 7], False),
        ],
    )
    def test_a_padded_batch_meets_positions_that_span_it(self, where, lengths, warns, recwarn):
        audio = adapters.Audio(5, positions=where)
        for _ in range(2):
            audio(torch.randn(2, 20), lengths=lengths)
        messages = [str(warning.message) for warning in recwarn]
        assert len(messages) == warns  # once, not twice
        assert all("positions.FixedGrid" in message for message in messages)

    @pytest.mark.parametrize(
        ("grid", "mask", "warns"),
        [
            ((2, None), [[1, 1, 0], [1, 1, 0]], True),  # padded columns
            ((None, 3), [[1, 1, 0], [1, 1, 0]], False),  # the columns have fixed positions
            ((None, 3), [[1, 1, 0], [0, 0, 0]], True),
            ((None, None), [[1, 1, 0], [1, 0, 0]], False),  # not a box
            ((None, None), [[0, 1, 1], [0, 1, 1]], False),  # padded at the start
            ((None, None), [[1, 0, 1], [1, 0, 1]], False),
            ((None, None), [[1, 1, 1], [1, 1, 1]], False),
        ],
    )
    def test_only_padding_along_axes_that_the_input_spans_warns(self, grid, mask, warns, recwarn):
        array = adapters.Grid(1, positions=fixed(*grid))
        array(torch.randn(1, 2, 3, 1), mask=torch.tensor([mask], dtype=torch.bool))
        assert len(recwarn) == warns
