# shellcheck shell=bash
# The environment that run.sh and test.sh share. Source this file, then call
#   setup_environment EXTRAS      e.g. setup_environment track,report,data
# It creates, completes or repairs the virtual environment and sets VENV_PYTHON to its interpreter.
#
# What may be set: VENV_DIR (default .venv in the repository), PYTHON (the interpreter to build it with),
# USE_UV (auto, 0 or 1). Written for bash 3.2, which macOS still ships.

REPO_ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

setup_say() { printf '[setup] %s\n' "$*"; }
setup_fail() { printf '[setup] %s\n' "$@" >&2; exit 1; }

setup_environment() {
    local extras="$1" started=$SECONDS
    setup_paths
    local state
    state="$(setup_state "$extras")"
    if [ "$state" = ready ]; then
        return 0
    fi
    setup_say "$VENV_DIR: $state"
    extras="$(setup_all_extras "$extras")"

    # Half-finished or outdated environments are completed in place; only if that does not give a working
    # one is it built again from nothing.
    local attempt python
    for attempt in 1 2; do
        if [ "$attempt" = 2 ] || setup_must_rebuild "$state"; then
            python="$(setup_find_python)" || exit 1
            setup_remove
            setup_create "$python"
        fi
        rm -f "$VENV_STAMP"
        setup_install "$extras"
        if setup_verify; then
            printf '%s\n%s\n' "$(setup_fingerprint)" "$extras" >"$VENV_STAMP.new"
            mv -f "$VENV_STAMP.new" "$VENV_STAMP"
            mv -f "$SETUP_LOG" "$VENV_DIR/setup.log"
            setup_say "ready after $((SECONDS - started)) s: $VENV_DIR (log: $VENV_DIR/setup.log)"
            return 0
        fi
        [ "$attempt" = 2 ] || setup_say "the environment still does not work: building it again from nothing"
    done
    setup_show_log
    setup_fail "the environment was installed, but importing torch and minillm fails (see above)."
}

setup_paths() {
    VENV_DIR="${VENV_DIR:-$REPO_ROOT/.venv}"
    case "$VENV_DIR" in
        /*) ;;
        *) VENV_DIR="$PWD/$VENV_DIR" ;;
    esac
    VENV_PYTHON="$VENV_DIR/bin/python"
    VENV_STAMP="$VENV_DIR/minillm-setup"
    SETUP_LOG=""
    case "${USE_UV:-auto}" in
        auto | 0 | 1) ;;
        *) setup_fail "USE_UV is '$USE_UV': give auto, 0 or 1." ;;
    esac
}

# Prints "ready", or a sentence that says what is to be done.
setup_state() {
    if [ ! -e "$VENV_DIR" ]; then
        echo "creating a new environment"
    elif ! setup_runs "$VENV_PYTHON"; then
        echo "broken (its Python does not run), building it again"
    elif [ -n "${PYTHON:-}" ] && [ "$(setup_version "$PYTHON")" != "$(setup_version "$VENV_PYTHON")" ]; then
        echo "made with another Python than PYTHON=$PYTHON, building it again"
    elif [ ! -f "$VENV_STAMP" ]; then
        echo "set-up was not finished, completing it"
    elif [ "$(sed -n 1p "$VENV_STAMP")" != "$(setup_fingerprint)" ]; then
        echo "not up to date (pyproject.toml, constraints.txt, Python or the location changed), updating"
    elif [ "$(setup_all_extras "$1")" != "$(sed -n 2p "$VENV_STAMP")" ]; then
        echo "adding $1"
    elif ! setup_intact; then
        echo "broken (installed files are missing or damaged), building it again"
    else
        echo ready
    fi
}

setup_must_rebuild() {
    case "$1" in
        creating* | *"building it again") return 0 ;;
        *) return 1 ;;
    esac
}

setup_runs() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

setup_version() { "$1" -I -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || echo none; }

# The wanted extras and those already there. `dev` contains all others, so it stands alone.
setup_all_extras() {
    local there=""
    [ ! -f "$VENV_STAMP" ] || there="$(sed -n 2p "$VENV_STAMP")"
    local all
    all="$(printf '%s,%s' "$1" "$there" | tr ',' '\n' | sed '/^$/d' | sort -u | tr '\n' ',')"
    case ",$all" in
        *,dev,*) echo dev ;;
        *) echo "${all%,}" ;;
    esac
}

# Everything an environment depends on, as one line. The location counts because minillm is installed in place.
setup_fingerprint() {
    {
        cat "$REPO_ROOT/pyproject.toml" "$REPO_ROOT/constraints.txt"
        setup_version "$VENV_PYTHON"
        printf '%s\n%s\n' "$REPO_ROOT" "$VENV_DIR"
    } | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1
}

# Are the installed files still there, with their recorded sizes? A fraction of a second, where importing torch
# takes several; a torch that cannot be imported has lost or changed some file.
setup_intact() {
    "$VENV_PYTHON" -I - "$REPO_ROOT/src" >/dev/null 2>&1 <<'PYTHON'
import csv, glob, os, sys, sysconfig

site = sysconfig.get_paths()["purelib"]
records = glob.glob(os.path.join(site, "*.dist-info", "RECORD"))
names = {os.path.basename(os.path.dirname(record)).split("-")[0].lower() for record in records}
if not {"torch", "numpy", "tokenizers", "minillm_trainer"} <= names or sys.argv[1] not in sys.path:
    sys.exit(1)
for record in records:
    with open(record, newline="", encoding="utf-8") as lines:
        for path, _, size in csv.reader(lines):
            if size and os.stat(os.path.join(site, path)).st_size != int(size):
                sys.exit(1)
PYTHON
}

setup_verify() {
    setup_log_here
    "$VENV_PYTHON" -I -c 'import torch, minillm' >>"$SETUP_LOG" 2>&1 && setup_intact
}

setup_remove() {
    [ -e "$VENV_DIR" ] || return 0
    if [ ! -d "$VENV_DIR" ] || { [ ! -f "$VENV_DIR/pyvenv.cfg" ] && [ ! -f "$VENV_STAMP" ] &&
        [ ! -d "$VENV_DIR/bin" ] && [ -n "$(ls -A "$VENV_DIR")" ]; }; then
        setup_fail "$VENV_DIR exists and is not a virtual environment: set VENV_DIR to another folder."
    fi
    rm -rf "$VENV_DIR"
}

setup_create() {
    setup_log_here
    if setup_uv_usable; then
        setup_say "creating it with uv and Python $(setup_version "$1")"
        uv venv --quiet --python "$1" "$VENV_DIR" >>"$SETUP_LOG" 2>&1 && return 0
        setup_say "uv could not create it, using python -m venv"
        setup_remove
    fi
    setup_create_with_venv "$1"
}

setup_create_with_venv() {
    setup_say "creating it with venv and Python $(setup_version "$1")"
    if ! "$1" -m venv "$VENV_DIR" >>"$SETUP_LOG" 2>&1; then
        setup_show_log
        setup_fail "python -m venv failed. On Debian and Ubuntu: apt install python3-venv." \
            "Or set PYTHON to another interpreter (3.10 or newer)."
    fi
}

setup_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        setup_runs "$PYTHON" && { command -v "$PYTHON"; return 0; }
        setup_fail "PYTHON=$PYTHON does not run or is older than Python 3.10 (it says: $(setup_version "$PYTHON"))."
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        setup_runs "$candidate" && { command -v "$candidate"; return 0; }
    done
    setup_fail "No Python 3.10 or newer was found (python3 says: $(setup_version python3))." \
        "Install one, or set PYTHON to its path: PYTHON=/path/to/python3.11 $0"
}

setup_uv_usable() {
    [ "${USE_UV:-auto}" != 0 ] || return 1
    if ! uv --version >/dev/null 2>&1; then
        [ "${USE_UV:-auto}" != 1 ] || setup_say "USE_UV=1, but uv is not installed: using pip"
        return 1
    fi
}

# One call for everything, so that torch's pin holds for whatever else asks for torch.
setup_install() {
    local extras="$1" torch
    torch="$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$REPO_ROOT/constraints.txt")"
    setup_log_here
    if setup_uv_usable; then
        setup_say "installing $torch and minillm[$extras] with uv"
        setup_uv_install "$torch" "$extras" && return 0
        setup_say "uv failed, falling back to pip (uv's output: $SETUP_LOG)"
    fi
    if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        # Environments that uv makes have no pip.
        local python
        python="$(setup_find_python)" || exit 1
        setup_remove
        setup_create_with_venv "$python"
    fi
    setup_say "installing $torch and minillm[$extras] with pip (on a new machine this takes a minute or more)"
    if ! setup_with_heartbeat "$VENV_PYTHON" -m pip install --no-compile --no-input --disable-pip-version-check \
        -c constraints.txt "$torch" -e ".[$extras]"; then
        setup_show_log
        setup_fail "pip could not install the packages (see above)."
    fi
}

# uv ignores pip's settings: the same places are handed over, so that both install the same files.
setup_uv_install() {
    local links index extra
    links="${PIP_FIND_LINKS:-$(setup_pip_setting find-links)}"
    index="${PIP_INDEX_URL:-$(setup_pip_setting index-url)}"
    extra="${PIP_EXTRA_INDEX_URL:-$(setup_pip_setting extra-index-url)}"
    (
        [ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$(setup_commas "$links")}"
        [ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
        if [ -n "$extra" ]; then
            # pip takes the best version from any index; uv does so only when told.
            export UV_INDEX="${UV_INDEX:-$extra}" UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
        fi
        setup_with_heartbeat uv pip install --python "$VENV_PYTHON" -c constraints.txt "$1" -e ".[$2]"
    )
}

# pip separates several places by white space, uv (in UV_FIND_LINKS) by commas.
setup_commas() { printf '%s' "$1" | tr -s ' \n' ',,'; }

setup_pip_setting() { "${PYTHON:-python3}" -m pip config get "global.$1" 2>/dev/null || true; }

setup_log_here() {
    [ -n "$SETUP_LOG" ] || SETUP_LOG="$(mktemp "${TMPDIR:-/tmp}/minillm-setup.XXXXXX")"
}

setup_show_log() {
    printf '[setup] last lines of %s:\n' "$SETUP_LOG" >&2
    tail -n 25 "$SETUP_LOG" >&2
}

# Runs a command in the repository with its output in the log, and says every 15 s that it is still at work.
# The command stays in the foreground so that Ctrl-C reaches it.
setup_with_heartbeat() {
    local pulse status=0
    (
        waited=0
        while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
            waited=$((waited + 1))
            [ $((waited % 15)) -ne 0 ] || setup_say "still installing after $waited s: $(tail -n 1 "$SETUP_LOG" | cut -c1-80)"
        done
    ) &
    pulse=$!
    (cd "$REPO_ROOT" && "$@") >>"$SETUP_LOG" 2>&1 </dev/null || status=$?
    kill "$pulse" 2>/dev/null || true
    wait "$pulse" 2>/dev/null || true
    return "$status"
}
