import pytest
from transformers import set_seed


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)
