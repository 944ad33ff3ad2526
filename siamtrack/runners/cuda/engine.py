"""What runs one graph of a bundle on a GPU, as the runner sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from siamtrack.bundle import FEATURE, SEARCH_OUTPUTS, SIZE, UPDATE_INPUTS, Bundle, BundleError, TensorSpec


class Engine(Protocol):
    """One graph of a bundle, ready to run on a device's stream."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """With the types it has; those that its graph ignores may be missing."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """With the types it has."""
        ...

    def bind(self, batch: int, tensors: Mapping[str, int]) -> Callable[[], None]:
        """Work that queues the engine once.

        Args:
            batch: samples, N of the graph's shapes.
            tensors: device address of every input and output.

        Raises:
            RuntimeError: by this or by the work: the engine cannot run so.
        """
        ...

    def capturable(self, batch: int) -> bool:
        """Whether the work of this batch, which has run once, can be captured in a CUDA graph."""
        ...

    def close(self) -> None:
        """Give everything back; safe to call twice."""
        ...


def check_engines(bundle: Bundle, engines: Mapping[str, Engine]) -> None:
    """Engines must have the names and shapes of the bundle's graphs; where they meet, one type; floats at the host.

    An engine may lack an input: TensorRT drops those that a graph does not look at.

    Raises:
        BundleError: one has not.
    """
    graphs = bundle.manifest.graphs
    if set(engines) != set(graphs):
        raise BundleError(f"{bundle.path}: engines for {sorted(engines)}, the bundle has {sorted(graphs)}; build anew")
    for graph, engine in engines.items():
        for side, actual, wanted in (
            ("inputs", engine.inputs, graphs[graph].inputs),
            ("outputs", engine.outputs, graphs[graph].outputs),
        ):
            have, want = ({s.name: _free(s.shape) for s in specs} for specs in (actual, wanted))
            if have != {name: shape for name, shape in want.items() if side == "outputs" or name in have}:
                raise BundleError(f"{bundle.path}: {graph} engine: {side} are {actual}, the manifest says {wanted}")
    kinds: dict[str, str] = {**dict.fromkeys(SEARCH_OUTPUTS, "float32"), "prev_size": "float32", "tuning": "float32"}
    kinds |= {"image": "uint8", SIZE: "float32"}
    makers = (engines["template"], *([engines["update"]] if "update" in engines else []))
    kinds |= {spec.name: spec.dtype for maker in makers for spec in maker.outputs}
    if "update" in engines:
        kinds |= dict.fromkeys(UPDATE_INPUTS, kinds[FEATURE])
        kinds[engines["update"].outputs[0].name] = kinds[FEATURE]  # the next history
    for graph, engine in engines.items():
        for spec in (*engine.inputs, *engine.outputs):
            if spec.dtype != kinds[spec.name]:
                raise BundleError(
                    f"{bundle.path}: {graph} engine: {spec.name} is {spec.dtype}, expected {kinds[spec.name]}; "
                    "build the engines anew"
                )


def _free(shape: Sequence[int | str]) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in shape]


def item_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Shape of one sample of a batch.

    Raises:
        BundleError: a side other than the batch is free.
    """
    sides = tuple(side for side in spec.shape[1:] if isinstance(side, int))
    if len(sides) != len(spec.shape) - 1:
        raise BundleError(f"{spec.name} has the shape {list(spec.shape)}: only the batch may be free; export anew")
    return sides
