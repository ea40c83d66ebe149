#!/usr/bin/env bash
# First light on a GPU from the bare tree: no environment, no installation, no network.
#     bash benchmarks/first_light/run.sh [--stage N ...] [--small] | --tune [ARGUMENTS of kernels.tune]
# PYTHON names the interpreter, which has to hold PyTorch and Triton; results go to OUT.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-benchmarks/results/first-light}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT"
ln -sfn ../kernels strainer_fast/kernels
ln -sfn ../benchmarks strainer_fast/benchmarks
if [ -z "${TRITON_CACHE_DIR:-}" ]; then
  export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/strainer-fast-triton
  # Kernels compiled beforehand: python -m strainer_fast.benchmarks.first_light.prebuild
  if [ ! -d "$TRITON_CACHE_DIR" ] && [ -f .triton-cache/cache.tar.xz ]; then
    mkdir -p "$TRITON_CACHE_DIR"
    "$PYTHON" -m tarfile -e .triton-cache/cache.tar.xz "$TRITON_CACHE_DIR"
  fi
fi
exec "$PYTHON" -m strainer_fast.benchmarks.first_light "$@"
