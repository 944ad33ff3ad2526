"""How large every network is: parameters, and multiply-accumulates of each of its graphs.

    python -m benchmarks.model_size

Counted, not measured: on tensors without memory, at batch 1, without the decode. Writes ``model_size.csv`` and the
page ``docs/model_size.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import command, markdown_table, write_csv
from siamtrack.bundle import DEFAULT_MODEL
from siamtrack.nets import MODELS
from siamtrack.nets.build import build_model
from siamtrack.nets.decode import is_adaptive, takes_size

NETWORKS: dict[str, Callable[[], Any]] = {
    **MODELS,
    f"{DEFAULT_MODEL}, told the size": partial(build_model, DEFAULT_MODEL, {"takes_size": True}),
}
DEFAULT_OUT = Path("benchmarks/results")
DEFAULT_PAGE = Path("docs/model_size.md")
PAGE = """# How large the networks are

`python -m benchmarks.model_size` writes this page. Parameters in millions; billions of multiply-accumulates of the
convolutions and matrix products of each graph, at batch 1, without the decode. The template graph runs once a target,
the update graph only when the template is renewed, the search graph every frame.

`tests/test_model_size.py` holds the paper-sized networks to what their reference implementations count, within 0.5 %.
SiamLA samples features by matrix products, which every runtime takes: 0.50 of its search graph, where bilinear gathers
would count nothing.

"""


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Attributes:
        model: its name in `siamtrack.nets.MODELS`.
        parameters_m: parameters, millions.
        template_gmac: of the template graph.
        update_gmac: of the update graph; NaN where there is none.
        search_gmac: of the search graph, one crop.
        search_px: side of that crop.
    """

    model: str
    parameters_m: float
    template_gmac: float
    update_gmac: float
    search_gmac: float
    search_px: int


def measure(name: str, build: Callable[[], Any] | None = None) -> Size:
    """Count one network.

    Args:
        name: as the result calls it.
        build: makes the network; by default `NETWORKS` of that name.
    """
    with torch.device("meta"), torch.no_grad():
        net = cast(Any, build or NETWORKS[name])().eval()
        size = [torch.full((1, 2), net.template_size / 2)] if takes_size(net) else []
        template, template_gmac = _count(net.template, _image(net.template_size), *size)
        update_gmac = float("nan")
        if is_adaptive(net):
            template, update_gmac = _count(net.update, *[template[0]] * 3)
        _, search_gmac = _count(net.search, _image(net.search_size), *template)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
    return Size(name, parameters, template_gmac, update_gmac, search_gmac, net.search_size)


def _image(side: int) -> torch.Tensor:
    return torch.zeros(1, 3, side, side)


def _count(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Any, float]:
    """What `function` gives, and its billions of multiply-accumulates; those of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        outputs = function(*inputs)
    return outputs, counter.get_total_flops() / 2e9


def table(sizes: Sequence[Size]) -> str:
    """The Markdown table."""
    columns = ["model", "parameters, M", "search crop, px", "template", "update", "search"]
    rows = [(s.model, s.parameters_m, s.search_px, s.template_gmac, s.update_gmac, s.search_gmac) for s in sizes]
    return markdown_table(columns, rows, decimals=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_size", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--page", type=Path, default=DEFAULT_PAGE)
    options = parser.parse_args(arguments)
    sizes = [measure(name) for name in NETWORKS]
    write_csv(
        options.out / "model_size.csv", [vars(size) for size in sizes], command("benchmarks.model_size", arguments)
    )
    options.page.write_text(PAGE + table(sizes) + "\n", encoding="utf-8")
    print(table(sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
