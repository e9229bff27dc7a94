"""The fixture `assert_descends`; a project turns it on in its conftest.py with `pytest_plugins = ["gradlab.pytest_plugin"]`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gradlab import testing


@pytest.fixture(name="assert_descends", scope="session")
def fixture() -> Callable[..., None]:
    """`gradlab.testing.assert_descends`, without an import."""
    return testing.assert_descends
