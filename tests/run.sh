#!/usr/bin/env bash
# All checks: environment, ruff, mypy, pytest. Arguments go to pytest: bash tests/run.sh -k growth
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$repository"

environment_install dev,docs,wandb,tensorboard,plot,eval
export OMP_NUM_THREADS=1  # the multi-rank tests already fill the cores
export PATH=$venv/bin:$PATH

echo "ruff" && ruff check . && ruff format --check --quiet .
echo "mypy" && mypy
echo "pytest" && python -m pytest -q -rfEs -n 2 --dist loadfile --durations=25 "$@"
