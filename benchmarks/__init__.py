"""Speed and accuracy, side by side with what a user would pick instead. What the measuring scripts share.

Run them from the checkout: ``python -m benchmarks.accuracy``, ``python -m benchmarks.latency``.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.peers import available_peers, create_peer
from evaluation.tables import markdown_table as markdown_table
from siamtrack import SiamTracker
from siamtrack.benchmark import environment
from siamtrack.bundle import load_bundle, shipped_models


def tracker_factories(
    models: Sequence[str] | None, peers: Sequence[str] | None, default_peers: Sequence[str], threads: int
) -> dict[str, Callable[[], Any]]:
    """A maker for each tracker of a benchmark, by the name that tables call it.

    Models are loaded here, once, so loading is in no measurement; their maker returns the same tracker every time. A
    bundle with INT8 graphs beside its own is two trackers, the second called ``NAME-int8``.

    Args:
        models: names of shipped bundles or folders of bundles; None for all that are shipped.
        peers: names in `evaluation.peers.PEERS`; None for those of `default_peers` that this OpenCV has, with a notice
            about the others on stderr.
        default_peers: see `peers`.
        threads: threads for the models; OpenCV's are set with ``cv2.setNumThreads``.

    Raises:
        ImportError: a peer was asked for that this OpenCV lacks.
        ValueError: an unknown peer, a bundle that is missing or damaged, two trackers of one name, or none at all.
    """
    factories: dict[str, Callable[[], Any]] = {}
    for model in shipped_models() if models is None else models:
        name, bundle = model_title(model), load_bundle(model)
        names = {bundle.manifest.precision: name, **({"int8": f"{name}-int8"} if bundle.int8_paths else {})}
        for precision, title in names.items():
            tracker = SiamTracker.from_pretrained(model, threads=threads, precision=precision)
            _add(factories, title, _always(tracker))
    if peers is None:
        missing = [name for name in default_peers if name not in available_peers()]
        if missing:
            print(f"not in this cv2, left out: {', '.join(missing)} (opencv-contrib-python has them)", file=sys.stderr)
        peers = [name for name in default_peers if name not in missing]
    for name in peers:
        create_peer(name)  # refuses a missing one now rather than after minutes of measuring
        _add(factories, name, _peer(name))
    if not factories:
        raise ValueError("nothing to measure: no model is shipped and no peer was named")
    return factories


def model_title(model: str) -> str:
    """What tables call a shipped model or a bundle's folder."""
    return Path(model).resolve().name


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line that repeats a measurement."""
    return shlex.join(["python", "-m", module, *arguments])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], command_line: str) -> None:
    """Write rows as CSV below ``#`` lines with the command and the machine (pandas: ``read_csv(..., comment="#")``).

    Floats are written with four decimals, NaN as an empty field.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# command: {command_line}\n")
        file.write("# " + ", ".join(f"{key}: {value}" for key, value in environment().items()) + "\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _field(value) for key, value in row.items()})


def _field(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if value != value else f"{value:.4f}"


def _add(factories: dict[str, Callable[[], Any]], name: str, make: Callable[[], Any]) -> None:
    if name in factories:
        raise ValueError(f"two trackers are called {name!r}; rename one bundle's folder")
    factories[name] = make


def _always(tracker: Any) -> Callable[[], Any]:
    return lambda: tracker


def _peer(name: str) -> Callable[[], Any]:
    return lambda: create_peer(name)
