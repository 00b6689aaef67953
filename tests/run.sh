#!/usr/bin/env bash
# Sets up .venv and what the tests need from Debian, then runs every check.
#
#   tests/run.sh                         everything, in two lanes side by side
#   tests/run.sh PYTEST ARGUMENTS        e.g. tests/run.sh tests/unit -x: one pytest with these
#
# DFS_KILL_ROUNDS  how often everything is killed at a random moment (default 20; soak: 50)
#
# Exit status 0 only if all of ruff, mypy, import-linter and pytest are content.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/lib.sh
. "$ROOT/deploy/lib.sh"
cd "$ROOT" || exit 1

failed=()
durations=()

# stage NAME COMMAND...: run it, remember how long it took and whether it failed.
stage() {
    local name=$1 start=$SECONDS
    shift
    say "$name"
    "$@" </dev/null || failed+=("$name")
    durations+=("$(printf '%5d s  %s' $((SECONDS - start)) "$name")")
}

# pytest_in_lanes: the clusters of tests/integration, which mostly wait, beside what computes (unit,
# property, simulations) and then the mounts.  The second lane's output is kept and shown at the end.
pytest_in_lanes() {
    local log beside failed=0
    local pytest=("$BIN/python" -m pytest --durations=15 -o)
    log=$(mktemp) || return
    set -m # a process group of its own, to end it as one
    {
        local others=0
        "${pytest[@]}" cache_dir=.pytest_cache/computing tests \
            --ignore=tests/integration --ignore=tests/mount || others=1
        "${pytest[@]}" cache_dir=.pytest_cache/mount tests/mount || others=1
        exit "$others"
    } >"$log" 2>&1 &
    beside=$!
    set +m
    # shellcheck disable=SC2064 # the names are of this function
    trap "kill -- -$beside 2>/dev/null; rm -f '$log'" EXIT
    "${pytest[@]}" cache_dir=.pytest_cache/integration tests/integration || failed=1
    wait "$beside" || failed=1
    say "pytest: all but tests/integration"
    cat "$log"
    rm -f "$log"
    trap - EXIT
    return "$failed"
}

start=$SECONDS
(setup test git rsync sqlite3 tar attr curl iptables ip:iproute2 fio stress-ng) || exit 1
require_fuse
durations+=("$(printf '%5d s  %s' $((SECONDS - start)) setup)")
BIN="$VENV/bin"

stage "ruff check" "$BIN/ruff" check .
stage "ruff format" "$BIN/ruff" format --check .
stage "mypy" "$BIN/mypy"
stage "import-linter" "$BIN/lint-imports"
if [ $# -gt 0 ]; then
    stage "pytest" "$BIN/python" -m pytest --durations=15 "$@"
else
    stage "pytest" pytest_in_lanes
fi

printf '\n'
printf '%s\n' "${durations[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: ${failed[*]}"
    exit 1
fi
say "all checks passed"
