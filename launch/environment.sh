# The Python environment of a checkout. Sourced by launch/*.sh and tests/run.sh; defines functions, does nothing by itself.
#
# GROWTH_MEGATRON_VENV   the virtual environment (default: .venv in the checkout)
# PYTHON                 the interpreter that makes it (default: the first of python3, python3.13 ... that is 3.10 or newer)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GROWTH_MEGATRON_VENV:-$repository/.venv}

die() {
    echo "error: $*" >&2
    exit "${exit_code:-1}"
}

# The interpreter that runs things: the environment's where there is one, else the one on PATH (a container, a module).
environment_python() {
    if [ -x "$venv/bin/python" ]; then
        echo "$venv/bin/python"
    elif [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    else
        echo python3
    fi
}

find_interpreter() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer with venv found (tried: ${PYTHON:-python3, python3.13 to python3.10});" \
        "install one (Debian: apt-get install python3-venv) or name it with PYTHON=/path/to/python"
}

# pip, quiet; what it said is shown when it fails.
environment_pip() {
    local log=$venv/install.log
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        die "pip install $* failed (whole output: $log). It needs a package index: when this machine is offline," \
            "set PIP_INDEX_URL to a mirror or PIP_FIND_LINKS to a folder of wheels, then run the same command again"
    fi
}

# environment_install EXTRAS: makes the environment and installs the checkout into it, editable, at the pinned versions.
# A stamp of setup.py and constraints.txt makes the second call free.
environment_install() {
    local extras=$1 stamp interpreter
    stamp=$venv/.installed-${extras//,/-}
    if [ ! -x "$venv/bin/python" ]; then
        interpreter=$(find_interpreter) || exit 1
        echo "environment: making $venv with $("$interpreter" --version)"
        "$interpreter" -m venv "$venv" || die "could not make the virtual environment $venv; is the folder writable?"
    fi
    local wanted
    wanted=$({ cat "$repository/setup.py" "$repository/constraints.txt"
               "$venv/bin/python" --version; echo "$repository"; } | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "environment: $venv is up to date"
        return
    fi
    echo "environment: installing into $venv (torch is large: minutes the first time)"
    # torch first and by its own name: the build (CPU or CUDA) is the index's choice, everything after fits to it.
    local constraints=$repository/constraints.txt
    if grep -q 'include-system-site-packages = true' "$venv/pyvenv.cfg" && "$venv/bin/python" -c 'import torch' 2>/dev/null
    then # an image's own torch stays, since other packages of the image were built for it
        constraints=$venv/constraints.txt
        grep -v '^torch==' "$repository/constraints.txt" >"$constraints"
    fi
    environment_pip -c "$constraints" torch
    environment_pip -c "$constraints" -e "$repository[$extras]"
    echo "$wanted" >"$stamp"
}

is_number() {
    [[ ${1:-} =~ ^[0-9]+$ ]]
}

# default_processes PYTHON WANTED: processes of this node; without WANTED one for each visible GPU, 1 without GPUs.
default_processes() {
    if [ -n "$2" ]; then
        is_number "$2" && [ "$2" -ge 1 ] || die "the number of processes is '$2'; give a whole number from 1"
        echo "$2"
        return
    fi
    "$1" -c 'import torch; print(max(1, torch.cuda.device_count()))' ||
        die "$1 cannot import torch; install the checkout (bash launch/quickstart.sh does) or set GROWTH_MEGATRON_VENV"
}

# Threads of each of that many processes, so that together they use the cores once.
threads_for() {
    local threads=$(($(nproc) / $1))
    echo $((threads > 0 ? threads : 1))
}

# What CUDA and NCCL read when they begin; what is set already stays.
device_environment() {
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # order of tensor-parallel communication and compute
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # a growth changes all shapes
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
}
