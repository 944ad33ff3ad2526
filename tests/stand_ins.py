"""What the tests of several networks share: a cheap backbone in place of ResNet-50, weights that make values move."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


class PooledBackbone(nn.Module):
    """ResNet-50's place in a network: three levels whose cell k is centred on pixel 7 + 8 k, almost for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, channels, 1) for channels in (512, 1024, 2048))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        pooled = functional.avg_pool2d((image - 127) / 64, 15, 8)  # 127 -> 15, 255 -> 31
        return tuple(torch.sin(4 * level(pooled)) for level in self.levels)


def without_resnet(build: Any, config: Any = None) -> Any:
    """A ResNet-50 tracker on `PooledBackbone`."""
    torch.manual_seed(0)
    with patch("siamtrack.nets.layers.ResNet50Dilated", PooledBackbone):
        return build(config)


def lively(net: Any, batch: int = 4) -> Any:
    """Weights and statistics by which different crops give different answers; in eval mode."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the one forward pass below sets the statistics
    scale = net.normalisation.scale
    with torch.no_grad():
        net.train()(crops(batch, net.template_size, 1) * scale, crops(batch, net.search_size, 2) * scale)
    return net.eval()


def crops(batch: int, side: int, seed: int) -> Tensor:
    """Smooth random images ``[batch, 3, side, side]``, 0..255."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (batch, 3, side // 8, side // 8)).astype(np.float32))
    return functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)


def check_batch(net: Any, bundle: Any) -> None:
    """Three samples at once: ONNX Runtime against PyTorch, and answers that differ between the samples."""
    import onnxruntime

    from siamtrack.bundle import SEARCH_OUTPUTS
    from siamtrack.nets.decode import SearchGraph, TemplateGraph

    def bytes_of(side: int, seed: int) -> Tensor:
        return crops(3, side, seed).permute(0, 2, 3, 1).to(torch.uint8).contiguous()

    image, sizes, tuning = bytes_of(net.search_size, 5), torch.tensor([[60.0, 40], [30, 90], [80, 80]]), torch.zeros(3)
    with torch.no_grad():
        template = TemplateGraph(net)(bytes_of(net.template_size, 6))
        wanted = SearchGraph(net)(image, *template, sizes, tuning)
    names = bundle.manifest.template_tensors
    session = onnxruntime.InferenceSession(str(bundle.graph_path("search")), providers=["CPUExecutionProvider"])
    feeds = {"image": image, "prev_size": sizes, "tuning": tuning, **dict(zip(names, template, strict=True))}
    ours = session.run(list(SEARCH_OUTPUTS), {name: value.numpy() for name, value in feeds.items()})
    for name, value, reference in zip(SEARCH_OUTPUTS, ours, wanted, strict=True):
        tolerance = 0.05 if name == "box" else 1e-4
        np.testing.assert_allclose(value, reference.numpy(), atol=tolerance, rtol=0, err_msg=name)
    response = ours[3]
    assert response.max() - response.min() > 1e-2  # lively, or the comparison would show nothing
    assert min(np.abs(response[0] - response[1]).max(), np.abs(response[1] - response[2]).max()) > 1e-3
