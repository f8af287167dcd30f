#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the root of a checkout: bash bench/gpu.sh [part ...]
# It needs torch with CUDA, triton, diffusers, pytest and hypothesis, and installs nothing. Tests run first, so that no
# speed is reported for something that does not work. Results are lines of JSON, one file for each question, in
# bench/results/ or in the folder OUT. A part is stopped after 10 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-bench/results}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
HOPPER=tests/kernels/test_attention_hopper.py

bench() { python3 -m stgfast.cli bench --device cuda "$@"; }

# Without the tests that need no GPU.
tests() {
    python3 -m pytest -q -o addopts="" -k "not released_sizes" --ignore="$HOPPER" tests/kernels tests/test_gpu.py 2>&1 |
        tee "$OUT/gpu-tests.txt"
}

kernels() {
    python3 -m stgfast.cli doctor | tee "$OUT/doctor.txt"
    python3 bench/combine.py --device cuda --save "$OUT/combine.jsonl"
    python3 bench/attention.py --tokens 2048 8192 32768 --save "$OUT/attention.jsonl"
    python3 bench/blur.py --device cuda --save "$OUT/blur.jsonl"
    python3 bench/ways.py --device cuda --save "$OUT/ways.jsonl"
}

# The kernel for Hopper separately and last: a fault in its barriers would hang instead of failing.
hopper() {
    timeout 240 python3 -m pytest -q -o addopts="" "$HOPPER" 2>&1 | tee "$OUT/gpu-tests-hopper.txt"
    python3 bench/attention.py --hopper --tokens 2048 8192 32768 --save "$OUT/attention.jsonl"
}

# Narrow models: the GPU is not full, and the overhead of stgfast's Python is largest.
small() {
    bench --size small --rounds 9 --variants stock paper passes guiders stgfast split auto reuse --save "$OUT/steps.jsonl"
    bench --overhead --size small --save "$OUT/overhead.jsonl"
}

# Launch-bound sizes, with and without CUDA graphs.
graphs() {
    bench --size small --models mochi wan-1.3b hunyuan-video --variants stock stgfast compiled graphs --save "$OUT/graphs.jsonl"
}

growth() { bench --growth --size small --save "$OUT/growth.jsonl"; }

# Released sizes, random weights.
mochi() { full --models mochi --variants stock paper stgfast split compiled fastest; }
light() { full --models ltx-2b wan-1.3b; }
ltx() { full --models ltx-13b; }
wan() { full --models wan-14b --rounds 2; }
hunyuan() { full --models hunyuan-video --rounds 1; }
others() { full --models cogvideox-2b svd cogvideox-5b ltx-2 --rounds 2; }
full() {
    bench --size full --steps 2 --rounds 3 --variants stock paper stgfast auto compiled fastest --save "$OUT/steps.jsonl" "$@"
}

# The distance from the limit of the device, and whole clips.
largest() { bench --size largest --models mochi --steps 2 --rounds 2 --variants stgfast fastest --save "$OUT/steps.jsonl"; }
whole() { bench --size full --whole --models ltx-2b mochi --rounds 1 --variants stgfast --save "$OUT/steps.jsonl"; }

# On a machine with several GPUs.
ranks() {
    [ "$(nvidia-smi -L | wc -l)" -gt 1 ] || return 0
    torchrun --standalone --nproc-per-node gpu -m stgfast.cli bench --ranks --device cuda --size full --steps 2 --rounds 3 \
        --models mochi wan-14b ltx-2 --save "$OUT/ranks.jsonl"
}

page() { python3 -m stgfast.cli bench --report "$OUT" --out "$OUT/report.html"; }

if [ "${1:-}" = --one ]; then
    "$2"
    exit
fi
for part in "${@:-tests kernels mochi largest light ltx wan small growth others hunyuan whole graphs hopper ranks page}"; do
    for one in $part; do
        timeout 600 bash bench/gpu.sh --one "$one"
    done
done
