# Sourced by run_server.sh and run_tests.sh: makes .venv with the standard library's venv and pip, and returns at once if
# nothing has changed since.

ensure_environment() { # $1: requirements file
    local requirements="$1" stamp python
    local lock="${requirements%.txt}.lock"
    stamp=".venv/.installed-$(cat "$requirements" requirements.txt "$lock" | cksum | tr ' ' '-')"
    if [ -f "$stamp" ]; then install_package; return 0; fi
    python="$(find_python)" || return 1
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
    echo "installing $requirements into .venv (about 2 GB; takes some minutes)" >&2
    install_torch || return 1
    .venv/bin/pip install -qq --disable-pip-version-check -r "$requirements" -c "$lock" || return 1
    touch "$stamp"
    install_package
}

# Installs the command `gptoss` for this checkout, unless .venv is a link and so belongs to another one. If it fails, for
# example without a network, only the command is missing: scripts and tests find the package through the link gptoss.
install_package() {
    [ -f pyproject.toml ] || return 0
    [ -e gptoss ] || ln -s src gptoss # a copy without links
    [ ! -L .venv ] || return 0
    local stamp
    stamp=".venv/.package-$(cat pyproject.toml setup.py | cksum | tr ' ' '-')"
    if [ -f "$stamp" ]; then return 0; fi
    if .venv/bin/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e . ||
        .venv/bin/pip install -qq --disable-pip-version-check --no-deps -e .; then
        touch "$stamp"
    else
        echo "the command gptoss is not installed; python src/server.py serves without it" >&2
    fi
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.11 or newer is needed (set PYTHON to its path)" >&2
    return 1
}

# Without an NVIDIA GPU, installs the CPU build: from a local wheel, else from PyTorch's CPU index. PyPI's build comes with
# gigabytes of CUDA and is the last resort.
install_torch() {
    local version pip=".venv/bin/pip install -qq --disable-pip-version-check"
    version="$(grep -o '^torch==[0-9.]*' requirements.txt)"
    if .venv/bin/python -c "import importlib.metadata as m; import sys; sys.exit('torch==' + m.version('torch').split('+')[0] != '$version')" 2>/dev/null; then
        return 0
    fi
    if [ -e /dev/nvidia0 ] || [ "$(uname)" != Linux ]; then
        $pip "$version"
        return
    fi
    $pip --no-index --no-deps "$version" 2>/dev/null && return 0
    $pip --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu "$version" 2>/dev/null && return 0
    echo "no CPU build of $version found: taking PyPI's, with its CUDA libraries" >&2
    $pip "$version"
}
