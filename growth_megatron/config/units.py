"""Numbers as people read them: counts, bytes, FLOPs, durations.

Owns: the form of a number and its unit in everything that is printed. Does not own: what is printed (``config.words``).
"""

from __future__ import annotations


def format_count(count: float) -> str:
    """1364000000 -> '1.364 B'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g}"


def format_flops(flops: float) -> str:
    """7.31e9 -> '7.31 GFLOP'."""
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if flops >= size:
            return f"{flops / size:.4g} {unit}"
    return f"{flops:.4g} FLOP"


def format_bytes(size: float) -> str:
    """Binary units: 1536 -> '1.50 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def count(number: float | None) -> str:
    """Three digits and a magnitude, B for billions: 12.3k, 1.50M, 6.74B."""
    if number is None:
        return "n/a"
    magnitudes = ("", "k", "M", "B", "T")
    index = 0
    while abs(number) >= 999.5 and index < len(magnitudes) - 1:
        number, index = number / 1000, index + 1
    digits = 0 if abs(number) >= 99.95 or (index == 0 and number == int(number)) else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{magnitudes[index]}"


def size(number: float | None) -> str:
    """Bytes in binary units; n/a for None."""
    return "n/a" if number is None else format_bytes(number)


def fixed(number: float | None, digits: int = 4) -> str:
    """A number with so many digits behind the point; n/a for None."""
    return "n/a" if number is None else f"{number:.{digits}f}"


def duration(seconds: float | None) -> str:
    """2 of d, h, m, s: 1d 4h, 3h 20m, 4m 05s, 12s."""
    if seconds is None:
        return "n/a"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, length, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length}{unit} {whole % length // part:02d}{lower}"
    return f"{whole}s"
