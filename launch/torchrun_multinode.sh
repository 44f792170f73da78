#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'USAGE'
Trains on several nodes: run the same command on each, with its own NODE_RANK. They meet by c10d rendezvous.

    NNODES=N NODE_RANK=R MASTER_ADDR=HOST bash launch/torchrun_multinode.sh CONFIG.yaml [a.b=c ...]

    NNODES         number of nodes
    NODE_RANK      0 on the head node, 1 to NNODES-1 on the others
    MASTER_ADDR    name or address of the head node, as the others reach it (also: HEAD_NODE)
    MASTER_PORT    a free port there (default 29500)
    NPROC          processes per node, the same on all (default: one for each visible GPU, 1 without GPUs)
    LOCAL_ADDR     address by which the others reach this node, where its host name does not resolve

Example, two nodes with 8 GPUs each
    node0$ NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun_multinode.sh CONFIG.yaml
    node1$ NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash launch/torchrun_multinode.sh CONFIG.yaml

All nodes see the run directory and the data under the same paths (a shared file system). Exit codes and further
environment as in launch/torchrun.sh; every node ends with the run's. A stage of a growing run that needs fewer
processes uses the first nodes, the others wait.
USAGE
}

exit_code=2
[ "${1:-}" != -h ] && [ "${1:-}" != --help ] || { usage; exit 0; }
[ $# -ge 1 ] || { usage >&2; exit 2; }
[ -f "$1" ] || die "no such configuration file: $1"

head=${MASTER_ADDR:-${HEAD_NODE:-}}
port=${MASTER_PORT:-29500}
is_number "${NNODES:-}" && [ "$NNODES" -ge 1 ] || die "NNODES is '${NNODES:-}'; set it to the number of nodes"
is_number "${NODE_RANK:-}" && [ "$NODE_RANK" -lt "$NNODES" ] ||
    die "NODE_RANK is '${NODE_RANK:-}'; set it to 0 on the head node and 1 to $((NNODES - 1)) on the others"
[ -n "$head" ] || die "MASTER_ADDR is not set; set it to the head node's name or address, the same on all nodes"
is_number "$port" && [ "$port" -ge 1 ] && [ "$port" -le 65535 ] || die "MASTER_PORT is '$port'; allowed: 1 to 65535"

python=$(environment_python)
processes=$(default_processes "$python" "${NPROC:-}")
device_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_for "$processes")}
exec "$python" "$repository/launch/supervise.py" --nproc "$processes" \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" --head "$head" --port "$port" "$@"
