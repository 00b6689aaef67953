#!/usr/bin/env bash
# A cluster of three nodes on this machine, a mounted volume, and real files copied in and out.
#
#   deploy/quickstart.sh [up]    install what is missing, start, copy, compare; twice is harmless
#   deploy/quickstart.sh down    unmount, stop every process, remove all its data
#
# DFS_DEMO_DIR     where everything lives (default: .demo in the checkout)
# DFS_DEMO_SMALL   1 = copy a few MB only
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/lib.sh
. "$ROOT/deploy/lib.sh"

DEMO=$(realpath -m "${DFS_DEMO_DIR:-$ROOT/.demo}")
DFS="$VENV/bin/dfs"
MNT="$DEMO/mnt"
VOLUME=demo
SMALL=${DFS_DEMO_SMALL:-}
export DFS_CLUSTER="$DEMO/cluster.json"

# A base port with 6 free loopback ports from it on.
free_base_port() {
    "$VENV/bin/python" - <<'PY'
import random, socket

def free(port):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

# below 32768: the kernel hands out the ports above to outgoing connections
for base in [7400, *random.sample(range(10000, 32000, 10), 200)]:
    if all(free(base + i) for i in range(6)):
        print(base)
        break
PY
}

start_cluster() {
    if [ ! -e "$DFS_CLUSTER" ]; then
        mkdir -p "$DEMO"
        local port
        port=$(free_base_port)
        [ -n "$port" ] || die "found no 6 free ports in a row"
        echo "$port" >"$DEMO/port"
        "$DFS" cluster init --dir "$DEMO" --nodes 3 --base-port "$port" | sed -n 1p
    fi
    "$DFS" cluster up --dir "$DEMO"
}

mount_volume() {
    if ! "$DFS" volume info "$VOLUME" >/dev/null 2>&1; then
        "$DFS" volume create "$VOLUME"
    fi
    if ! mountpoint -q "$MNT" 2>/dev/null; then
        umount -l "$MNT" 2>/dev/null || true # of a mount whose process was killed
        mkdir -p "$MNT"
        "$DFS" mount "$VOLUME" "$MNT" --pid-file "$DEMO/run/mount.pid"
    fi
}

# Copies a tree of real source files to the mount and compares it back.
copy_library() {
    local library parts=(.) excluded
    library=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    excluded=(--exclude=__pycache__ --exclude=site-packages --exclude=dist-packages)
    if [ -n "$SMALL" ]; then
        parts=(json email http xml asyncio)
    fi
    if [ ! -e "$DEMO/copied" ]; then
        say "copying $library to $MNT/python"
        mkdir -p "$MNT/python"
        tar -C "$library" "${excluded[@]}" -cf - "${parts[@]}" | tar -C "$MNT/python" -xf -
        parts_to_compare=("${parts[@]}")
    else
        parts_to_compare=(json) # copied and compared before
    fi
    for part in "${parts_to_compare[@]}"; do
        diff -r "${excluded[@]}" "$library/$part" "$MNT/python/$part" ||
            die "the copy in $MNT/python differs, see above"
    done
    say "$(find "$MNT/python" -type f | wc -l) files are there, and equal to the originals"
}

# Puts a file, gets it back and compares, without the mount.
put_and_get() {
    [ ! -e "$DEMO/copied" ] || return 0
    local size=1024 name=one-gib
    [ -z "$SMALL" ] || size=4 name=four-mib
    mkdir -p "$DEMO/tmp"
    head -c "${size}M" /dev/urandom >"$DEMO/tmp/$name"
    say "dfs put and dfs get of $size MiB"
    "$DFS" put "$DEMO/tmp/$name" "$VOLUME:/$name"
    "$DFS" get "$VOLUME:/$name" "$DEMO/tmp/$name.back"
    cmp "$DEMO/tmp/$name" "$DEMO/tmp/$name.back" || die "$name came back different"
    say "$name came back byte for byte"
    rm -r "$DEMO/tmp"
}

up() {
    setup ""
    require_fuse
    if [ -z "$SMALL" ] && [ ! -e "$DEMO/copied" ]; then
        mkdir -p "$DEMO"
        [ "$(df --output=avail -k "$DEMO" | tail -n 1)" -gt $((6 << 20)) ] ||
            die "$DEMO needs 6 GiB of free space; DFS_DEMO_SMALL=1 needs next to nothing"
    fi
    start_cluster
    mount_volume
    copy_library
    put_and_get
    touch "$DEMO/copied"
    cat <<TEXT

The cluster runs. A volume of it, "$VOLUME", is mounted on $MNT.

    export PATH=$VENV/bin:\$PATH DFS_CLUSTER=$DFS_CLUSTER
    dfs cluster status
    ls -l $MNT
    kill -9 \$(cat $DEMO/run/node2-*.pid)     # a node dies; the mount goes on
    dfs cluster up node2                     # it comes back and catches up

Stop it and remove everything it made: deploy/quickstart.sh down
TEXT
}

down() {
    if [ -e "$DFS_CLUSTER" ]; then
        [ -x "$DFS" ] || setup ""
        "$DFS" cluster down --dir "$DEMO"
    fi
    ! mountpoint -q "$MNT" 2>/dev/null || umount "$MNT"
    if [ -d "$DEMO" ]; then
        # only what a demonstration makes: the directory was named by whoever called us
        rm -rf --one-file-system "$DEMO"/{node1,node2,node3,run,log,tmp,map,cluster.json,copied,port}
        rmdir "$MNT" 2>/dev/null || true
        rmdir "$DEMO" 2>/dev/null || say "left other files in $DEMO"
    fi
    say "stopped and removed"
}

case "${1:-up}" in
up | down) "${1:-up}" ;;
-h | --help | help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
*)
    echo "usage: ${0##*/} [up|down]" >&2
    exit 2
    ;;
esac
