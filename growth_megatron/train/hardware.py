"""Peak speed of the device, for MFU.

Owns: dense 16-bit matrix peaks by device name, and MFU.
Does not own: FLOPs of a model (``train.plan``), time measurement (``train.loop``).
"""

from __future__ import annotations

import re

# TFLOP/s without sparsity, bf16 where the device has it and fp16 where not (V100, T4), accumulated in fp32; from the
# makers' data sheets, at the maximum power of that form. A key's words must all be in the device's name; the key with
# the most letters wins. Of MI250 one die counts, which is what torch calls a device.
_PEAK_TFLOPS_PER_S: dict[str, float] = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "B100": 1750.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H800": 989.4,
    "H800 PCIe": 756.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "RTX A6000": 154.8,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "RTX 3090 Ti": 80.0,
    "V100": 125.0,
    "V100 PCIe": 112.0,
    "V100S": 130.0,
    "T4": 65.0,
    "MI355X": 2516.6,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
    "MI300A": 980.6,
    "MI250X": 191.5,
    "MI250": 181.0,
    "MI210": 181.0,
}

# Words that make another device of the same number: a key without that word does not apply. "mig" is a slice of a GPU.
_QUALIFIERS = frozenset({"ti", "super", "laptop", "mobile", "max", "d", "mig", "nvl"})


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))


def peak_flops_per_s(device_name: str) -> float | None:
    """Dense 16-bit peak of a device by torch's name for it, in FLOP/s; None if it is not in the table."""
    words = _words(device_name)
    fitting = [key for key in _PEAK_TFLOPS_PER_S if _words(key) <= words and words & _QUALIFIERS <= _words(key)]
    if not fitting:
        return None
    return _PEAK_TFLOPS_PER_S[max(fitting, key=len)] * 1e12


def mfu(flops_per_s: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation of one device: model FLOP/s (no recomputation) over the dense peak; None if unknown.

    Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.
    """
    return None if peak is None else flops_per_s / peak
