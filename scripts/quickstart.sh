#!/usr/bin/env bash
# From a fresh checkout to text from a quantized model: sets up, converts the small DBRX that comes with the
# project, generates, and compares with the original. No GPU; no network but for installing.
#
#   scripts/quickstart.sh [BPW] [OUT]     default 3.0 and out/quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
SECONDS=0
bpw=${1:-3.0} out=${2:-out/quickstart} model=tests/data/tiny-dbrx

. scripts/setup.sh
set_up
echo "set-up took $SECONDS s"

export HF_HUB_OFFLINE=1 # nothing here comes from the Hub
mkdir -p "$(dirname "$out")"
dbrx-quant convert "$model" "$out" --bpw "$bpw" --calibration offline --rows 64 --length 256 --resume never
dbrx-quant verify "$out" --quiet

prompt='with open(filename'
printf '\n%s' "$prompt"
dbrx-quant generate "$out" "$prompt" --max-new-tokens 48 --quiet
echo
dbrx-quant eval "$out" --reference "$model" --text "$model/heldout.txt" --windows 16 --length 256 --quiet
echo "scripts/quickstart.sh took $((SECONDS / 60)) min $((SECONDS % 60)) s; the result is in $out"
