#!/usr/bin/env bash
# Correctness and training speed on a GPU, beside transformers and (with NANOGPT_DIR) nanoGPT: in under 8 minutes, on a
# machine with this repository alone. All arguments go to benchmarks/gpu.py:
#
#   benchmarks/gpu.sh                        a GPU
#   benchmarks/gpu.sh --device cpu --smoke   to see that it runs
#
# A Python that already has what is needed (PYTHON, default python3) is used as it is, so that machines without network
# work; else scripts/setup.sh builds the environment, with the torch that PyPI has for this platform.
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
if ! "$python" - "$@" <<'CHECK' 2>/dev/null
import sys
import jinja2, numpy, orjson, rich, safetensors, tokenizers, torch, yaml
sys.exit(not (torch.cuda.is_available() or "cpu" in sys.argv))
CHECK
then
    . "$here/../scripts/setup.sh"
    setup_environment export
    python="$VENV_PYTHON"
fi
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$here/gpu.py" --spent "$SECONDS" "$@"
