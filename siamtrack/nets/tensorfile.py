"""Files of weights, read as tensors and plain values. One that wants code to run while it is read is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch


def read_tensors(path: Path) -> Any:
    """What a ``.safetensors`` file, or one written by `torch.save`, holds; on the CPU.

    Raises:
        ValueError: not there, damaged, of another format, or of objects that only code could build.
        OSError: there, but the system does not give it.
        ImportError: ``.safetensors`` without that package.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # PyTorch's reader lets whatever a garbage file provokes through, such as IndexError
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise ValueError(
                f"{path} is refused: reading it would run {wanted[1]}, and a file that runs code may run any. If you "
                "trust its source, write its tensors alone to a new file, which does run it, and import that: "
                "torch.save(torch.load(FILE, map_location='cpu', weights_only=False)['state_dict'], NEW)"
            ) from error
        reason = str(error).partition("\n")[0]
        if "weights_only" in reason:  # advice to read it unsafely
            reason = "damaged, or of another format than PyTorch's"
        raise ValueError(f"{path}: not a file of tensors and plain values: {reason}") from error
