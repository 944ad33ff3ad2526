"""Models in another than their default configuration, from the plain values that recipes and checkpoints hold."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from siamtrack.nets import MODELS
from siamtrack.plain import from_plain


def build_model(name: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: key of `MODELS`.
        config: fields of the model's configuration that differ from its defaults, as a parser gives them.

    Raises:
        ValueError: unknown model or field, or a value that the configuration refuses.
    """
    checked = check_model_config(name, config or {})
    return cast(Any, MODELS[name])(checked) if config else MODELS[name]()


def check_model_config(name: str, config: Mapping[str, Any]) -> Any:
    """The configuration dataclass that `config` describes.

    Raises:
        ValueError: as `build_model`.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return from_plain(config_type(name), config, f"model_config of {name}")


def config_type(name: str) -> type:
    """The dataclass that a model of `MODELS` takes as its argument `config`."""
    factory: Any = MODELS[name]
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    options = typing.get_args(hints["config"]) or (hints["config"],)
    return next(cast(type, option) for option in options if dataclasses.is_dataclass(option))
