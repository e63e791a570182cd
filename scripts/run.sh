#!/usr/bin/env bash
# From nothing to a pretrained, fine-tuned, preference-tuned and evaluated model. Guide: docs/run.md
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/run.sh [--smoke-test] [--skip-pretrain] [--force-pretrain] [-h|--help]

Sets up .venv, then pretrains, fine-tunes (SFT), preference-tunes (DPO) and evaluates a model.

  --smoke-test      a few steps of everything on the CPU, to see that it works (under 3 minutes)
  --skip-pretrain   start at SFT from a pretrain checkpoint that is already there
                    (MINILLM_PRETRAINED_PATH, the cloud's out/, OUT_DIR; a damaged one is trained again)
  --force-pretrain  pretrain from scratch whatever is there; wins over --skip-pretrain
  -h, --help        show this

Environment (default):
  MODEL_HIDDEN_SIZE (512)   MODEL_NUM_LAYERS (8)   USE_MOE (0)   ARCHITECTURE (ar)
  OUT_DIR (out)             checkpoints and report.md
  DATA_DIR (data/processed) data that this script generates
  TF_DIR (./tf_dir)         TensorBoard logs
  PRETRAIN_JSON, SFT_JSON, DPO_JSON   your data (generated demo data)
  PRETRAIN_ARGS, SFT_ARGS, DPO_ARGS   more flags for each stage
  MINILLM_PRETRAINED_PATH   the pretrain checkpoint to start from
  VENV_DIR (.venv)   USE_UV (auto; 0 or 1)   PYTHON (the first 3.10 or newer found)
  OPENBAYES_HOME (/openbayes/home)   OPENBAYES_INPUT (/openbayes/input/input0)
TEXT
}

for argument in "$@"; do
    case "$argument" in
        --smoke-test | --skip-pretrain | --force-pretrain) ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            printf 'run.sh: unknown option: %s\n\n' "$argument" >&2
            usage >&2
            exit 1
            ;;
    esac
done

. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
setup_environment track,report,data,eval

# exec: signals and the exit code are the pipeline's own.
exec "$VENV_PYTHON" -m minillm pipeline "$@"
