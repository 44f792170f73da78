"""The metrics of a run after those of the run that it branched off.

Owns: where the parent is, how far its records count, the names of its stages.
Does not own: the file (``train.metrics``), the event that names the parent (``train.stages``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from growth_megatron.train.metrics import FILE_NAME, read_metrics


def joined_records(directory: Path, children: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """All records of a run, with its parents' before them up to where each was left.

    A parent's stages are called ``RUN/STAGE``. One that is no longer there is left out, and so is one that comes out of
    the run itself (``children``), as where a folder was used again.
    """
    records = read_metrics(directory)
    seen = (*children, directory.resolve())
    for branch in (r for r in records if r["kind"] == "event" and r.get("event") == "branch"):
        parent = Path(branch["source"]).parent.parent
        if (parent / FILE_NAME).is_file() and parent.resolve() not in seen:
            before = joined_records(parent, seen)
            earlier = [r for r in before if r.get("step", 0) <= branch["step"] and r["kind"] != "event"]
            named = [r | {"stage": f"{parent.name}/{r['stage']}"} if "stage" in r else r for r in earlier]
            return [*named, *records]
    return records
