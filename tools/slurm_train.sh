#!/usr/bin/env bash
# Train on a cluster that Slurm runs: GPUS=16 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of
# tools/train.py]. GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS have defaults: 8 at most, 5, none.
set -euo pipefail
if (($# < 4)); then
    sed -n 's/^# //p' "$0" >&2
    exit 2
fi

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# SRUN_ARGS is several words. When one rank ends in an error, the others would wait for it.
# shellcheck disable=SC2086
exec srun -p "$1" --job-name "$2" --ntasks "$gpus" --ntasks-per-node "$per_node" --gres "gpu:$per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" "${@:5}" --launcher slurm
