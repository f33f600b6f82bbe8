"""The spoken words have their documented properties, and the example runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
spoken = pytest.importorskip("examples.spoken_words")


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = spoken.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = {"logistic regression, mean spectrum", "Perceiver, raw samples", "Perceiver, spectrogram"}
    assert set(result["tables"]["correct, %"]) >= rows
    assert set(result["trained"]) == {"Perceiver, raw samples", "Perceiver, spectrogram"}


def test_labels_are_balanced_and_recordings_are_repeatable():
    words = spoken.generate(spoken.TRAIN, 30)
    assert torch.equal(words.labels.bincount(), torch.full((10,), 3))
    torch.testing.assert_close(words.samples, spoken.generate(spoken.TRAIN, 30).samples, rtol=0, atol=0)
    assert words.samples.shape == (30, spoken.LENGTH)
    assert 0.4 < words.samples.abs().max(1).values.min() <= words.samples.abs().max() <= 1


def test_no_recording_of_the_test_is_one_of_training():
    assert spoken.TRAIN != spoken.TEST
    both = torch.cat([spoken.generate(split, 20).samples for split in (spoken.TRAIN, spoken.TEST)])
    assert len(both.unique(dim=0)) == 40


def test_formants_are_where_the_sounds_have_them():
    rng = np.random.default_rng(0)
    first, second, voice, hiss = spoken._parameter_tracks(rng, "ai", 1000)
    assert second[10] < 1200 * 1.15 * 1.05 < 2300 * 0.87 * 0.95 < second[-10]  # from a to i
    assert first[10] > first[-10]
    assert (hiss == 0).all()
    assert (voice > 0).all()
    voice, hiss = spoken._parameter_tracks(rng, "su", 1000)[2:]
    assert (hiss[10], hiss[-10]) == (pytest.approx(0.5), 0)
    assert (voice[10], voice[-10]) == (0, pytest.approx(0.8))


def test_a_spectrogram_shows_a_tone_where_it_is():
    tone = torch.sin(2 * torch.pi * 1563 / spoken.RATE * torch.arange(spoken.LENGTH))[None]
    picture = spoken.spectrogram(tone)
    assert picture.shape == (1, spoken.BINS, spoken.LENGTH // spoken.HOP)
    assert (picture[0, :, 5:-5].argmax(0) == 1563 * spoken.BINS // (spoken.RATE // 2)).all()


def test_mirrored_words_have_one_mean_spectrum():
    """The first baseline's features of "ai" and "ia" are equal up to the voice."""
    rng = np.random.default_rng(0)
    means = {}
    for word in ("ai", "ia", "su"):
        samples = torch.tensor(np.stack([spoken.synthesize(rng, word) for _ in range(40)]))
        means[word] = spoken.spectrogram(samples).mean((0, 2))
    assert (means["ai"] - means["ia"]).norm() < (means["ai"] - means["su"]).norm() / 4


def test_moving_keeps_every_sample_but_for_its_loudness():
    torch.manual_seed(0)
    words = spoken.generate(spoken.TEST, 7).samples
    moved = spoken.augment(words)
    ratio = moved.abs().max(1).values / words.abs().max(1).values
    assert ((ratio > 0.29) & (ratio <= 1)).all()
    torch.testing.assert_close((moved.abs() / ratio[:, None]).sort(1).values, words.abs().sort(1).values)
