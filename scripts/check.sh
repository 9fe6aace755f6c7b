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

format_cpp() {
    if ! command -v clang-format > /dev/null; then
        echo "clang-format is absent; the dev extra brings it: pip install -e '.[dev]'" >&2
        return 1
    fi
    clang-format --version  # majors differ in what they make of a file; pyproject.toml names ours
    find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
        xargs -0 clang-format --dry-run --Werror
}

check 'ruff format' ruff format --check .
check 'clang-format' format_cpp
check 'ruff check' ruff check .
check mypy mypy
check pyright pyright
# Two processes with a file of tests each at a time; their idle threads sleep, since they share the cores.
check pytest env GOMP_SPINCOUNT=1000 pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
