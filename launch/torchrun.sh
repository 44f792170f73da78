#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'USAGE'
Trains on one node.

    bash launch/torchrun.sh [-n PROCESSES] CONFIG.yaml [a.b=c ...]

    -n PROCESSES   default: one for each visible GPU, 1 without GPUs
    a.b=c          overrides of the YAML

Examples
    bash launch/torchrun.sh configs/quickstart.yaml
    bash launch/torchrun.sh -n 2 configs/quickstart.yaml run.directory=runs/two      (CPU: 2 gloo ranks)
    CUDA_VISIBLE_DEVICES=0,1,2,3 bash launch/torchrun.sh CONFIG.yaml
    GROWTH_MEGATRON_REQUEUE=1 bash launch/torchrun.sh CONFIG.yaml

Exit codes: those of `growth-megatron train`: 0 done, 1 fault, 2 bad configuration, 75 stopped early and saved (run the
same command to resume), 76 the next stage needs a world size that this node does not have, 77 no valid saved state left.
A stage that needs another number of processes, up to PROCESSES, is started here with it.

Environment
    GROWTH_MEGATRON_REQUEUE=1   go on by itself after 75 (not after Ctrl-C)
    GROWTH_MEGATRON_VENV        virtual environment (default: .venv in the checkout, else python3 on PATH)
    OMP_NUM_THREADS             default: the cores divided among the processes
USAGE
}

exit_code=2
processes=
while getopts ":hn:" option; do
    case $option in
        h) usage; exit 0 ;;
        n) processes=$OPTARG ;;
        :) die "-$OPTARG needs a value; see launch/torchrun.sh -h" ;;
        *) die "unknown option -$OPTARG; see launch/torchrun.sh -h" ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || { usage >&2; exit 2; }
for argument in "${@:2}"; do
    [ "${argument#-}" = "$argument" ] || die "options stand before CONFIG.yaml, as in: bash launch/torchrun.sh -n 2 $1"
done
[ -f "$1" ] || die "no such configuration file: $1"

python=$(environment_python)
processes=$(default_processes "$python" "$processes")
device_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_for "$processes")}
exec "$python" "$repository/launch/supervise.py" --nproc "$processes" "$@"
