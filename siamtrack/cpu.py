"""What this machine's CPU is and can, as far as the system says."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")
DOT_PRODUCTS = {
    "x86_64": X86_DOT_PRODUCTS,
    "amd64": X86_DOT_PRODUCTS,
    "aarch64": ("asimddp",),
    "arm64": ("asimddp",),
}
"""Instructions that multiply bytes and sum the products in 32 bits, by machine, as ``/proc/cpuinfo`` calls them."""


def dot_products(cpuinfo: str, machine: str) -> str:
    """The instructions for dot products of bytes, without which INT8 is no faster than FP32 and its sums may saturate.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``.
        machine: as `platform.machine` gives it.

    Returns:
        Name of a feature that every core has, such as "avx512_vnni"; empty where there is none, or no telling.
    """
    entries = [line.partition(":") for line in cpuinfo.splitlines()]
    cores = [set(value.split()) for key, _, value in entries if key.strip().lower() in ("flags", "features")]
    wanted = DOT_PRODUCTS.get(machine.lower(), ())
    return next((name for name in wanted if cores and all(name in core for core in cores)), "")


def dot_products_here() -> str:
    """`dot_products` of this machine."""
    return dot_products(_cpuinfo(), platform.machine())


def cpu_name() -> str:
    """What the processor is called, or at least its architecture."""
    for line in _cpuinfo().splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> str:
    """Text of ``/proc/cpuinfo``; empty on systems that have none."""
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
