"""PyTorch on the GPU: in the engine's place, as a competitor, and to measure what the GPU can do at most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.model_size import Size
from siamtrack.bundle import SIZE, Bundle, GraphSpec, TensorSpec
from siamtrack.crop import Image, Window, crop
from siamtrack.nets.decode import SearchGraph, SiameseNet, TemplateGraph, UpdateGraph, is_adaptive, normalise
from siamtrack.runners.cuda.device import Device

Fill = tuple[float, float, float]


class HalfTemplate(nn.Module):
    """`TemplateGraph` with the network in FP16."""

    def __init__(self, net: SiameseNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, *size: Tensor) -> tuple[Tensor, ...]:
        return self.net.template(normalise(image, self.net.normalisation).half(), *(wh.half() for wh in size))


class HalfSearch(nn.Module):
    """`SearchGraph` with the network in FP16, all before and after it in FP32."""

    def __init__(self, net: SiameseNet) -> None:
        super().__init__()
        self.net = net
        net.decoder.float()

    def forward(self, image: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *template, prev_size, tuning = rest
        raw = self.net.search(normalise(image, self.net.normalisation).half(), *template)
        floats = [None if part is None else part.float() for part in raw]
        return tuple(self.net.decoder(type(raw)(*floats), prev_size, tuning))


def graph_modules(net: nn.Module, half: bool = False) -> dict[str, nn.Module]:
    """The graphs of a network as modules, by name; changes the network's precision.

    Args:
        net: of `siamtrack.nets.MODELS`, on the device it will run on.
        half: FP16 in the network, FP32 round it.
    """
    net = net.eval().requires_grad_(False)
    siamese = cast(SiameseNet, net.half() if half else net)
    modules: dict[str, nn.Module] = (
        {"template": HalfTemplate(siamese), "search": HalfSearch(siamese)}
        if half
        else {"template": TemplateGraph(siamese), "search": SearchGraph(siamese)}
    )
    if is_adaptive(net):
        modules["update"] = UpdateGraph(net)
    return modules


class TorchEngine:
    """A module where a TensorRT engine would be; see `siamtrack.runners.cuda.engine.Engine`.

    Its memory comes from a pool of its own, so that captured frames keep their addresses.

    Args:
        device: owns the stream.
        module: on the GPU.
        graph: what it computes.
        half: its template tensors are FP16.
    """

    def __init__(self, device: Device, module: nn.Module, graph: GraphSpec, half: bool = False) -> None:
        own = ("image", SIZE, "prev_size", "tuning", "box", "score", "penalty", "response")
        kind = "float16" if half else "float32"

        def typed(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
            return [s if s.name in own else TensorSpec(s.name, kind, s.shape) for s in specs]

        self.inputs, self.outputs = typed(graph.inputs), typed(graph.outputs)
        self._module: nn.Module | None = module
        self._stream = torch.cuda.ExternalStream(device.stream)
        self._pool = torch.cuda.MemPool()

    def bind(self, batch: int, tensors: Mapping[str, int]) -> Callable[[], None]:
        inputs = [at_address(spec, batch, tensors[spec.name]) for spec in self.inputs]
        outputs = [at_address(spec, batch, tensors[spec.name]) for spec in self.outputs]
        module = self._module
        assert module is not None

        def work() -> None:
            with torch.inference_mode(), torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                for place, value in zip(outputs, module(*inputs), strict=True):
                    place.copy_(value)

        return work

    def capturable(self, batch: int) -> bool:
        return True

    def close(self) -> None:
        self._module = None


class _Memory:
    """Device memory as PyTorch takes it from others."""

    def __init__(self, spec: TensorSpec, batch: int, address: int) -> None:
        shape = tuple(batch if isinstance(side, str) else side for side in spec.shape)
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(spec.dtype).str,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def at_address(spec: TensorSpec, batch: int, address: int) -> Tensor:
    """A tensor that shares the memory at a device address."""
    return torch.as_tensor(_Memory(spec, batch, address), device="cuda")


def torch_engines(bundle: Bundle, net: nn.Module, device: Device, half: bool = False) -> dict[str, TorchEngine]:
    """A network in the place of a bundle's engines."""
    modules = graph_modules(net.cuda(), half)
    # The exporter drops inputs that no node reads; the module takes them all the same.
    return {
        name: TorchEngine(device, _Padded(modules[name], graph, net), graph, half)
        for name, graph in bundle.manifest.graphs.items()
    }


class _Padded(nn.Module):
    """A module fed by the inputs its graph has; those the graph lacks are left out of the computation anyway."""

    def __init__(self, module: nn.Module, graph: GraphSpec, net: nn.Module) -> None:
        super().__init__()
        self.module = module
        names = getattr(net, "update_names", ()) or getattr(net, "template_names", ())
        wanted = ["image", *names, "prev_size", "tuning"]
        given = [spec.name for spec in graph.inputs]
        self.places = [given.index(n) if n in given else None for n in wanted] if "tuning" in given else None

    def forward(self, *inputs: Tensor) -> Any:
        if self.places is None:
            return self.module(*inputs)
        empty = inputs[0].new_empty(0)
        return self.module(*(empty if place is None else inputs[place] for place in self.places))


class TorchLoop:
    """A tracker's frame as PyTorch users write it: crop on the host, copy, network, copy back.

    Args:
        bundle: for its geometry.
        net: on the GPU, in FP16 afterwards.
        targets: windows a frame.
        graph: replay the network as a CUDA graph.
    """

    def __init__(self, bundle: Bundle, net: nn.Module, targets: int, graph: bool) -> None:
        self._size = bundle.manifest.crop.search_px
        template_px = bundle.manifest.crop.template_px
        modules = graph_modules(net.cuda(), half=True)
        self._search = modules["search"]
        with torch.inference_mode():
            image = torch.zeros(1, template_px, template_px, 3, dtype=torch.uint8, device="cuda")
            sizes = [torch.full((1, 2), 60.0, device="cuda")] if bundle.manifest.takes_size else []
            tensors = modules["template"](image, *sizes)
            if "update" in modules:
                tensors = modules["update"](*[tensors[0]] * 3)
            self._tensors = [t.repeat(targets, *[1] * (t.dim() - 1)) for t in tensors]
        self._image = torch.zeros(targets, self._size, self._size, 3, dtype=torch.uint8, device="cuda")
        self._prev_size = torch.full((targets, 2), 60.0, device="cuda")
        self._tuning = torch.tensor([0.06, 0.4, 0.0], device="cuda")
        self._graph: Any = None
        if graph:
            self._capture()

    def frame(self, image: Image, windows: Sequence[Window], fill: Fill) -> NDArray[np.float32]:
        """Boxes and scores of one image, on the host."""
        crops = torch.from_numpy(np.stack([crop(image, window, self._size, fill) for window in windows]))
        with torch.inference_mode():
            self._image.copy_(crops)
            if self._graph is None:
                self._results = self._run()
            else:
                self._graph.replay()
            box, score = self._results[:2]
            return torch.cat([box, score[:, None]], 1).cpu().numpy()

    def _run(self) -> tuple[Tensor, ...]:
        return self._search(self._image, *self._tensors, self._prev_size, self._tuning)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._run()


@dataclass(frozen=True)
class Work:
    """What a search has to do at the least.

    Attributes:
        flops: of its convolutions and matrix products; a multiply-add counts two.
        nbytes: weights, network input and template tensors, each read once.
        upload_bytes: crops, which is the least that has to cross the bus.
    """

    flops: float
    nbytes: float
    upload_bytes: float


@dataclass(frozen=True)
class Rates:
    """What the GPU was measured to do at most.

    Attributes:
        flops_per_s: in a large matrix product.
        bytes_per_s: read and written together, in a large copy.
        upload_bytes_per_s: from page-locked memory.
    """

    flops_per_s: float
    bytes_per_s: float
    upload_bytes_per_s: float


def count_work(bundle: Bundle, size: Size, targets: int, bytes_per_value: int) -> Work:
    """What a search of several targets has to do.

    Args:
        bundle: for the shapes of its search graph.
        size: of the network, as `benchmarks.model_size` counts it.
        targets: batch.
        bytes_per_value: 4, 2 or 1, of weights and template tensors.
    """
    inputs = bundle.manifest.graphs["search"].inputs
    pixels = targets * bundle.manifest.crop.search_px**2 * 3
    kept = sum(
        math.prod(int(side) for side in s.shape[1:]) for s in inputs if s.name in bundle.manifest.template_tensors
    )
    nbytes = bytes_per_value * (1e6 * size.parameters_m + targets * kept) + pixels
    return Work(2e9 * size.search_gmac * targets, nbytes, pixels)


def floor_ms(work: Work, rates: Rates) -> float:
    """Milliseconds below which no implementation can get: the upload, then the slower of arithmetic and memory."""
    compute = max(work.flops / rates.flops_per_s, work.nbytes / rates.bytes_per_s)
    return 1000 * (work.upload_bytes / rates.upload_bytes_per_s + compute)


def measure_rates(half: bool) -> Rates:
    """Measure the GPU's ceilings; FP32 products may use TF32, as TensorRT's do."""
    torch.backends.cuda.matmul.allow_tf32 = True
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.float16 if half else torch.float32) for _ in range(2))
    product = _seconds(lambda: torch.mm(a, b))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    sent = _seconds(lambda: target[: len(host)].copy_(host, non_blocking=True))
    return Rates(2 * side**3 / product, 2 * len(source) / copied, len(host) / sent)


def _seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Median GPU time of a piece of work."""
    times = []
    for turn in range(repeats + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - began)
    seconds = float(np.median(times))
    return seconds if seconds > 0 else math.nan
