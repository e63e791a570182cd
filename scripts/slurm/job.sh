#!/usr/bin/env bash
# What single_node.sbatch and multi_node.sbatch share; docs/scaling.md explains it.
#
#   job.sh batch COMMAND FLAGS...   once for a job, by the .sbatch files: starts `node` everywhere, hands signals on, requeues
#   job.sh node COMMAND FLAGS...    once on every machine, by srun: torchrun with one process for each GPU
#
# Variables (sbatch hands them on): VENV_DIR (.venv), PROCESSES_PER_NODE (as many as GPUs), MAX_RESTARTS (3: how often a
# job starts its processes again after one died), SAVE_SECONDS (240: what a run has to save in before it is killed).
set -euo pipefail

AGAIN_SECONDS="${AGAIN_SECONDS:-20}"

# Waits for a process of this shell to end, through signals that it is trapped for, and returns its status.
status_of() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1" || true
    done
    wait "$1"
}

# Asks the step to save and end, until it has: while a run loads its data it does not listen yet.
ask_to_save() {
    while kill -USR1 "$1" 2>/dev/null; do
        sleep "$AGAIN_SECONDS"
    done
}

batch() {
    local step asked="" asking="" status=0
    local srun=(srun "--nodes=$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1)
    # srun does not take it over from sbatch.
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    "${srun[@]}" bash "${BASH_SOURCE[0]}" node "$@" &
    step=$!
    # USR1: the time limit is near (#SBATCH --signal). TERM: the job is cancelled or preempted; whether it comes back
    # is for Slurm to decide.
    trap 'hear USR1' USR1
    trap 'hear TERM' TERM
    hear() {
        [[ -z "$asked" ]] || return 0
        asked="$1"
        echo "[slurm] $asked: the run saves and ends"
        ask_to_save "$step" >/dev/null 2>&1 &
        asking=$!
    }
    status_of "$step" || status=$?
    [[ -z "$asking" ]] || kill "$asking" 2>/dev/null || true
    if [[ "$asked" == USR1 ]]; then
        echo "[slurm] job $SLURM_JOB_ID goes back into the queue and will go on with its newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit "$status"
}

node() {
    local command="$1" processes launcher address torchrun
    shift
    if [[ -f "${VENV_DIR:-.venv}/bin/activate" ]]; then
        # shellcheck disable=SC1091
        . "${VENV_DIR:-.venv}/bin/activate"
    fi
    processes="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
    torchrun=(python -m torch.distributed.run "--nproc-per-node=$processes" "--max-restarts=${MAX_RESTARTS:-3}")
    if ((SLURM_NNODES > 1)); then
        address="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
        torchrun+=("--nnodes=$SLURM_NNODES" --rdzv-backend=c10d "--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
            "--rdzv-endpoint=$address:$((20000 + SLURM_JOB_ID % 20000))"
            "--rdzv-conf=is_host=$((SLURM_NODEID == 0))")
    else
        torchrun+=(--standalone)
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} > processes ? ${SLURM_CPUS_ON_NODE:-1} / processes : 1))}"
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SAVE_SECONDS:-240}" # torchrun kills after 30 seconds otherwise
    # torchrun ignores USR1, which would end it. Its processes listen to it once they train.
    (
        trap '' USR1
        exec "${torchrun[@]}" -m minillm "$command" --resume_from auto "$@"
    ) &
    launcher=$!
    trap 'pkill -USR1 -P "$launcher" || true' USR1 # torchrun's processes, not torchrun
    trap 'kill -TERM "$launcher" || true' TERM
    status_of "$launcher"
}

case "${1:-}" in
    batch | node) "$@" ;;
    *)
        sed -n '2,8{s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
