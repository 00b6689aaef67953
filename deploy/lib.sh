# Shared by deploy/quickstart.sh and tests/run.sh: installs what is missing, and says so.
# Source it after setting ROOT to the checkout. Everything goes to ROOT/.venv, except Debian packages.

VENV="$ROOT/.venv"

say() { printf '== %s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# The interpreter to build the environment with: DFS_PYTHON, else python3.11, else python3.
find_python() {
    local candidate
    for candidate in ${DFS_PYTHON:-} python3.11 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed: apt-get install python3"
}

# install_packages NAME...: install these Debian packages; needs root or sudo.
install_packages() {
    local as_root=()
    [ $# -gt 0 ] || return 0
    say "installing Debian packages: $*"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "as root, run: apt-get install $*"
        as_root=(sudo)
    fi
    command -v apt-get >/dev/null || die "this is no Debian; install by hand: $*"
    "${as_root[@]}" apt-get update -qq </dev/null || say "apt-get update failed, trying anyway"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null ||
        die "could not install: $*"
}

# Packages that building and running dfs needs and that are not there, one a line. What counts is
# whether the thing works, not which package it came from.
missing_for_dfs() {
    local python=$1
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || echo python3-dev
    command -v gcc >/dev/null || echo gcc
    [ -e /usr/include/stdio.h ] || echo libc6-dev
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    command -v fusermount3 >/dev/null || echo fuse3
}

# setup EXTRA [COMMAND...]: make ROOT/.venv with dfs (and the extra, if not empty), and see that the
# commands exist (each is also the name of its Debian package). Quick when all is there.
setup() {
    local extra=$1 python packages command stamp want version='import sys; print(sys.version)'
    shift
    python=$(find_python) || exit 1
    packages=$(missing_for_dfs "$python")
    for command in "$@"; do
        command -v "${command%:*}" >/dev/null || packages="$packages ${command#*:}"
    done
    # shellcheck disable=SC2086 # words are package names
    install_packages $packages

    mkdir -p "$VENV"
    exec 9>"$VENV/.lock" # two of us at once would tear the environment apart
    flock 9
    stamp="$VENV/.installed-${extra:-run}"
    want=$(cat "$ROOT/pyproject.toml" "$ROOT/requirements.lock" | sha256sum)
    want="$want $ROOT $("$python" -c "$version")"
    if [ ! -x "$VENV/bin/dfs" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        say "installing dfs${extra:+ and what its tests need} into $VENV"
        rm -f "$stamp"
        if [ "$("$VENV/bin/python" -c "$version" 2>&1)" != "$("$python" -c "$version")" ]; then
            rm -rf "$VENV"/{bin,lib,lib64,include,share,pyvenv.cfg} # of another Python
        fi
        "$python" -m venv "$VENV" || die "could not make $VENV"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$ROOT/requirements.lock" --editable "$ROOT${extra:+[$extra]}" </dev/null ||
            die "pip could not install dfs, see above"
        printf '%s\n' "$want" >"$stamp"
    fi
    exec 9>&-
}

# Mounting needs the kernel's FUSE device.
require_fuse() {
    [ -e /dev/fuse ] && return
    [ "$(id -u)" -eq 0 ] && modprobe fuse 2>/dev/null
    [ -e /dev/fuse ] ||
        die "there is no /dev/fuse: load the module (modprobe fuse), or give the container --device /dev/fuse --cap-add SYS_ADMIN"
}
