"""The clips have their documented properties, and the example runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
clips = pytest.importorskip("examples.common.moving_shapes")
example = pytest.importorskip("examples.video_and_audio")

TIME = np.arange(clips.FRAMES * clips.NOTE) / (clips.FRAMES * clips.NOTE)


def moved(kind, seed=0):
    return clips.move(np.random.default_rng(seed), kind, TIME)


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = example.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert list(result["tables"]) == ["video, PSNR in dB", "audio, SNR in dB", "labels, % correct"]
    assert all(np.isfinite(row["mean"]) for table in result["tables"].values() for row in table.values())


def test_labels_are_balanced_and_clips_are_repeatable():
    some = clips.generate(clips.TRAIN, 30)
    assert torch.equal(some.label.bincount(), torch.full((6,), 5))
    assert all(torch.equal(x, y) for x, y in zip(some, clips.generate(clips.TRAIN, 30), strict=True))
    assert some.video.shape == (30, 8, 1, 16, 20)
    assert some.audio.shape == (30, 512)
    assert 0 == some.video.min() < some.video.max() <= 1


def test_no_clip_of_the_test_is_one_of_training():
    assert clips.TRAIN != clips.TEST
    both = [clips.generate(split, 24) for split in (clips.TRAIN, clips.TEST)]
    for kind in (0, 1):
        assert len(torch.cat([x[kind].flatten(1) for x in both]).unique(dim=0)) == 48


@pytest.mark.parametrize("shape", clips.SHAPES)
def test_a_shape_is_where_it_is_drawn_and_sounds_as_high_and_as_near(shape):
    height, column = np.array([0.0, 0.2, 0.7, 1.0]), np.array([0.1, 0.9, 0.5, 0.0])
    frames = clips.draw_shape(shape, height, column, 2.5)
    y, x = np.mgrid[: clips.ROWS, : clips.COLUMNS]
    rows, columns = ((frames * axis).sum((1, 2)) / frames.sum((1, 2)) for axis in (y, x))
    np.testing.assert_allclose(rows, 2.5 + (1 - height) * 10, atol=0.05)
    np.testing.assert_allclose(columns, 2.5 + column * 14, atol=0.05)
    notes = clips.play_notes(shape, height, column).reshape(4, clips.NOTE)
    power = abs(np.fft.rfft(notes, 64 * clips.NOTE))
    lowest = [next(i for i in range(64, len(row)) if row[i] > 0.8 * row.max() and row[i] > row[i + 1]) for row in power]
    np.testing.assert_allclose(np.array(lowest) / 64, 2.5 * (9 / 2.5) ** height, rtol=0.1)
    np.testing.assert_allclose(abs(notes).max(1) / (0.15 + 0.45 * column), abs(notes[0]).max() / 0.195, rtol=0.25)


def test_pitch_follows_height_in_whole_clips():
    some = clips.generate(clips.TEST, 120)
    rows = (some.video * torch.arange(clips.ROWS)[:, None]).sum((2, 3, 4)) / some.video.sum((2, 3, 4))
    power = torch.fft.rfft(some.audio.unflatten(1, (clips.FRAMES, clips.NOTE)), 1024).abs()
    power = power[..., 32:]  # two periods a note or more
    lowest = (power > 0.6 * power.amax(-1, keepdim=True)).float().argmax(-1) + 32  # the first of the loud harmonics
    both = torch.stack([rows.flatten(), lowest.flatten().float().log()])
    assert both.corrcoef()[0, 1] < -0.9


@pytest.mark.parametrize("kind", clips.MOVES)
@pytest.mark.parametrize("seed", range(5))
def test_movements_stay_inside_and_click_where_they_touch(kind, seed):
    height, column, touched = moved(kind, seed)
    assert all(-1e-9 <= x.min() <= x.max() <= 1 + 1e-9 for x in (height, column))
    hits = np.flatnonzero(np.diff(touched))
    near = np.minimum.reduce([height, column, 1 - column, 1 - height])
    assert (near[hits] < 0.03).all()
    assert (len(hits) > 0) == (kind in ("fall", "billiard"))
    assert (clips.click_track(touched) != 0).any() == (len(hits) > 0)


@pytest.mark.parametrize(("kind", "turn"), [("clockwise", 1), ("counterclockwise", -1)])
def test_circles_turn_the_way_their_names_say(kind, turn):
    height, column, _ = moved(kind)
    x, y = column * (clips.COLUMNS - 5), height * (clips.ROWS - 5)
    x, y = (np.gradient(axis) for axis in (x, y))
    angles = np.unwrap(np.arctan2(y, x))
    assert (np.diff(angles) * turn < 0).all()  # clockwise angles fall where height points up
    np.testing.assert_allclose(np.hypot(x, y)[1:-1], np.hypot(x, y)[5], rtol=0.1)


def test_blocks_are_those_that_the_adapter_makes_tokens_of():
    video = clips.generate(clips.TEST, 2).video
    adapter = example.build().adapter.adapters["video"]
    pixels = adapter(video).materialize()[..., : example.BLOCK[0] * example.BLOCK[1]]
    assert torch.equal(pixels, example.to_blocks(video))
    assert torch.equal(example.from_blocks(example.to_blocks(video)), video)


def test_outputs_do_not_depend_on_absent_modalities():
    torch.manual_seed(0)
    model, some = example.build().eval(), clips.generate(clips.TEST, 4)
    other = some._replace(video=some.video.flip(0), label=some.label.flip(0))
    for x, y in zip(example.predict(model, some, ["audio"]), example.predict(model, other, ["audio"]), strict=True):
        assert torch.equal(x, y)


def test_ratios_are_in_decibels():
    some = clips.generate(clips.TEST, 3)
    off = some._replace(video=some.video + 0.1, audio=some.audio * 0.9)
    torch.testing.assert_close(example.psnr(off, some), torch.full((3,), 20.0))
    torch.testing.assert_close(example.snr(off, some), torch.full((3,), 20.0))
