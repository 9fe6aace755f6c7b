#!/usr/bin/env bash
# Format, lint, types and tests in the current environment; arguments go to pytest. Fails if any of them does.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=()
check() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "== $name took $((SECONDS - started)) s"
}

check 'ruff format' ruff format --check .
check 'ruff check' ruff check .
check mypy mypy
check pyright pyright
check pytest pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
