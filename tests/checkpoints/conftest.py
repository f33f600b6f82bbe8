"""A good folder, one to be broken, and tables of registered names that are restored."""

from __future__ import annotations

import pytest

import perceiver_core as pc
from tests.checkpoints.folders import contents, small, trained
from tests.registered import restored


@pytest.fixture(autouse=True, scope="module")
def registered_names():
    with restored():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return pc.save(trained(small()), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def broken(saved, tmp_path):
    """A good folder, to be broken."""
    for name, content in contents(saved).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path
