#!/usr/bin/env bash
# Healthy: the command starts and, where GPUs were promised to the container, torch sees one.
set -euo pipefail
growth-megatron --version >/dev/null
case ${NVIDIA_VISIBLE_DEVICES:-void} in
    void | none) ;;
    *) python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "torch sees no GPU: start the container with --gpus all"; exit 1; } ;;
esac
