"""The running average; DASTSiam's transformers: against PyTorch's own with the same weights, what Eq. 1 to 5 say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siamtrack.nets.template_update import (
    Attention,
    DecoderLayer,
    Discriminative,
    EncoderLayer,
    LinearUpdate,
    SpatioTemporal,
    TransformerConfig,
    tokens,
)

SMALL = TransformerConfig(width=24, layers=2, heads=4, hidden=40)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(module: nn.Module) -> Any:
    """No bias, scale or running statistic at its initial value, which would hide its absence; in eval mode."""
    for i, (name, value) in enumerate(module.state_dict().items()):
        noise = randn(*value.shape or (1,), seed=i)
        if value.dim() > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.copy_(0.5 + noise.abs() if name.endswith(("running_var", "weight")) else 0.3 * noise)
    return module.eval()


@pytest.mark.parametrize("width", [24, 256])
def test_attention_is_multi_head_attention(width: int) -> None:
    attention = random_weights(Attention(TransformerConfig(width=width)))
    reference = nn.MultiheadAttention(width, 4, batch_first=True).eval()
    reference.load_state_dict(attention.state_dict())  # strict: the very same parameters
    query, key, value = randn(3, 10, width), randn(3, 7, width, seed=1), randn(3, 7, width, seed=2)
    with torch.no_grad():
        wanted = reference(query, key, value, need_weights=False)[0]
        torch.testing.assert_close(attention(query, key, value), wanted, rtol=1e-4, atol=1e-5)
        apart = attention.attend(query, *attention.keys_values(key, value))
    torch.testing.assert_close(apart, wanted, rtol=1e-4, atol=1e-5)


def test_layers_are_post_norm_transformer_layers() -> None:
    encoder = random_weights(EncoderLayer(SMALL, "paper"))
    decoder = random_weights(DecoderLayer(SMALL))
    theirs = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True).eval()
    theirs.load_state_dict(encoder.state_dict())
    x, z = randn(2, 9, 24), randn(2, 5, 24, seed=1)
    cross = nn.TransformerDecoderLayer(24, 4, 40, batch_first=True).eval()
    cross.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, x), theirs(x), rtol=1e-4, atol=1e-5)  # of a sequence with itself
        ours = decoder(x, *decoder.multihead_attn.keys_values(z, z))
        torch.testing.assert_close(ours, cross(x, z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_encoder_layer_by_hand(preset: str) -> None:
    """Erratum D2: who asks, who is asked, and whose values and residual are taken."""
    layer = random_weights(EncoderLayer(SMALL, preset))
    running, fixed = randn(2, 9, 24), randn(2, 9, 24, seed=1)
    attention = nn.MultiheadAttention(24, 4, batch_first=True).eval()
    attention.load_state_dict(layer.self_attn.state_dict())
    query = running if preset == "paper" else fixed
    with torch.no_grad():
        x = layer.norm1(running + attention(query, fixed, running, need_weights=False)[0])
        wanted = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        torch.testing.assert_close(layer(running, fixed), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("preset", "stream", "other"), [("paper", 2, 1), ("release", 1, 2)])
def test_values_come_from_one_template_and_similarity_from_the_other(preset: str, stream: int, other: int) -> None:
    """The paper rearranges the current template by the history's keys, the release the history (erratum D2)."""
    module = random_weights(SpatioTemporal(SMALL, preset))
    features = [randn(1, 24, 4, 4, seed=i) for i in range(3)]  # first, history, current
    with torch.no_grad():
        start = module(*features)
        for layer in module.layers:  # without keys every place is as similar as every other
            layer.self_attn.in_proj_weight[24:48] = 0
        plain = module(*features)
        changed = list(features)
        changed[other] = randn(1, 24, 4, 4, seed=9)
        torch.testing.assert_close(module(*changed), plain)  # the other template only ever spoke through similarity
        changed[stream] = randn(1, 24, 4, 4, seed=10)
        assert (module(*changed) - plain).abs().max() > 1e-2
    assert (start - plain).abs().max() > 1e-3


def test_the_first_template_is_added_unchanged() -> None:
    """Eq. 1: "the real target information will not be lost"."""
    module = random_weights(SpatioTemporal(SMALL))
    first, history, current = (randn(2, 24, 4, 4, seed=i) for i in range(3))
    with torch.no_grad():
        filtered = module(first, history, current) - first
        torch.testing.assert_close(module(first + 5, history, current) - (first + 5), filtered, rtol=1e-4, atol=1e-5)
    assert filtered.shape == first.shape
    assert (filtered >= -1e-6).all()  # Phi ends in a ReLU
    assert filtered.max() > 0


def test_gated_branch_by_hand() -> None:
    module = random_weights(SpatioTemporal(SMALL, gated=True))
    plain = SpatioTemporal(SMALL)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k in plain.state_dict()})
    first, history, current = (randn(2, 24, 4, 4, seed=i) for i in range(3))
    with torch.no_grad():
        fused = plain.eval()(first, history, current)
        module.branch_weight.copy_(torch.tensor([50.0, -50.0]))
        torch.testing.assert_close(module(first, history, current), fused)
        module.branch_weight.copy_(torch.tensor([0.0, 0.0]))
        both = torch.cat([first, fused - first], dim=1)
        gate = torch.stack([module.gate(both[:, i].mean(dim=(1, 2))[:, None])[:, 0] for i in range(48)], dim=1)
        wanted = (fused + module.gated_filter(both * gate[:, :, None, None])) / 2
        torch.testing.assert_close(module(first, history, current), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("separable", [False, True])
def test_augmentation_is_added_to_the_search_features(separable: bool) -> None:
    """Eq. 5, with keys and values of the template computed beforehand or on the spot."""
    module = random_weights(Discriminative(SMALL, separable))
    search, template = randn(2, 24, 6, 5), randn(2, 24, 3, 3, seed=1)
    with torch.no_grad():
        memory = module.memory(template)
        x = tokens(search)
        for layer in module.layers:
            x = layer(x, *layer.multihead_attn.keys_values(tokens(template), tokens(template)))
        mask = module.filter(module.norm(x).transpose(1, 2).reshape(search.shape))
        augmented = module(search, memory)
    assert [tuple(t.shape) for t in memory] == [(2, 4, 9, 6)] * 4
    torch.testing.assert_close(augmented, mask + search)
    assert augmented.shape == search.shape
    with torch.no_grad():
        other = module(search, module.memory(template.flip(1)))
    assert (other - augmented).abs().max() > 1e-3  # or the template was not looked at


def test_attention_of_large_values_stays_finite_in_half_precision() -> None:
    attention = random_weights(Attention(TransformerConfig(width=256)))
    x = 40 * randn(1, 256, 256)
    with torch.no_grad():
        wanted = attention(x, x, x)
        ours = attention.half()(x.half(), x.half(), x.half())
    assert torch.isfinite(ours).all()
    assert (ours - wanted).abs().median() < 0.01 * wanted.abs().median()


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_gradients_are_finite_and_reach_every_weight(preset: str) -> None:
    torch.manual_seed(0)
    st, da = SpatioTemporal(SMALL, preset, gated=True).train(), Discriminative(SMALL).train()
    first, history, current = (randn(2, 24, 4, 4, seed=i).requires_grad_() for i in range(3))
    fused = st(first, history, current)
    da(randn(2, 24, 5, 5, seed=7), da.memory(fused)).square().mean().backward()
    for module in (st, da):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    for feature in (first, history, current):
        assert feature.grad is not None
        assert torch.isfinite(feature.grad).all()
        assert feature.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100, "heads": 3}, "width must be a multiple of heads.*width 100, layers 4, heads 3"),
        ({"layers": 0}, "all sizes at least 1.*layers 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**change)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="attention must be one of paper, release, got 'both'"):
        SpatioTemporal(SMALL, "both")


@pytest.mark.parametrize(("share", "rate"), [(-0.1, 0.2), (1.1, 0.2), (0.7, 0.0), (0.7, 1.1), (float("nan"), 0.2)])
def test_bad_averages_are_refused(share: float, rate: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\] and rate in \(0, 1\]"):
        LinearUpdate(share, rate)
