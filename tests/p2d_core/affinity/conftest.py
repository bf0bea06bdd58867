"""One tiny model for all scorers' tests."""

import pytest

from p2d_core.heads.head_map import HeadMap
from p2d_core.models import CapturedModel
from tests.small_scoring import captured_model, three_heads


@pytest.fixture(scope="session")
def heads() -> HeadMap:
    return three_heads()


@pytest.fixture(scope="session")
def model(tmp_path_factory, heads) -> CapturedModel:
    return captured_model(tmp_path_factory.mktemp("model"), heads)
