#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the root of a checkout: bash bench/gpu.sh [folder for results]
# It needs torch with CUDA, diffusers and pytest, and installs nothing. Results are lines of JSON, one file a question.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-bench/results}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 bench/sharing.py --device cuda --size small --rounds 15 --save "$out/sharing.jsonl"
python3 bench/sharing.py --device cuda --size full --frames 31 --steps 2 --rounds 3 --save "$out/sharing.jsonl"
