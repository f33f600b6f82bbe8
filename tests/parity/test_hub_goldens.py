"""The published image classifiers from the hub, against the logits in transformers' own tests.

Downloads 0.7 GB, so it runs only if PERCEIVER_CORE_HUB=1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perceiver_core.checkpoints import from_pretrained, save_pretrained
from perceiver_core.interop import load_transformers

allowed = pytest.mark.skipif(os.environ.get("PERCEIVER_CORE_HUB") != "1", reason="downloads; set PERCEIVER_CORE_HUB=1")
image = pytest.importorskip("PIL.Image")

# huggingface/transformers, tests/models/perceiver/test_modeling_perceiver.py: the first three logits, to 1e-4.
GOLDEN = {
    "deepmind/vision-perceiver-learned": (-1.1652, -0.1992, -0.7520),
    "deepmind/vision-perceiver-fourier": (-1.1295, -0.2832, 0.3226),
    "deepmind/vision-perceiver-conv": (-1.1186, 0.0554, 0.0897),
}
# The image of that test, two cats, as in transformers' repository: without JPEG artifacts.
ADDRESS = (
    "https://raw.githubusercontent.com/huggingface/transformers/v4.57.0/"
    "tests/fixtures/tests_samples/COCO/000000039769.png"
)


def prepared(picture: Any) -> Tensor:
    """Central crop of 224 / 256 of the short side, resized to 224 x 224, ImageNet normalization: `1 3 224 224`."""
    side = int(224 / 256 * min(picture.size))
    left, top = ((size - side) // 2 for size in picture.size)
    picture = picture.crop((left, top, left + side, top + side)).resize((224, 224), image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (pixels - mean) / deviation


def test_images_are_preprocessed_like_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.perceiver.image_processing_pil_perceiver")
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = image.fromarray(noise).resize((640, 480), image.Resampling.BICUBIC)
    expected = theirs.PerceiverImageProcessorPil()(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(prepared(picture), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    path: Path = tmp_path_factory.mktemp("picture") / "cats.png"
    torch.hub.download_url_to_file(ADDRESS, str(path), progress=False)
    with image.open(path) as opened:
        return prepared(opened.convert("RGB"))


@allowed
@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_the_first_logits_equal_those_of_transformers(name: str, cats: Tensor, tmp_path: Path) -> None:
    model = load_transformers(name)
    logits = model(cats)
    assert logits.shape == (1, 1000)
    torch.testing.assert_close(logits[0, :3], torch.tensor(GOLDEN[name]), rtol=1e-4, atol=1e-4)
    again = from_pretrained(save_pretrained(model, tmp_path))
    torch.testing.assert_close(again(cats), logits, rtol=0.0, atol=0.0)
