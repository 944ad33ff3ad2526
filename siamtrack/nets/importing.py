"""Weights of public implementations as checkpoints of ours; `siamtrack.nets.layouts` holds the tables of names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from siamtrack.bundle import sha256
from siamtrack.nets import MODELS
from siamtrack.nets.build import build_model
from siamtrack.nets.layouts import LAYOUTS, Layout
from siamtrack.nets.tensorfile import read_tensors
from siamtrack.plain import to_plain

SHOWN = 6  # names in a message


@dataclass(frozen=True)
class PublicWeights:
    """What a file holds.

    Attributes:
        path: the file.
        state: tensors by name; without the prefix of parallel training and without BatchNorm's counters.
        epoch: after which it was written, where it says so.
    """

    path: Path
    state: dict[str, Tensor]
    epoch: int | None = None


@dataclass(frozen=True)
class Imported:
    """A network filled from a public file.

    Attributes:
        model: name in `siamtrack.nets.MODELS`.
        config: fields of its configuration that differ from the defaults.
        net: the network, in eval mode.
        layout: where the weights come from.
        taken: how many tensors of the file it holds.
        unused: names in the file that found no place.
        fresh: names of ours that the file does not have: these start at random.
    """

    model: str
    config: dict[str, Any]
    net: nn.Module
    layout: Layout
    taken: int
    unused: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.model} <- {self.layout.source}: {self.taken} tensors"]
        if self.config:
            lines.append("configuration: " + ", ".join(f"{k}={json.dumps(v)}" for k, v in self.config.items()))
        if self.unused:
            lines.append(f"not used ({len(self.unused)} names): {_groups(self.unused)}")
        if self.fresh:
            lines.append(f"not in the file, at random until trained ({len(self.fresh)} names): {_groups(self.fresh)}")
        return "\n".join(lines)


def import_checkpoint(path: Path, model: str, out: Path, config: Mapping[str, Any] | None = None) -> Imported:
    """Read a public file, fill a model of ours, write a checkpoint that `siamtrack-export` reads.

    Args:
        path: ``.pth``, ``.pt``, ``.model`` or ``.safetensors``.
        model: name in `siamtrack.nets.MODELS`.
        out: checkpoint to write.
        config: fields of the model's configuration, in place of those that the file's layout asks for.

    Raises:
        ValueError: the file cannot be read, is of no known layout, or does not fit the model.
    """
    weights = read_weights(path)
    imported = fill_model(weights, model, config or {})
    content: dict[str, Any] = {
        "state_dict": imported.net.state_dict(),
        # As a training checkpoint has it, so that the same network is built from it.
        "hyper_parameters": {"recipe": {"model": model, "model_config": imported.config}},
        "source": {
            "file": path.name,
            "sha256": sha256(path),
            "layout": imported.layout.source,
            "unused": list(imported.unused),
            "fresh": list(imported.fresh),
        },
    }
    if weights.epoch is not None:
        content["epoch"] = weights.epoch
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, out)
    return imported


def read_weights(path: Path) -> PublicWeights:
    """Read a state dict, bare or in a container with `epoch` and `optimizer`.

    Raises:
        ValueError: no file, code in it, or no state dict.
    """
    content = read_tensors(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: expected a state dict, bare or under 'state_dict', got {type(content).__name__}")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path}: expected tensors by name, bare or under 'state_dict'; these are none: {_some(others)}"
        )
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    epoch = content.get("epoch")
    return PublicWeights(
        path,
        {name: value for name, value in named.items() if not name.endswith("num_batches_tracked")},
        epoch if type(epoch) is int else None,
    )


def fill_model(weights: PublicWeights, model: str, config: Mapping[str, Any] | None = None) -> Imported:
    """Build a model and give it the weights of a file; every name and every shape has to fit.

    Args:
        weights: of `read_weights`.
        model: name in `siamtrack.nets.MODELS`.
        config: as in `import_checkpoint`.

    Raises:
        ValueError: as `import_checkpoint`.
    """
    layout = find_layout(weights, model)
    chosen = {**layout.config(weights.state), **to_plain(config or {})}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # what the file does not have is the same every time
        net = build_model(model, chosen).eval()
    if layout.backbone is not None:
        try:
            unused = layout.backbone(cast(nn.Module, net.backbone), weights.state)
        except ValueError as error:
            raise ValueError(f"{weights.path}: {error}") from error
        fresh = sorted(n for n in _own(net) if not n.startswith("backbone."))
        return Imported(
            model, chosen, net, layout, len(weights.state) - len(unused), tuple(sorted(unused)), tuple(fresh)
        )
    renamed, unused = _rename(layout, weights, _own(net))
    net.load_state_dict(renamed, strict=False)
    fresh = sorted(set(_own(net)) - set(renamed))
    return Imported(model, chosen, net, layout, len(renamed), tuple(sorted(unused)), tuple(fresh))


def find_layout(weights: PublicWeights, model: str) -> Layout:
    """The layout of `siamtrack.nets.layouts.LAYOUTS` that a file has, for a model.

    Raises:
        ValueError: unknown model, unknown layout, or a layout of other models.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    fitting = [layout for layout in LAYOUTS if all(name in weights.state for name in layout.signature)]
    for layout in fitting:
        if layout.model == model:
            return layout
    if fitting:
        models = ", ".join(layout.model for layout in fitting)
        raise ValueError(f"{weights.path} holds {fitting[0].source}, which fits --model {models}; got {model}")
    known = ", ".join(dict.fromkeys(layout.source for layout in LAYOUTS))
    raise ValueError(f"{weights.path} is of no known layout: it has {_groups(weights.state)}; known: {known}")


def _rename(layout: Layout, weights: PublicWeights, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by our names, and the names in the file that are not used."""
    renamed: dict[str, Tensor] = {}
    unused: list[str] = []
    unknown: list[str] = []
    misshapen: list[str] = []
    for name, value in weights.state.items():
        prefix = max((p for p in layout.names if name.startswith(p)), key=len, default=None)
        ours = None if prefix is None else layout.names[prefix] + name[len(prefix) :]
        if ours is None or ours not in own:
            (unused if name.startswith(layout.spare) else unknown).append(name)
            continue
        value = layout.changes.get(ours, lambda as_it_is: as_it_is)(value)
        if value.shape != own[ours].shape:
            misshapen.append(f"{name} gives {tuple(value.shape)}, {ours} is {tuple(own[ours].shape)}")
        renamed[ours] = value
    missing = [name for name in own if name not in renamed and not name.startswith(layout.fresh)]
    problems = [
        f"{what} ({len(names)}): {_some(names)}"
        for what, names in (("unknown", unknown), ("missing, by our names", missing), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"{weights.path} looks like {layout.source} but does not fit {layout.model}; " + "; ".join(problems)
        )
    return renamed, unused


def _own(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _groups(names: Iterable[str]) -> str:
    """Names by their first two parts, each once."""
    return _some(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
