#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'USAGE'
From a fresh checkout to a grown model: environment, corpus, tokenizer, data, training, report, some text.

    bash launch/quickstart.sh [--with-scratch] [a.b=c ...]

    --with-scratch   also trains the grown size from scratch, on as many FLOPs and the same data, and compares the two
    a.b=c            overrides of configs/quickstart.yaml

Asks nothing, needs no GPU, writes only to .venv, data/ and runs/. What is finished is skipped; interrupted, the same
command goes on where it was. About five minutes on two cores, ten with scratch, after the downloads (torch, and 4.5 MB
of speeches).

Examples
    bash launch/quickstart.sh
    bash launch/quickstart.sh --with-scratch
    bash launch/quickstart.sh run.directory=runs/carry stages.grown.growth.optimizer_state=carry

Environment
    GROWTH_MEGATRON_VENV   virtual environment (default: .venv in the checkout)
    QUICKSTART_PROCESSES   number of ranks (default 2)
USAGE
}

number=0 steps=7 with_scratch=
step() {
    number=$((number + 1))
    echo
    echo "== $number/$steps $*"
}

# Trains; a signal to this shell goes on to the run, which saves and ends.
train() {
    echo "bash launch/torchrun.sh $*"
    set -m # or the run in the background would ignore Ctrl-C
    bash launch/torchrun.sh "$@" &
    local run=$! code=
    set +m
    trap 'kill -TERM $run 2>/dev/null || true' TERM HUP
    trap 'kill -INT $run 2>/dev/null || true' INT
    while :; do
        code=0
        wait "$run" || code=$?
        kill -0 "$run" 2>/dev/null || break # else it was the signal that ended the wait
    done
    trap - TERM HUP INT
    [ "$code" = 0 ] || exit "$code"
}

overrides=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        --with-scratch) with_scratch=yes steps=9 ;;
        -*) exit_code=2 die "unknown option $argument; see bash launch/quickstart.sh --help" ;;
        *) overrides+=("$argument") ;;
    esac
done
set -- ${overrides[@]+"${overrides[@]}"}
cd "$repository"
config=configs/quickstart.yaml

step "environment"
environment_install eval,hf,plot
python=$venv/bin/python
export PATH=$venv/bin:$PATH

# The configuration says where everything is; nothing is written down twice.
settings=$("$python" - "$config" "$@" <<'PYTHON'
import sys

from growth_megatron.errors import GrowthMegatronError
from growth_megatron.growth.configuration import load_config

try:
    config = load_config(sys.argv[1], sys.argv[2:]).config
except GrowthMegatronError as error:
    sys.exit(f"growth-megatron train: {error}")
data = config.stages[0].data
print(data.tokenizer, data.train[0].path, data.validation[0].path)
print(config.stages[0].model.vocab_size, config.run.directory)
PYTHON
) || exit 2
read -r -d '' tokenizer train validation vocab_size run <<<"$settings" || true
data=$(dirname "$tokenizer")

step "corpus"
"$python" tools/fetch_corpus.py "$data/corpus"

step "tokenizer"
if [ -f "$tokenizer" ]; then
    echo "$tokenizer is there already"
else
    growth-megatron train-tokenizer "$data/corpus/train" --output "$tokenizer" --vocab-size "$vocab_size"
fi

step "data"
for part in train validation; do
    prefix=${!part}
    if [ -f "$prefix.bin" ] && [ -f "$prefix.idx" ]; then
        echo "$prefix.bin is there already"
    else
        growth-megatron prepare-data "$data/corpus/$part" --tokenizer "$tokenizer" --output "$prefix"
    fi
done

step "training (continues where it was; logs and checkpoints in $run)"
processes=${QUICKSTART_PROCESSES:-2}
train -n "$processes" "$config" "$@"

step "report"
growth-megatron report "$run"

if [ -n "$with_scratch" ]; then
    step "the grown size from scratch, on as many FLOPs"
    scratch=$("$python" launch/from_scratch.py "$config" "$@") || exit 2
    train -n "$processes" "$scratch"

    step "what did growth save? (one seed, one size: docs/results.md has more)"
    growth-megatron compare "grown=$run" --baseline "scratch=${run%/}_scratch" --output "${run%/}_comparison"
fi

step "what it writes by now (of a corpus this small, with so few steps: words, not sense)"
growth-megatron sample "$run" "The state of the Union" "We must" --max-tokens 40

echo
echo "to go on by hand: cd $repository && source $venv/bin/activate"
