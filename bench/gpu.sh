#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the root of a checkout: bash bench/gpu.sh [folder for results]
# It needs torch with CUDA, triton, diffusers, pytest and hypothesis, and installs nothing. Tests first: no speed is
# reported of what does not work. Results are lines of JSON, one file for each question.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-bench/results}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

# The Hopper kernel by itself and with a limit: a fault of its barriers would wait for ever, and not fail.
hopper=tests/kernels/test_attention_hopper.py
python3 -m pytest -q -o addopts="" tests/kernels --ignore="$hopper" 2>&1 | tee "$out/gpu-tests.txt"
timeout 240 python3 -m pytest -q -o addopts="" "$hopper" 2>&1 | tee "$out/gpu-tests-hopper.txt"
python3 -m stgfast.cli doctor | tee "$out/doctor.txt"
python3 bench/combine.py --device cuda --save "$out/combine.jsonl"
python3 bench/attention.py --tokens 2048 8192 32768 --save "$out/attention.jsonl"
python3 bench/blur.py --device cuda --save "$out/blur.jsonl"
python3 bench/steps.py --device cuda --size small --rounds 9 --variants stock paper passes stgfast reuse --save "$out/steps.jsonl"
python3 bench/steps.py --device cuda --size full --models mochi ltx-2b wan-1.3b --rounds 3 \
    --variants stock paper stgfast compiled --save "$out/steps.jsonl"
