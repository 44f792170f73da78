#!/usr/bin/env bash
# The checkout and its environment inside an image, by the functions that tests and the quickstart use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
export PIP_NO_CACHE_DIR=1
environment_install wandb,tensorboard,plot,hf,eval,zstd,parquet
mkdir -p "$repository/runs" "$repository/data"
chmod a+rwx "$repository" "$repository/runs" "$repository/data"
