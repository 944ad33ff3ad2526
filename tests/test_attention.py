"""Correlation and attention by hand."""

from __future__ import annotations

import math

import pytest
import torch
from stand_ins import randn

from siamtrack.nets.attention import ChannelAttention, SpatialAttention
from siamtrack.nets.correlation import DEPTHWISE_FORMS, pixelwise


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", sorted(DEPTHWISE_FORMS))
def test_depthwise_forms_equal_a_loop(form: str, batch: int) -> None:
    search, kernel = randn(batch, 5, 9, 11, seed=1), randn(batch, 5, 3, 3, seed=2)
    wanted = torch.zeros(batch, 5, 7, 9)
    for row in range(7):
        for column in range(9):
            wanted[:, :, row, column] = (search[:, :, row : row + 3, column : column + 3] * kernel).sum(dim=(2, 3))
    torch.testing.assert_close(DEPTHWISE_FORMS[form](search, kernel), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_depthwise_forms_agree_at_full_size(batch: int) -> None:
    search, kernel = randn(batch, 256, 29, 29, seed=1), randn(batch, 256, 5, 5, seed=2) / 5
    grouped, matmul = (form(search, kernel) for form in DEPTHWISE_FORMS.values())
    assert grouped.shape == (batch, 256, 25, 25)
    assert (grouped - matmul).abs().max() < 1e-5 * grouped.abs().max()


def test_pixelwise_is_an_inner_product() -> None:
    search, kernel = randn(2, 6, 4, 5, seed=1), randn(2, 7, 6, seed=2)
    torch.testing.assert_close(pixelwise(search, kernel), torch.einsum("nchw,nmc->nmhw", search, kernel))


def test_channel_attention_by_hand() -> None:
    attention = ChannelAttention(kernel=3)
    with torch.no_grad():
        attention.conv.weight.copy_(torch.tensor([[[0.5, 1.0, -2.0]]]))
    # Channel means 1, 2, 3, 4; outside channels count as 0.
    template = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
    raw = [1 - 2 * 2, 0.5 * 1 + 2 - 2 * 3, 0.5 * 2 + 3 - 2 * 4, 0.5 * 3 + 4]
    wanted = [1 / (1 + math.exp(-r)) for r in raw]
    with torch.no_grad():
        weights = attention(template)
    assert weights.shape == (1, 4, 1, 1)
    assert weights.flatten().tolist() == pytest.approx(wanted)


def test_channel_attention_kernel_is_5() -> None:
    assert ChannelAttention().conv.weight.shape == (1, 1, 5)  # erratum S3
    assert ChannelAttention().conv.bias is None


def test_spatial_attention_multiplies_its_input() -> None:
    attention = SpatialAttention(kernel=1)
    with torch.no_grad():
        attention.conv.weight.copy_(torch.tensor([2.0, -1.0])[None, :, None, None])  # 2 mean - max
    x = randn(2, 3, 4, 4)
    gate = torch.sigmoid(2 * x.mean(dim=1, keepdim=True) - x.max(dim=1, keepdim=True).values)
    with torch.no_grad():
        out = attention(x)
    assert out.shape == x.shape  # the equations would give one channel (erratum S5)
    torch.testing.assert_close(out, x * gate)


def test_spatial_attention_looks_7_wide() -> None:
    x = torch.zeros(1, 2, 15, 15)
    x[0, :, 7, 7] = 1
    attention = SpatialAttention()
    with torch.no_grad():
        attention.conv.weight.fill_(1.0)
        gate = attention.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1))
    assert int((gate != 0).sum()) == 49
