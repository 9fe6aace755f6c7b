#!/usr/bin/env bash
# Sets up what the checks need, then runs them all: format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
SECONDS=0
trap 'echo "scripts/test.sh took $((SECONDS / 60)) min $((SECONDS % 60)) s"' EXIT

. scripts/setup.sh
set_up dev
echo "set-up took $SECONDS s"
scripts/check.sh "$@"
