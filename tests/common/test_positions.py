"""Position modulation and the sinusoidal code, beside Python's own sines."""

import math

import pytest
import torch
from testing import assert_close

from modeling_sumagg.common.positions import sinusoidal_positions
from modeling_sumagg.models.position_modulation import PositionModulation


def test_sinusoidal_code():
    positions = torch.tensor([[0, 1, 7, 1_000_003]])
    code = sinusoidal_positions(positions, 6)
    assert code.dtype == torch.float32 and code.shape == (1, 4, 6)
    for row, position in zip(code[0].tolist(), positions[0].tolist(), strict=True):
        angles = [position / 10000 ** (2 * i / 6) for i in range(3)]
        assert row == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "none"])
def test_modulation(kind, dtype):
    modulation = PositionModulation(6, kind, 9, 2.0).to(dtype)
    embeds, position_ids = torch.randn(2, 4, 6).to(dtype), torch.tensor([[0, 3, 8, 8]])
    if kind == "learned":
        table = modulation.position_embeddings.weight.double()[position_ids]
    else:
        table = sinusoidal_positions(position_ids, 6).double() if kind == "sinusoidal" else 0.0
    actual = modulation(embeds, position_ids)
    assert actual.dtype == dtype
    expected = embeds.double() * (table + 2.0)
    if dtype == torch.bfloat16:
        # Rounded once.
        assert ((actual.double() - expected).abs() <= 2**-8 * expected.abs()).all()
    else:
        assert_close(actual, expected, rtol=1e-6)
    assert [name for name, _ in modulation.named_parameters()] == ["position_embeddings.weight"] * (kind == "learned")


def test_positions_beyond_the_table():
    modulation = PositionModulation(6, "learned", 9, 1.0)
    with pytest.raises(ValueError, match="10 tokens is too long .* for 9 .*truncation=True, max_length=9"):
        modulation(torch.zeros(1, 1, 6), torch.tensor([[9]]))
    assert PositionModulation(6, "sinusoidal", 9, 1.0)(torch.ones(1, 1, 6), torch.tensor([[99]])).shape == (1, 1, 6)
