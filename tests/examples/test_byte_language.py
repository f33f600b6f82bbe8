"""Every held-out byte is scored once, exactly, and the example runs."""

from __future__ import annotations

import json
import lzma

import pytest
import torch

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("matplotlib")
language = pytest.importorskip("examples.byte_language")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return language.build().eval()


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = language.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = {"counts, order 3", "counts, order 5", "lzma", "lzma, after the training text", "uniform", "Perceiver AR"}
    assert set(result["tables"]["bits per byte"]) >= rows
    assert set(result["trained"]) == {"Perceiver AR"}
    assert len(result["sample"]["new"]) == 40


def test_the_last_bytes_of_windows_are_the_text_once_and_in_order():
    text = torch.randint(256, (2000,), dtype=torch.uint8)
    scored = language.windows(text)[:, -language.LATENTS :].flatten()
    start = language.CONTEXT + 1 - language.LATENTS
    assert torch.equal(scored, text[start : start + len(scored)])
    assert len(text) - start - len(scored) < language.LATENTS


def test_scores_are_those_of_a_plain_forward(model):
    text = torch.randint(256, (language.CONTEXT + 1 + language.LATENTS,), dtype=torch.uint8)
    actual = language.bits(model, language.windows(text))
    with torch.no_grad():
        for window in range(2):
            ids = text[window * language.LATENTS :][: language.CONTEXT + 1].long()
            p = model(ids[None, :-1])[0].log_softmax(-1) / -torch.log(torch.tensor(2.0))
            expected = ids[-language.LATENTS :]
            by_hand = torch.stack([p[i, byte] for i, byte in enumerate(expected)])
            torch.testing.assert_close(actual[window], by_hand, rtol=1e-4, atol=1e-4)
            loss = model.loss(ids[None]) / torch.log(torch.tensor(2.0))
            torch.testing.assert_close(actual[window].mean(), loss, rtol=1e-4, atol=1e-4)


def test_no_score_depends_on_its_byte_or_a_later_one(model):
    ids = torch.randint(255, (1, language.CONTEXT + 1))
    other = ids.clone()
    other[0, -10:] = 255
    first, second = (language.bits(model, x)[0, :-10] for x in (ids, other))
    torch.testing.assert_close(first, second)


def test_counts_use_the_preceding_bytes():
    ids = torch.tensor([list(b"0123456"), list(b"abcdefg")])
    actual = [bytes(row) for row in language.preceding_bytes(ids, 3, 2).tolist()]
    assert actual == [b"32", b"43", b"54", b"dc", b"ed", b"fe"]


def test_compressed_size_is_the_growth_of_the_file():
    first, more = bytes(range(256)) * 4, b"what comes then " * 9
    sizes = [len(lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)) for x in (first, first + more)]
    actual = language.lzma_bits(torch.tensor(list(more), dtype=torch.uint8), first)
    assert actual == pytest.approx(8 * (sizes[1] - sizes[0]) / len(more))


def test_unprintable_bytes_are_marked():
    assert language.printable(torch.tensor([10, 27, 65, 200])) == "\n\ufffdA\ufffd"
