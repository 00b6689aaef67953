#!/usr/bin/env bash
# Sets up .venv and what the tests need from Debian, then runs every check.
#
#   tests/run.sh [PYTEST ARGUMENTS]      e.g. tests/run.sh tests/unit -x
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

start=$SECONDS
(setup test git rsync sqlite3 tar attr) || exit 1
require_fuse
durations+=("$(printf '%5d s  %s' $((SECONDS - start)) setup)")
BIN="$VENV/bin"

stage "ruff check" "$BIN/ruff" check .
stage "ruff format" "$BIN/ruff" format --check .
stage "mypy" "$BIN/mypy"
stage "import-linter" "$BIN/lint-imports"
stage "pytest" "$BIN/python" -m pytest --durations=15 "$@"

printf '\n'
printf '%s\n' "${durations[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: ${failed[*]}"
    exit 1
fi
say "all checks passed"
