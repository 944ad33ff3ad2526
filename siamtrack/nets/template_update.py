"""How templates are renewed: a running average, and the two transformer modules of DASTSiam.

The latter are spatio-temporal fusion (ST) and discriminative augmentation (DA). Source: "DASTSiam: Spatio-Temporal
Fusion and Discriminative Augmentation for Improved Siamese Tracking", sections 2.1 and 2.2. Errata D2 to D7
(`docs/papers.md`) say which reading is taken where paper and released network differ. Parameters have the released
network's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from siamtrack.nets.layers import separable_tower

PRESETS = ("paper", "release")


class LinearUpdate(nn.Module):
    """A running average of the target's features about those of the first frame; nothing in it is learnt.

    ``h' = h + rate ((1 - share) first + share current - h)``, from h = first on. It is the rule of correlation filters
    with an anchor: whatever is seen, ``1 - share`` of the template stays that of the first frame, so that a few wrong
    boxes cannot replace the target.

    Args:
        share: of the template that later frames may have, in [0, 1].
        rate: how far one renewal goes, in (0, 1].

    Raises:
        ValueError: one of them is out of its range.
    """

    def __init__(self, share: float, rate: float) -> None:
        super().__init__()
        if not 0 <= share <= 1 or not 0 < rate <= 1:
            raise ValueError(f"share must be in [0, 1] and rate in (0, 1], got share {share} and rate {rate}")
        self.share, self.rate = share, rate

    def forward(self, first: Tensor, history: Tensor, current: Tensor) -> Tensor:
        """Features of one shape ``[N, ...]`` to the renewed ones, the next history."""
        return history + self.rate * ((1 - self.share) * first + self.share * current - history)


@dataclass(frozen=True)
class TransformerConfig:
    """Size of an encoder or decoder; the paper names none of it, the defaults are the release's (erratum D6).

    Attributes:
        width: channels of a token.
        layers: encoder or decoder layers.
        heads: attention heads; they share `width` evenly.
        hidden: width of the feed-forward part.
        dropout: share of values dropped while training.
    """

    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 1024
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.hidden) < 1 or self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads and all sizes at least 1, got width {self.width}, layers "
                f"{self.layers}, heads {self.heads}, hidden {self.hidden}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Attention(nn.Module):
    """Multi-head attention as plain matrix products, which every exporter takes; parameters of nn.MultiheadAttention.

    Divided by the root of one head's width (erratum D4), before the product: in half precision it cannot overflow then.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, tokens: Tensor, part: int) -> Tensor:
        """Query (0), key (1) or value (2) projection: ``[N, L, C]`` to ``[N, heads, L, C / heads]`` (erratum D3)."""
        rows = slice(part * tokens.shape[2], (part + 1) * tokens.shape[2])
        projected = functional.linear(tokens, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[N, M, C]`` to what `attend` takes, each ``[N, heads, M, C / heads]``."""
        return self._project(key, 1), self._project(value, 2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Query tokens ``[N, L, C]`` on projected keys and values to ``[N, L, C]``."""
        queries = self._project(query, 0)
        similarity = (queries * queries.shape[3] ** -0.5) @ keys.transpose(2, 3)  # [N, heads, L, M]
        share = similarity.float().softmax(dim=3).to(values.dtype)  # half precision cannot hold a sum of so many
        return self.out_proj((self.dropout(share) @ values).transpose(1, 2).flatten(2))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[N, L, C]``, ``[N, M, C]``, ``[N, M, C]`` to ``[N, L, C]``."""
        return self.attend(query, *self.keys_values(key, value))


class EncoderLayer(nn.Module):
    """Post-norm layer that rearranges a running sequence by similarity to a fixed one (Eq. 2, erratum D2)."""

    def __init__(self, config: TransformerConfig, preset: str) -> None:
        super().__init__()
        self.preset = preset
        self.self_attn = Attention(config)
        self.linear1 = nn.Linear(config.width, config.hidden)
        self.linear2 = nn.Linear(config.hidden, config.width)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, running: Tensor, fixed: Tensor) -> Tensor:
        """Both ``[N, L, C]``; values come from the running sequence, so both must have the same places in them."""
        query = running if self.preset == "paper" else fixed
        running = self.norm1(running + self.dropout(self.self_attn(query, fixed, running)))
        hidden = self.dropout(functional.relu(self.linear1(running)))
        return self.norm2(running + self.dropout(self.linear2(hidden)))


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer: self-attention, cross-attention to the template, feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.multihead_attn = Attention(config)
        self.linear1 = nn.Linear(config.width, config.hidden)
        self.linear2 = nn.Linear(config.hidden, config.width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Search tokens ``[N, L, C]`` and the template's `Attention.keys_values` to ``[N, L, C]``."""
        x = self.norm1(x + self.dropout(self.self_attn(x, x, x)))
        x = self.norm2(x + self.dropout(self.multihead_attn.attend(x, keys, values)))
        hidden = self.dropout(functional.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class SpatioTemporal(nn.Module):
    """Spatio-temporal fusion, ``ST(f_i, f_a, f_c) = Phi_ST(Encoder(f_a, f_c)) + f_i`` (Eq. 1).

    Text and Eq. 2 take queries and values from f_c and keys from f_a; the released network takes queries and keys from
    f_c, values and residual from f_a (erratum D2). Both arrange values by a similarity that was computed with another
    sequence, which only means something because place k is the same place of the target in both.

    Args:
        config: size of the encoder.
        preset: "paper" or "release".
        gated: add the release's second branch, which is not in the paper (erratum D7): f_i and the filtered encoder
            output side by side, each channel gated by its own mean, two convolutions; a learnt share of each branch.
    """

    def __init__(self, config: TransformerConfig, preset: str = "paper", gated: bool = False) -> None:
        super().__init__()
        check_preset(preset)
        self.preset = preset
        self.layers = nn.ModuleList(EncoderLayer(config, preset) for _ in range(config.layers))
        self.filter = adaptive_filter(config.width, config.width, bias=False)
        self.gate = self.gated_filter = None
        if gated:
            self.gate = nn.Sequential(nn.Linear(1, 15), nn.ReLU(inplace=True), nn.Linear(15, 1), nn.Sigmoid())
            self.gated_filter = adaptive_filter(2 * config.width, config.width, bias=False)
            self.branch_weight = nn.Parameter(torch.ones(2))

    def forward(self, first: Tensor, history: Tensor, current: Tensor) -> Tensor:
        """Features of the first, the remembered and the current template ``[N, C, H, W]`` to the fused one."""
        running, fixed = (current, history) if self.preset == "paper" else (history, current)
        x, fixed = tokens(running), tokens(fixed)
        for layer in self.layers:
            x = layer(x, fixed)
        filtered = self.filter(x.transpose(1, 2).unflatten(2, first.shape[2:]))
        fused = filtered + first
        if self.gate is None or self.gated_filter is None:
            return fused
        both = torch.cat([first, filtered], dim=1)  # [N, 2 C, H, W]
        gate = self.gate(both.mean(dim=(2, 3))[..., None])[..., None]  # [N, 2 C, 1, 1]
        share = self.branch_weight.softmax(0)
        return share[0] * fused + share[1] * self.gated_filter(gate * both)


class Discriminative(nn.Module):
    """Discriminative augmentation, ``DA(f_z*, f_s) = Phi_DA(Decoder(f_z*, f_s)) + f_s`` (Eq. 5).

    Args:
        config: size of the decoder.
        separable: make Phi_DA of depthwise-separable convolutions, for the edge form.
    """

    def __init__(self, config: TransformerConfig, separable: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        width = config.width
        self.filter = separable_tower(width, 2) if separable else adaptive_filter(width, width, bias=True)

    def memory(self, template: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every layer, ``[N, heads, H W, C / heads]``, from the fused template ``[N, C, H, W]``.

        They change with the template alone, so they may be computed where it is renewed.
        """
        z = tokens(template)
        return tuple(t for layer in self.layers for t in layer.multihead_attn.keys_values(z, z))  # type: ignore[union-attr,operator]

    def forward(self, search: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """Search features ``[N, C, H, W]`` and the template's `memory` to augmented search features."""
        x = tokens(search)
        for i, layer in enumerate(self.layers):
            x = layer(x, memory[2 * i], memory[2 * i + 1])
        return self.filter(self.norm(x).transpose(1, 2).unflatten(2, search.shape[2:])) + search


def three_features(
    feature: Callable[[Tensor], tuple[Tensor, ...]], template: Tensor, history: Tensor | None, current: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the first, the remembered and the current template crop, in one pass: one set of batch statistics.

    Where a crop is None the first feature stands for it, as when a track starts.

    Args:
        feature: the network's `template`.
        template: crops of the first frame ``[N, 3, 127, 127]``.
        history: likewise, of a later frame.
        current: likewise.
    """
    crops = [crop for crop in (template, history, current) if crop is not None]
    features = list(feature(torch.cat(crops))[0].chunk(len(crops)))
    first = features.pop(0)
    return first, first if history is None else features.pop(0), first if current is None else features.pop(0)


def check_preset(name: str) -> None:
    """Raise ValueError when `name` is no reading of the fusion's attention."""
    if name not in PRESETS:
        raise ValueError(f"attention must be one of {', '.join(PRESETS)}, got {name!r}")


def tokens(features: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N, H W, C]``, row by row."""
    return features.flatten(2).transpose(1, 2)


def adaptive_filter(inputs: int, outputs: int, bias: bool) -> nn.Sequential:
    """Phi of Eq. 1 and 5: twice 3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
    )
