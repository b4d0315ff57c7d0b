import pytest


for requirement in ("datasets", "matplotlib", "peft", "sklearn"):
    pytest.importorskip(requirement)
