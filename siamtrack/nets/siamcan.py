"""SiamCAN: cross-attention guided Siamese network, in the paper's size and as an edge model.

Source: "SiamCAN: Simple yet Effective Method to Enhance Siamese Short-Term Tracking", sections 3.1 to 3.3. The paper
starts from SiamBAN and prints several equations that cannot be meant; the errata S1 to S13 named below say which
reading is taken and why (`docs/papers.md`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from siamtrack.bundle import TrackingSpec, UpdateSpec
from siamtrack.nets.attention import ChannelAttention, SpatialAttention
from siamtrack.nets.correlation import pixelwise
from siamtrack.nets.decode import AnchorFree, RawMaps
from siamtrack.nets.edge import EdgeFeatures, cell_kernel, covered_cells
from siamtrack.nets.layers import CorrelationBranch, conv_norm_act, separable_tower
from siamtrack.nets.siamban import SiamBAN, SiamBANConfig
from siamtrack.nets.template_update import LinearUpdate


@dataclass(frozen=True)
class SiamCANConfig(SiamBANConfig):
    """Size and switches of `SiamCAN`; those of `SiamBAN` and the paper's two attentions.

    SiamBAN's 3x3 convolutions stay: without `adjust_convs` Eq. 4 and 5 are one and the same map for both branches,
    which is how they are printed (erratum S2).

    Attributes:
        channel_attention: the cross-attention of Eq. 1 to 3 (ablation row "+ cross-attention").
        spatial_attention: the self-spatial attention of Eq. 6 and 7 (ablation row "+ spatial-attention").
    """

    channel_attention: bool = True
    spatial_attention: bool = True


class AttendedBranch(CorrelationBranch):
    """SiamBAN's branch with self-spatial attention (Eq. 6 and 7) between correlation and prediction."""

    def __init__(self, config: SiamCANConfig, outputs: int) -> None:
        super().__init__(config.channels, outputs, config.correlation, config.adjust_convs)
        self.spatial = SpatialAttention() if config.spatial_attention else nn.Identity()

    def forward(self, kernel: Tensor, search: Tensor) -> Tensor:
        return self.head(self.spatial(self.correlated(kernel, search)))


class SiamCAN(SiamBAN):
    """The paper's network: SiamBAN, the search features weighed by the template, the correlation by itself.

    From SiamBAN: two classification channels, channel 1 the target (erratum S8); softmax-weighted sums over the
    levels with separate weights for the branches, not a concatenation with one alpha (S6); four distances in the
    order l, t, r, b (S7), made positive by exp(scale * raw) (S9).
    """

    template_names = (*SiamBAN.template_names, *(f"attention{level}" for level in range(3)))
    config: SiamCANConfig

    def __init__(self, config: SiamCANConfig | None = None) -> None:
        config = config or SiamCANConfig()
        super().__init__(config)
        self.attentions = nn.ModuleList(ChannelAttention() for _ in self.levels if config.channel_attention)

    def branch(self, outputs: int) -> CorrelationBranch:
        return AttendedBranch(self.config, outputs)

    def template(self, image: Tensor) -> tuple[Tensor, ...]:
        """``[N, 3, 127, 127]`` to 3 + 3 kernels ``[N, C, 5, 5]`` and 3 channel weights ``[N, C, 1, 1]``."""
        features = self.template_features(image)
        if self.config.channel_attention:
            weights = [attend(z) for attend, z in zip(self.attentions, features, strict=True)]
        else:
            weights = [torch.ones_like(z[:, :, :1, :1]) for z in features]
        return (*self.kernels(features), *weights)

    def search(self, image: Tensor, *template: Tensor) -> RawMaps:
        """``[N, 3, 255, 255]`` and the tensors of `template` to raw maps on the 25x25 grid."""
        kernels, weights = template[:-3], template[-3:]
        # Eq. 3: channel-wise product, no residual (erratum S4).
        attended = [x * v for x, v in zip(self.features(image), weights, strict=True)]
        return self.predict(attended, kernels)


@dataclass(frozen=True)
class SiamCANEdgeConfig:
    """Size and switches of `SiamCANEdge`.

    Attributes:
        channels: neck and head width.
        blocks: depthwise-separable blocks a branch.
        channel_attention: as in `SiamCANConfig`.
        spatial_attention: as in `SiamCANConfig`.
        takes_size: tell the template how large the target is; see `SiamCANEdge`. Such a template is not renewed.
        update_share: share of a renewed template that later frames may have, as in `LinearUpdate`; 0 keeps the first
            frame's for ever.
        update_rate: how far one renewal goes.
    """

    channels: int = 96
    blocks: int = 3
    channel_attention: bool = True
    spatial_attention: bool = True
    takes_size: bool = False
    update_share: float = 0.7
    update_rate: float = 0.2

    def __post_init__(self) -> None:
        LinearUpdate(self.update_share, self.update_rate)  # refuses what cannot be, whether it is used or not


class EdgeBranch(nn.Module):
    """Spatial attention, depthwise-separable blocks, 1x1 prediction."""

    def __init__(self, config: SiamCANEdgeConfig, outputs: int) -> None:
        super().__init__()
        width = config.channels
        self.spatial = SpatialAttention() if config.spatial_attention else nn.Identity()
        self.tower = separable_tower(width, config.blocks)
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(self.tower(self.spatial(x)))


class SiamCANEdge(EdgeFeatures):
    """SiamCAN for CPUs and small GPUs: MobileNetV2, 209 px search crop, 14x14 grid of stride 16.

    Kept from the paper: cross-channel attention of the template on the search features, self-spatial attention a
    branch, circle and ellipse labels, DIoU regression. What deviates, and why:

    * MobileNetV2 to stride 16 in place of ResNet-50; its stride-8 features, taken in by a 2x2 convolution, stand for
      the second level, so small targets keep detail. The two are added before correlation, not fused after it.
    * A search crop of 209 in place of 255 pixels on the same scale: a third less to compute, and the target may still
      move by 1.1 times its size between frames.
    * Pixelwise in place of depthwise correlation, shared by the branches: every search cell against each of the 49
      template cells. It learns less of what training targets look like. The channel weights v then fold into the
      kernel, ``z (v x) = (v z) x``, and the search graph never sees them.
    * Depthwise-separable towers, because the correlation map carries position, not appearance, and must be read
      spatially; one sigmoid logit in place of two softmax ones, distances of ``32 exp(raw)`` without a learnt scale.
    * The template is renewed: a running average of kernels, 30 % of which stay the first frame's (`LinearUpdate`). The
      paper keeps the first frame's; the average has less noise and follows slow changes.
    * With `takes_size`, each template cell gives two correlation maps in place of one, weighed by how much of it the
      target covers and by the rest, and what it covers decides on a bias. Crops are scaled by area: without this the
      network cannot know whether a head ends below the ears or above them.
    * Training (`training/recipes/siamcan-mobilenetv2.yaml`): focal loss over all cells in place of sampled, balanced
      cross-entropy, and the cell nearest to the centre always positive, or a small target would have none.
    """

    tracking = TrackingSpec(  # four by `evaluation.tune`, for another seed than the shipped one; see the model card
        penalty_k=0.05, window_influence=0.274, size_rate=0.419, uncertain_rate=0.5, motion_rate=0.202, second_look=1.2
    )
    update_rule = UpdateSpec(min_score=0.6, interval=10)
    learns_update = False

    def __init__(self, config: SiamCANEdgeConfig | None = None) -> None:
        config = config or SiamCANEdgeConfig()
        width = config.channels
        super().__init__(width)
        self.config = config
        self.attention = ChannelAttention() if self.config.channel_attention else None
        cells = self.cells**2
        self.takes_size = config.takes_size
        adaptive = config.update_share != 0 and not config.takes_size
        self.renew = LinearUpdate(config.update_share, config.update_rate) if adaptive else None
        self.template_names: tuple[str, ...] = ("feature",) if adaptive else ("kernel",)
        self.update_names: tuple[str, ...] = ("kernel",) if adaptive else ()
        self.mix = conv_norm_act(2 * cells if self.takes_size else cells, width, 1)[:-1]  # without ReLU: see `search`
        if self.takes_size:
            self.template_names = ("kernel", "bias")
            self.shape = nn.Linear(cells, width)
            nn.init.zeros_(self.shape.weight)
            nn.init.zeros_(self.shape.bias)
            self.register_load_state_dict_pre_hook(_add_size)
        self.cls = EdgeBranch(self.config, outputs=1)
        self.loc = EdgeBranch(self.config, outputs=4)
        self.decoder = AnchorFree(self.grid)
        nn.init.constant_(self.cls.predict.bias, -math.log(99.0))  # type: ignore[arg-type]  # focal loss: prior 0.01

    def template(self, image: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
        """To the correlation kernel ``[N, 49, C]``, channel attention folded in.

        With `takes_size` it is ``[N, 98, C]``, and there is a bias ``[N, C, 1, 1]``.

        Args:
            image: ``[N, 3, 127, 127]``.
            size: ``[N, 2]`` width and height of the target in crop pixels, with `takes_size` alone.

        Raises:
            ValueError: there is no size with `takes_size`, or one without.
        """
        if self.takes_size != (size is not None):
            given = "without the target's size" if size is None else "with the target's size"
            raise ValueError(
                f"this network has takes_size={self.takes_size} in its model_config, and was called {given}"
            )
        z = self.template_features(image)
        if self.attention is not None:
            z = z * self.attention(z)
        kernel = cell_kernel(z)
        if size is None:
            return (kernel,)
        covered = covered_cells(size, self.cells)  # [N, 49]
        inside = covered[:, :, None]
        kernel = torch.cat([kernel * inside, kernel * (1 - inside)], dim=1)
        return kernel, self.shape(covered)[:, :, None, None]

    def update(self, first: Tensor, history: Tensor, current: Tensor) -> tuple[Tensor]:
        """Three kernels of `template` to the renewed one, the next history.

        Raises:
            ValueError: the configuration keeps the first frame's template.
        """
        if self.renew is None:
            raise ValueError("this configuration (update_share 0, or takes_size) does not renew its template")
        return (self.renew(first, history, current),)

    def search(self, image: Tensor, kernel: Tensor, bias: Tensor | None = None) -> RawMaps:
        """``[N, 3, 209, 209]`` and the tensors of `template` to raw maps on the 14x14 grid."""
        x = self.mix(pixelwise(self.features(image), kernel))
        x = functional.relu(x if bias is None else x + bias)  # [N, C, 14, 14]
        ltrb = 32 * torch.exp(self.loc(x).clamp(-6.0, 2.7))  # 0.08 to 476 px: never nothing, never more than a crop
        return RawMaps(logits=self.cls(x), ltrb=ltrb)

    def forward(self, template: Tensor, search: Tensor, size: Tensor | None = None) -> RawMaps:
        """Normalised template ``[N, 3, 127, 127]`` and search ``[N, 3, 209, 209]`` crops to raw maps."""
        return self.search(search, *self.template(template, size))


def _add_size(net: SiamCANEdge, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let weights of a network without `takes_size` start one with it: it then begins as what that was."""
    mix, shape = f"{prefix}mix.0.weight", f"{prefix}shape."
    if mix in state and state[mix].shape[1] == net.cells**2:
        state[mix] = state[mix].repeat(1, 2, 1, 1)
        for name, value in net.shape.state_dict().items():
            state.setdefault(shape + name, torch.zeros_like(value))
