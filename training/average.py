"""Average the weights of checkpoints: ``python -m training.average A.ckpt B.ckpt --out C.ckpt``.

Checkpoints of one run lie in one valley of the loss, those from before and after the backbone was thawed too. On what
training did not show, their mean is often better than each: it keeps something of the frozen backbone's generality and
of the thawed one's fit (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022). `siamtrack-export` reads
it, and a recipe may start from it; a run cannot go on from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siamtrack.bundle import sha256
from siamtrack.nets.tensorfile import read_tensors


def average(paths: Sequence[Path], out: Path, shares: Sequence[float] = ()) -> None:
    """Write the weighted mean of checkpoints of one network.

    Args:
        paths: checkpoints of `training.train`, two or more. Recipe, epoch and step of the last one are kept.
        out: checkpoint to write.
        shares: weight of each, above 0 and of any sum; empty for equal ones.

    Raises:
        ValueError: too few, not readable, not of a run, of different networks, or shares that do not fit.
    """
    shares = list(shares) or [1.0] * len(paths)
    if len(paths) < 2 or len(shares) != len(paths) or not all(share > 0 for share in shares):
        raise ValueError(
            f"expected two or more checkpoints and a share above 0 for each, got {len(paths)} and {shares}"
        )
    total: dict[str, Tensor] = {}
    network: Any = None
    for path, share in zip(paths, shares, strict=True):
        content = _read(path)
        recipe = content["hyper_parameters"]["recipe"]
        this = recipe["model"], recipe.get("model_config") or {}
        network = network or this
        state = content["state_dict"]
        if this != network or state.keys() != (total or state).keys():
            raise ValueError(
                f"{path} is a {_named(this)}, {paths[0]} a {_named(network)}: only one network can be averaged"
            )
        for name, value in state.items():
            if not value.is_floating_point():
                total[name] = value  # counters: those of the last
            else:
                total[name] = total.get(name, 0) + value.double() * (share / sum(shares))
    kept = {key: content[key] for key in ("epoch", "global_step", "hyper_parameters", "pytorch-lightning_version")}
    state = {name: value.to(state[name].dtype) for name, value in total.items()}
    averaged = " ".join(f"{sha256(path)}:{share / sum(shares):.3f}" for path, share in zip(paths, shares, strict=True))
    torch.save({**kept, "state_dict": state, "averaged": averaged}, out)


def _read(path: Path) -> dict[str, Any]:
    content = read_tensors(path)
    if not isinstance(content, dict) or "recipe" not in content.get("hyper_parameters", {}):
        raise ValueError(f"{path}: not a checkpoint of training.train")
    return content


def _named(network: tuple[str, dict[str, Any]]) -> str:
    model, config = network
    return f"{model} with {config}" if config else model


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 where the checkpoints cannot be averaged."""
    parser = argparse.ArgumentParser(prog="python -m training.average", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of one run, or of runs from the same start")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--shares", type=float, nargs="+", default=(), help="weight of each (default: equal)")
    options = parser.parse_args(arguments)
    try:
        average(options.checkpoints, options.out, options.shares)
    except (OSError, ValueError) as error:
        print(f"average: {error}", file=sys.stderr)
        return 2
    print(f"mean of {len(options.checkpoints)} checkpoints: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
