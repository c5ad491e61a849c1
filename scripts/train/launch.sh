#!/usr/bin/env bash
# Start one of the two commands, with a process for each GPU, by the launcher of this machine:
#   bash scripts/train/launch.sh dpo-cache build --config … --cache …
#   bash scripts/train/launch.sh dpo-train --config … --cache … --output …
#
# LAUNCHER  local      this machine alone; the command starts a process for each GPU itself
#           srun       all nodes of the SLURM job around it
#           torchrun   the same line on each of NODES machines; HEAD is the name of one of them
#           deepspeed  on one machine; HOSTFILE lists all of them, `name slots=8` a line, that this one reaches by ssh
#           [default: srun in a job script of SLURM, deepspeed with HOSTFILE, torchrun with HEAD, else local]
# NODES     machines, for torchrun [default: 1; a recipe's own number]
# GPUS      processes on a machine, for srun, torchrun, and deepspeed without HOSTFILE [default: its GPUs]
# PORT      rendezvous on HEAD or the first host; PORT + 1 is used too [default: 29500]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v dpo-train >/dev/null || PATH=$root/.venv/bin:$PATH

stop() {
    echo "launch.sh: $*" >&2
    exit 2
}
[ $# -gt 0 ] || stop "which command? dpo-cache build … or dpo-train …"
if [ -n "${RANK:-}" ] || [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
    stop "a launcher started this script once for each process; start it once: it calls the launcher itself"
fi
# In full: machines that are reached over ssh have another PATH.
command=$(command -v "$1") || stop "$1 is not installed here: pip install -e $root"

if [ -z "${LAUNCHER:-}" ]; then
    # In a step there already is (srun --pty bash), another srun would wait for the GPUs of the first.
    if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then LAUNCHER=srun
    elif [ -n "${HOSTFILE:-}" ]; then LAUNCHER=deepspeed
    elif [ -n "${HEAD:-}" ]; then LAUNCHER=torchrun
    else LAUNCHER=local; fi
fi
port=${PORT:-29500}
# Training may start on one machine while another still takes leave of the build: they must not meet.
[ "$1" != dpo-train ] || port=$((port + 1))
gpus_here() { # without any: one process on the CPU
    local count
    count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    echo $((count > 0 ? count : 1))
}
shift

case $LAUNCHER in
    local)
        [ "${NODES:-1}" -eq 1 ] || echo "launch.sh: this is one machine; the recipe ran on $NODES. docs/multi-node.md explains how to start several" >&2
        set -- "$command" "$@"
        ;;
    srun)
        nodes=${SLURM_JOB_NUM_NODES:?srun needs a SLURM job: sbatch or salloc}
        gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
        # srun does not take the number of CPUs over from sbatch; a rank that is gone ends the step.
        set -- srun --nodes="$nodes" --ntasks="$((nodes * gpus))" --ntasks-per-node="$gpus" \
            ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 "$command" "$@"
        ;;
    torchrun)
        # Asked to stop, ranks finish their update and save: torchrun would kill them after 30 s.
        set -- torchrun --no-python --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-$(gpus_here)}" --shutdown-timeout=600 \
            --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:$port" --rdzv-id="dpo-$port" "$command" "$@"
        ;;
    deepspeed)
        where=--num_gpus=${GPUS:-$(gpus_here)}
        [ -z "${HOSTFILE:-}" ] || where=--hostfile=$HOSTFILE
        set -- deepspeed "$where" --master_port="$port" --no_python --no_local_rank "$command" "$@"
        ;;
    *) stop "LAUNCHER is $LAUNCHER; it can be local, srun, torchrun or deepspeed" ;;
esac
printf '$ %s\n' "$*" >&2
exec "$@"
