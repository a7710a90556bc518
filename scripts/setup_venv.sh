#!/bin/sh
# Make (or refresh) the project's own virtual environment in .venv, with the versions that constraints.txt pins.
#
# Nothing outside the checkout is touched but package caches, except that missing system packages (a C compiler, Python's
# headers, GMP's headers: a dependency of libp2p is compiled from source) are installed where the user may, after saying so.
# A second run finds the stamp of the first and returns at once.
#
#   PYTHON=python3.12 sh scripts/setup_venv.sh      use this interpreter (default: python3)
set -eu
cd "$(dirname "$0")/.."
venv=.venv
stamp=$venv/.petalnet-stamp

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# The environment is good while these inputs are the same; a moved checkout needs a new one (scripts in it name its path).
fingerprint() { { pwd; cat pyproject.toml constraints.txt scripts/setup_venv.sh; } | cksum; }

if [ -x "$venv/bin/petalnet" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

# What is missing on this system, as generic names: cc, python, venv, headers, gmp.
missing_parts() {
    parts=
    command -v cc >/dev/null 2>&1 || parts="$parts cc"
    if ! command -v "$python" >/dev/null 2>&1; then
        parts="$parts python venv headers"
    else
        "$python" -c 'import venv, ensurepip' 2>/dev/null || parts="$parts venv"
        include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
        [ -f "$include/Python.h" ] || parts="$parts headers"
    fi
    if command -v cc >/dev/null 2>&1; then
        echo '#include <gmp.h>' | cc -E - >/dev/null 2>&1 || parts="$parts gmp"
    else
        parts="$parts gmp"
    fi
    echo "$parts"
}

# The command that installs those parts with this system's package manager; empty where we know none.
install_line() {
    packages=
    if command -v apt-get >/dev/null 2>&1; then
        command="apt-get install -y --no-install-recommends"
        for part in $1; do case $part in
            cc) packages="$packages build-essential" ;; python) packages="$packages python3" ;;
            venv) packages="$packages python3-venv" ;; headers) packages="$packages python3-dev" ;; gmp) packages="$packages libgmp-dev" ;;
        esac; done
    elif command -v dnf >/dev/null 2>&1; then
        command="dnf install -y"
        for part in $1; do case $part in
            cc) packages="$packages gcc" ;; python|venv) packages="$packages python3" ;;
            headers) packages="$packages python3-devel" ;; gmp) packages="$packages gmp-devel" ;;
        esac; done
    elif command -v pacman >/dev/null 2>&1; then
        command="pacman -S --noconfirm --needed"
        for part in $1; do case $part in cc) packages="$packages gcc" ;; python|venv|headers) packages="$packages python" ;; gmp) packages="$packages gmp" ;; esac; done
    elif command -v brew >/dev/null 2>&1; then
        command="brew install"
        for part in $1; do case $part in python|venv|headers) packages="$packages python3" ;; gmp) packages="$packages gmp" ;; esac; done
    else
        return 0
    fi
    echo "$command$packages"
}

install_parts() {
    line=$(install_line "$1")
    [ -n "$line" ] || die "missing on this system:$1 (a C compiler, Python >= 3.11 with venv and headers, GMP headers); install them and run this again"
    case $line in brew*) prefix= ;; *)
        if [ "$(id -u)" = 0 ]; then prefix=
        elif command -v sudo >/dev/null 2>&1 && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then prefix="sudo "
        else die "missing system packages; ask an administrator to run:  sudo $line"
        fi ;;
    esac
    say "installing missing system packages:  $prefix$line"
    case $line in apt-get*) ${prefix}apt-get update -qq || say "apt-get update failed; trying the known package lists" ;; esac
    DEBIAN_FRONTEND=noninteractive $prefix$line >&2 || die "that failed; run it yourself:  $prefix$line"
}

python=${PYTHON:-python3}
if command -v "$python" >/dev/null 2>&1; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "petalnet needs Python 3.11 or newer, $python is older: set PYTHON=python3.11 (or newer)"
fi
parts=$(missing_parts)
if [ -n "$parts" ]; then
    install_parts "$parts"
    parts=$(missing_parts)
    [ -z "$parts" ] || die "still missing after installing:$parts (headers must belong to $python; set PYTHON= to another interpreter?)"
fi

say "making $venv with $("$python" --version) (about 1 GB of packages: minutes the first time, nothing to do after that)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
pip install --upgrade -c constraints.txt pip

# PyTorch's Linux wheels on PyPI bring gigabytes of CUDA. Where there is no NVIDIA GPU, and what pip would choose wants those
# libraries, take the same version from PyTorch's own index of CPU builds.
torch=$(grep '^torch==' constraints.txt)
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    pip install --dry-run --ignore-installed --no-deps --report "$venv/torch.json" "$torch"
    if grep -q '"nvidia-\|"cuda-' "$venv/torch.json"; then
        say "no NVIDIA GPU here: taking the CPU build of $torch"
        pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
    fi
    rm "$venv/torch.json"
fi

pip install -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
# trio-typing, which a dependency of libp2p brings, has stubs of an old trio that hide trio's own types from type checkers.
rm -rf "$venv"/lib/python*/site-packages/trio-stubs
fingerprint > "$stamp"
say "$venv is ready"
