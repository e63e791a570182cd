#!/usr/bin/env bash
# Sets up the environment (once) and runs the tests.
#
#   scripts/test.sh                 everything but the slow tests
#   scripts/test.sh --all           the slow tests too (learning curves, big matrices, peers), and those that need Ray
#   scripts/test.sh -k resume -x    all other arguments go to pytest
#
# VENV_DIR, PYTHON and USE_UV as in scripts/run.sh.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

marker="not slow"
extras=dev
arguments=()
for argument in "$@"; do
    case "$argument" in
        --all) marker="" extras=dev,scale ;;
        -h | --help)
            sed -n '2,8{s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) arguments+=("$argument") ;;
    esac
done

setup_environment "$extras"

# Two test processes of one thread each finish earlier than one process of two threads: most tests are too small
# to keep a second thread busy.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export WANDB_MODE="${WANDB_MODE:-offline}"
cd "$REPO_ROOT"
exec "$VENV_PYTHON" -m pytest -n 2 --dist worksteal -m "$marker" ${arguments[@]+"${arguments[@]}"}
