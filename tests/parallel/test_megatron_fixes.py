"""Each repair of megatron-core is needed: without it the fault shows, with it it does not.

When a newer megatron-core makes the ``without`` half of a test fail, that repair has become superfluous: drop both.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from growth_megatron.parallel.megatron_fixes import _take_torchs_adam
from tests.ranks import run_ranks

CASES = [
    ("_allocate_state_before_state_dict", "assert len(steps) == 1"),
    ("_own_step_per_parameter", "the step of a parameter went from 2 to"),
    ("_set_states_without_step", "KeyError: 'step'"),
]


def test_with_all_repairs_a_fresh_optimizer_takes_up_where_another_left(tmp_path: Path) -> None:
    steps = run_ranks("tests.workers:reload_into_fresh_optimizer", 1, {"directory": str(tmp_path / "run")})[0]
    assert steps == {"before": 2, "after": 3}


@pytest.mark.parametrize(("repair", "symptom"), CASES)
def test_without_the_repair_the_fault_shows(repair: str, symptom: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(
            "tests.workers:reload_into_fresh_optimizer", 1, {"directory": str(tmp_path / "run")}, without=(repair,)
        )
    assert symptom in str(failure.value)


def test_a_save_leaves_no_helper_process_behind(tmp_path: Path) -> None:
    helpers = "tests.workers:helper_processes_after_a_save"
    assert run_ranks(helpers, 1, {"directory": str(tmp_path / "with")}) == [0]
    repair = "_report_writes_within_the_process"
    without = run_ranks(helpers, 1, {"directory": str(tmp_path / "without")}, without=(repair,))
    assert without == [1]


def test_torchs_adam_is_taken_whatever_is_installed() -> None:
    """As megatron-core's modules look where Transformer Engine or apex is installed."""
    optimizer, distrib = SimpleNamespace(USING_PYTORCH_OPTIMIZER=False), SimpleNamespace(HAVE_APEX_OR_TE=True)
    _take_torchs_adam(optimizer, distrib)
    assert optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib.HAVE_APEX_OR_TE
