"""What ``/proc/cpuinfo`` says of a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from siamtrack import cpu


def x86(*flags: str) -> str:
    """Two cores as Linux lists them; the second lacks flags given with a "-" in front."""
    first = " ".join(flag.removeprefix("-") for flag in ("fpu", "sse2", *flags))
    second = " ".join(flag for flag in ("fpu", "sse2", *flags) if not flag.startswith("-"))
    return "".join(
        f"processor\t: {i}\nmodel name\t: A CPU\nflags\t\t: {core}\nbugs\t\t: avx_vnni\n\n"
        for i, core in enumerate((first, second))
    )


def arm(*features: str) -> str:
    return f"processor\t: 0\nFeatures\t: fp asimd {' '.join(features)}\nCPU part\t: 0xd42\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "found"),
    [
        (x86("avx2", "avx512f", "avx512_vnni"), "x86_64", "avx512_vnni"),
        (x86("avx2", "avx_vnni"), "x86_64", "avx_vnni"),
        (x86("amx_tile", "amx_int8"), "AMD64", "amx_int8"),
        (x86("avx2", "avx512f"), "x86_64", ""),
        (x86("avx512_vnnix"), "x86_64", ""),  # whole words
        (x86("-avx512_vnni"), "x86_64", ""),  # every core must have it: threads move
        (arm("asimdhp", "asimddp"), "aarch64", "asimddp"),
        (arm("asimddp"), "arm64", "asimddp"),
        (arm("asimddp") + arm(), "aarch64", ""),
        (arm("asimdhp"), "aarch64", ""),
        (x86("asimddp"), "x86_64", ""),  # of another machine
        (arm("avx512_vnni"), "aarch64", ""),
        (x86("avx512_vnni"), "riscv64", ""),
        ("processor: 0\n", "x86_64", ""),
        ("", "x86_64", ""),
        ("", "", ""),
    ],
)
def test_dot_products(cpuinfo: str, machine: str, found: str) -> None:
    assert cpu.dot_products(cpuinfo, machine) == found


def test_this_machine_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.dot_products_here() == ""  # no such file: macOS, Windows
    assert cpu.cpu_name()
    (tmp_path / "cpuinfo").write_text(x86("avx_vnni"))
    assert cpu.dot_products_here() == "avx_vnni"
    assert cpu.cpu_name() == "A CPU"
