#!/usr/bin/env bash
# What a container runs: a script of launch/, any program, or a subcommand of growth-megatron.
set -euo pipefail
case ${1:-} in
    launch/*) exec bash "$@" ;;
esac
if command -v -- "${1:-}" >/dev/null; then
    exec "$@"
fi
exec growth-megatron "$@"
