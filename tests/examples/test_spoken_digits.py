"""Spoken words: generated and read recordings, a model that padding does not change, and the example runs."""

from __future__ import annotations

import json
import wave
import zipfile

import numpy as np
import pytest
import torch

import perceiver_core as pc

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
example = pytest.importorskip("examples.spoken_digits")
speech = pytest.importorskip("examples.common.speech")
FRONTS = pytest.mark.parametrize("front", example.FRONTS.values(), ids=example.FRONTS)


def write(path, samples, rate=speech.RATE, width=2, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, f"<i{width}").tobytes())


@pytest.fixture
def recordings(tmp_path):
    """Folder with recordings of ten digits by two speakers: six of each digit."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "recordings"
    folder.mkdir()
    for digit in range(10):
        for speaker in ("ann", "bob"):
            for index in range(6):
                noise = rng.integers(-9000, 9000, 400 + 50 * digit + index)
                write(folder / f"{digit}_{speaker}_{index}.wav", noise)
    return folder


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = example.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = {"logistic regression, log-mel", "Perceiver, log-mel, one by one", "Perceiver, raw samples, padded"}
    assert set(result["tables"]["generated, correct, %"]) >= rows
    assert result["command"] == f"python -m examples.spoken_digits --toy --out {tmp_path / 'new'}"


@pytest.mark.slow
def test_recordings_are_split_by_index_and_by_speaker_and_a_run_resumes(recordings, tmp_path, monkeypatch):
    arguments = ["--toy", "--data", str(recordings), "--seeds", "2", "--out", str(tmp_path / "new")]
    result = example.main(arguments)
    assert f"--data {recordings} --seeds 2" in result["command"]
    assert set(result["tables"]) == {
        "by index, correct, %",
        "one speaker left out, correct, %",
        "each speaker left out, correct, %",
    }
    assert set(result["trained"]) == {
        *(f"by index, {front}, 3 steps, seed {seed}" for front in example.FRONTS for seed in (0, 1)),
        *(f"without {name}, log-mel, 3 steps, seed {seed}" for name in ("ann", "bob") for seed in (0, 1)),
    }
    assert result["data"]["largest difference between padded and one by one"] < 1e-4
    monkeypatch.setattr(example.Run, "train", None)  # nothing is trained again
    assert example.main([*arguments, "--resume"])["tables"] == result["tables"]


def test_recordings_are_read_from_folder_and_zip(recordings, tmp_path):
    samples = np.array([0, 16384, -32768])
    write(recordings / "7_zoe_49.wav", samples)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in recordings.iterdir():
            archive.write(path, f"recordings/{path.name}")
    for data in (speech.read(recordings), speech.read(tmp_path / "all.zip")):
        assert len(data) == 121
        (i,) = (i for i, name in enumerate(data.speakers) if name == "zoe")
        assert (data.labels[i], data.indices[i], data.lengths[i]) == (7, 49, 3)
        assert data[torch.tensor([i])].samples.tolist() == [[0, 0.5, -1]]
        assert not data.samples[i, 3:].any()


def test_splits_hold_out_indices_and_speakers(recordings):
    data = speech.read(recordings)
    for name, (train, test) in speech.splits(data).items():
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(120))
        if name == "by index":
            assert set(data.indices[test].tolist()) == {0, 1, 2, 3, 4}
        else:
            assert {data.speakers[i] for i in test} == {name.removeprefix("without ")}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("seven_ann_1.wav", {}, "must be named"),
        ("7_ann_1.wav", {"rate": 16000}, "must have 8000 Hz, 16 bit, 1 channel; got 16000, 16, 1"),
        ("7_ann_1.wav", {"width": 1}, "got 8000, 8, 1"),
        ("7_ann_1.wav", {"channels": 2}, "got 8000, 16, 2"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, options, message):
    write(tmp_path / name, [1, 2, 3, 4], **options)
    with pytest.raises(ValueError, match=message) as error:
        speech.read(tmp_path)
    assert name in str(error.value)


def test_damaged_and_missing_recordings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no \.wav file"):
        speech.read(tmp_path)
    with pytest.raises(ValueError, match="must be a folder or a zip file"):
        speech.read(tmp_path / "missing")
    for content, message in ((b"RIFF", "not a WAV file"), (None, "has no samples")):
        path = tmp_path / "1_ann_2.wav"
        write(path, []) if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"1_ann_2\.wav.*{message}"):
            speech.read(tmp_path)


@FRONTS
def test_padding_does_not_change_the_output(front):
    torch.manual_seed(0)
    model = example.build(front()).eval()
    recordings = [torch.randn(n) for n in (5000, 801, 79, 1600)]
    samples, _ = pc.adapters.pad(recordings)
    with torch.no_grad():
        padded = model(samples, lengths=torch.tensor([len(x) for x in recordings]))
        alone = torch.cat([model(x[None]) for x in recordings])
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # the recordings have different outputs


@FRONTS
def test_loudness_does_not_change_the_output(front):
    torch.manual_seed(0)
    model = example.build(front()).eval()
    x = torch.randn(2, 2000)
    torch.testing.assert_close(model(x), model(0.01 * x), rtol=0, atol=1e-4)


def test_augmentation_changes_length_and_pitch_together():
    torch.manual_seed(0)
    tone = torch.sin(2 * torch.pi * 500 / speech.RATE * torch.arange(4000)).repeat(50, 1)
    samples, lengths = example.augment(tone, torch.full((50,), 4000))
    assert samples.shape == (50, lengths.max())
    for row, length in zip(samples, lengths, strict=True):
        assert not row[length:].any()
    spectrum = torch.fft.rfft(samples, n=16_000).abs()
    pitches = spectrum.argmax(1) / 2
    assert (pitches > 500 / 1.26).all()
    assert (pitches < 500 * 1.26).all()
    assert pitches.max() / pitches.min() > 1.3


def test_labels_are_balanced_and_recordings_are_repeatable():
    words, splits = speech.generate(30, 10)
    assert torch.equal(words.labels.bincount(), torch.full((10,), 4))
    torch.testing.assert_close(words.samples, speech.generate(30, 10)[0].samples, rtol=0, atol=0)
    assert words.samples.shape == (40, speech.LENGTH)
    assert 0.4 < words.samples.abs().max(1).values.min() <= words.samples.abs().max() <= 1
    assert len(words.samples.unique(dim=0)) == 40  # no recording of the test is one of training
    assert [len(part) for part in splits["generated"]] == [30, 10]


def test_formants_are_where_the_sounds_have_them():
    rng = np.random.default_rng(0)
    first, second, voice, hiss = speech._parameter_tracks(rng, "ai", 1000)
    assert second[10] < 1200 * 1.15 * 1.05 < 2300 * 0.87 * 0.95 < second[-10]  # from a to i
    assert first[10] > first[-10]
    assert (hiss == 0).all()
    assert (voice > 0).all()
    voice, hiss = speech._parameter_tracks(rng, "su", 1000)[2:]
    assert (hiss[10], hiss[-10]) == (pytest.approx(0.5), 0)
    assert (voice[10], voice[-10]) == (0, pytest.approx(0.8))


def test_a_spectrogram_shows_a_tone_where_it_is():
    tone = torch.sin(2 * torch.pi * 1000 / speech.RATE * torch.arange(speech.LENGTH))[None]
    frames = example.LogMelFrames()(tone, torch.tensor([speech.LENGTH]))
    assert frames.shape == (1, speech.LENGTH // example.HOP + 1, 40)
    edges = pc.adapters.slaney_frequencies(50, 4000, 42)
    band = int((edges[1:-1] - 1000).abs().argmin())
    assert (frames[0, 2:-2].argmax(1) == band).all()


def test_mirrored_words_have_one_mean_spectrum():
    """The first baseline's features of "ai" and "ia" are equal up to the voice."""
    rng, means = np.random.default_rng(0), {}
    for word in ("ai", "ia", "su"):
        samples = torch.tensor(np.stack([speech.synthesize(rng, word) for _ in range(40)]))
        means[word] = example.LogMelFrames()(samples, torch.full((40,), speech.LENGTH)).mean((0, 1))
    assert (means["ai"] - means["ia"]).norm() < (means["ai"] - means["su"]).norm() / 4
