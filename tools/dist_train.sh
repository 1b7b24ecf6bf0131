#!/usr/bin/env bash
# Train on the GPUs of one machine: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# On several machines, run it on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=ADDRESS_OF_NODE_0 tools/dist_train.sh ...
set -euo pipefail
if (($# < 2)); then
    sed -n 's/^# //p' "$0" >&2
    exit 2
fi

if ((${NNODES:-1} > 1)); then
    meet=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?is not set; give 0 to NNODES - 1}"
        --master-addr "${MASTER_ADDR:?is not set; give the address of node 0}" --master-port "${PORT:-29500}")
elif [[ -n ${PORT:-} ]]; then
    meet=(--master-port "$PORT")
else
    meet=(--standalone) # any free port, so that jobs on one machine do not meet
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$2" \
    "$(dirname "$0")/${TOOL:-train}.py" "$1" "${@:3}" --launcher pytorch
