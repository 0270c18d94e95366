#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can tell, in one call of under eight minutes and without a network:
#   OUT=folder SDW_WHEELS=folder benchmarks/gpu_check.sh
# builds the extension in place for this GPU, runs the CUDA tests, runs compute-sanitizer over small shapes, times every op
# beside its peers, distills hopper-medium, and prints one table last. The log and the tables of results go to OUT.
#
# Needs nvcc, CMake, a C++ compiler, and a Python (PYTHON, default python3) with torch (CUDA), pybind11, pip, pytest,
# hypothesis, and what sdw_fast imports. Packages that this Python lacks are taken as wheels from SDW_WHEELS:
#   pip download "gymnasium[mujoco]" "minari[hdf5]" h5py safetensors tqdm matplotlib typer --dest wheels
# run with that Python's version and platform; without MuJoCo the last stage fails and the others run. JAX is timed where
# it is installed.
#
# A stage that fails, or that runs out of its time, is reported and the next begins; the exit status is then 1. Without a
# GPU the same stages run on the CPU with tiny shapes, which shows that they run and nothing else; the exit status is 3.
set -uo pipefail
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no Python: set PYTHON to one that has torch" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$root/benchmarks/results/gpu}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
SDW_WHEELS=${SDW_WHEELS:+$(cd "$SDW_WHEELS" && pwd)}
SECONDS_IN_ALL=460 # of all stages but the summary
PATH=$(dirname "$PYTHON"):$PATH:/usr/local/cuda/bin
cd "$root" || exit 2
packages=$PWD/build/gpu_check-packages # wheels unpacked
export PYTHONPATH=$PWD:$packages
export MINARI_DATASETS_PATH=$PWD/build/gpu_check-datasets
export XLA_PYTHON_CLIENT_PREALLOCATE=false # JAX would take three quarters of the memory
export TQDM_MININTERVAL=10
failed=()

stage() { # name, seconds at most, command
    local name=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS)) began=$SECONDS status
    shift 2
    printf '\n== %s\n' "$name"
    if [ "$left" -lt 5 ]; then
        echo "-- $name: FAILED, no time is left"
        failed+=("$name")
        return
    fi
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@"
    status=$?
    if [ "$status" -eq 0 ]; then
        echo "-- $name: done in $((SECONDS - began)) s"
    elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        echo "-- $name: FAILED, ran out of time after $((SECONDS - began)) s"
        failed+=("$name")
    else
        echo "-- $name: FAILED with status $status after $((SECONDS - began)) s"
        failed+=("$name")
    fi
}

wheels() { # those of SDW_WHEELS whose package this Python lacks
    local wheel name missing=()
    for wheel in "$SDW_WHEELS"/*.whl; do
        name=${wheel##*/}
        name=${name%%-*}
        "$PYTHON" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null || missing+=("$wheel")
    done
    [ ${#missing[@]} -eq 0 ] || "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$packages" "${missing[@]}"
}

build() { # by CMake alone: needs neither setuptools nor what pyproject.toml asks for
    local options=(-DSDW_CUDA=0)
    if [ "$device" = cuda ]; then
        options=(-DSDW_CUDA=1 -DCMAKE_CUDA_ARCHITECTURES="$(
            "$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())'
        )")
    fi
    cmake -S . -B "build/gpu_check-$device" -DCMAKE_BUILD_TYPE=Release "${options[@]}" -DPython_EXECUTABLE="$PYTHON" \
        -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/sdw_fast" &&
        cmake --build "build/gpu_check-$device" --parallel "$(nproc)"
}

sanitize() { # tool of compute-sanitizer
    if ! command -v compute-sanitizer; then
        echo "compute-sanitizer is not installed: skipped"
        return
    fi
    # Without PyTorch's own allocator, so that every tensor has an end that can be overrun.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
        "$PYTHON" -m benchmarks.gpu touch --out "$OUT" --device "$device"
}

check() {
    local began knn=(--device cuda --rows 1e5 1e6 --verify 20000)
    began=$(date +%s)
    device=cuda
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "NO GPU: a dry run on the CPU with tiny shapes; no figure below means anything"
        device=cpu knn=(--rows 2e3)
    else
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
        nvcc --version | tail -2
    fi
    export -f wheels build sanitize
    export PYTHON OUT SDW_WHEELS device packages
    [ -z "$SDW_WHEELS" ] || stage "wheels" 60 bash -c wheels
    stage "build" 240 bash -c build
    stage "tests" 150 "$PYTHON" -m pytest -q --maxfail=10 -p no:cacheprovider tests/cuda tests/ops \
        -k "cuda and not emulated"
    stage "every op once" 60 "$PYTHON" -m benchmarks.gpu touch --out "$OUT" --device "$device"
    stage "ops" 150 "$PYTHON" -m benchmarks.gpu ops --out "$OUT" --device "$device"
    stage "knn" 90 "$PYTHON" -m benchmarks.bench_knn surface:11 surface:17 "${knn[@]}" --out "$OUT"
    stage "distill" 120 "$PYTHON" -m benchmarks.gpu distill --out "$OUT" --device "$device"
    if [ "$device" = cuda ]; then
        stage "knn, 10,000,000 rows" 90 "$PYTHON" -m benchmarks.bench_knn surface:17 --device cuda --rows 1e7 \
            --verify 20000 --out "$OUT"
        stage "memcheck" 90 bash -c 'sanitize memcheck'
        stage "racecheck" 90 bash -c 'sanitize racecheck'
    fi
    printf '\n== summary\n'
    "$PYTHON" -m benchmarks.gpu summary --out "$OUT" --device "$device" --since "$began"
    printf '\n%s s in all; ' "$SECONDS"
    if [ ${#failed[@]} -gt 0 ]; then
        (IFS=,; echo "FAILED: ${failed[*]}")
        return 1
    fi
    [ "$device" = cuda ] || { echo "NO GPU"; return 3; }
    echo "every stage passed"
}

check 2>&1 | tee "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
