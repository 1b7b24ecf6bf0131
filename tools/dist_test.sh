#!/usr/bin/env bash
# Test on the GPUs of one machine: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# On several machines, run it on each, with NNODES, NODE_RANK and MASTER_ADDR as for tools/dist_train.sh.
set -euo pipefail
if (($# < 3)); then
    sed -n 's/^# //p' "$0" >&2
    exit 2
fi
TOOL=test exec bash "$(dirname "$0")/dist_train.sh" "$1" "$3" "$2" "${@:4}"
