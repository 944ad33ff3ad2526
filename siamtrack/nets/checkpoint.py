"""Networks from training checkpoints. Checkpoints are read as tensors and plain values only; no code is unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from siamtrack.bundle import sha256
from siamtrack.nets import MODELS
from siamtrack.nets.build import build_model
from siamtrack.nets.tensorfile import read_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A network with its weights, and where it comes from."""

    model: str
    net: nn.Module
    provenance: dict[str, str]


def load_checkpoint(path: Path, model: str | None = None) -> Checkpoint:
    """Read a checkpoint that `training.train` wrote, or a bare state dict.

    Args:
        path: ``.ckpt`` or ``.pth``. Averaged weights are used where the run kept them.
        model: name in `siamtrack.nets.MODELS`; needed for a bare state dict, and must agree with a training checkpoint.

    Raises:
        ValueError: unreadable, of another model, or keys that do not fit.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: neither a checkpoint of training.train nor a state dict")
    recipe = _mapping(_mapping(content.get("hyper_parameters")).get("recipe"))
    trained = recipe.get("model")
    if model and trained and model != trained:
        raise ValueError(f"{path} is a {trained}, not a {model}; leave --model out")
    name = model or trained
    if name is None:
        raise ValueError(f"{path} does not say which model it is; name it with --model ({', '.join(MODELS)})")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    state = _mapping(content.get("state_dict", content))
    if any(key.startswith("net.") for key in state):
        state = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
    try:
        net = build_model(name, _mapping(recipe.get("model_config")))
    except ValueError as error:
        raise ValueError(f"{path} is of another version of {name}: {error}") from error
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from error
    provenance = {"checkpoint_sha256": sha256(path)}
    for key, value in (("epoch", content.get("epoch")), ("step", content.get("global_step"))):
        if value is not None:
            provenance[key] = str(value)
    for key in ("seed", "epochs", "pairs_per_epoch"):
        if key in recipe:
            provenance[key] = str(recipe[key])
    if recipe.get("model_config"):
        provenance["model_config"] = json.dumps(recipe["model_config"], sort_keys=True)
    distil = _mapping(recipe.get("distil"))
    if distil.get("teachers"):
        provenance["distilled"] = f"from {len(distil['teachers'])} networks, share {distil['share']}"
    if "averaged" in content:  # by `training.average`: SHA-256 and share of each
        provenance["averaged"] = str(content["averaged"])
    source = _mapping(content.get("source"))  # of imported weights
    provenance |= {f"source_{key}": str(source[key]) for key in ("file", "sha256", "layout") if key in source}
    held_out = _mapping(recipe.get("data")).get("validation_videos")
    if held_out:
        provenance["validation_videos"] = " ".join(held_out)
    return Checkpoint(name, net.eval(), provenance)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
