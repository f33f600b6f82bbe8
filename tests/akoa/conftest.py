"""Fixtures of the tests of the knee laterality example."""

import pytest
import torch

import perceiver_core as pc
from examples.akoa.dataset.datamodule import Split
from examples.akoa.model import knee_model
from tests.akoa.evaluation_cases import HEIGHT, PATIENTS, WIDTH, split_of


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    first = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
    return {part: split_of(part, first[part], n, i) for i, (part, n) in enumerate(PATIENTS.items())}


@pytest.fixture(scope="module")
def model() -> pc.Perceiver:
    torch.manual_seed(0)
    return knee_model((HEIGHT, WIDTH)).eval()
