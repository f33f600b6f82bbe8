"""Tables of registered names that are restored."""

import pytest

from tests.registered import restored


@pytest.fixture(autouse=True)
def registered_names():
    with restored():
        yield
