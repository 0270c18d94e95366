#!/usr/bin/env bash
# What a machine with an NVIDIA GPU can tell, without a network:
#   OUT=folder benchmarks/gpu_check.sh build tests sanitize      three calls of under five minutes each
#   OUT=folder benchmarks/gpu_check.sh ops
#   OUT=folder benchmarks/gpu_check.sh knn distill
#   benchmarks/gpu_check.sh --dry-run                            everything, on the CPU and tiny shapes: it runs, no more
#
# build     the extension, in place, for this GPU; every call begins with it, and keeps what is built already
# tests     the tests that run on a GPU, a process a file, side by side
# sanitize  compute-sanitizer over small shapes: memcheck, synccheck, racecheck
# ops       timings: an outer step first, then every op, ours before its peers
# knn       neighbors of 10^5, 10^6 and 10^7 rows, ours before its peers
# distill   a whole distillation, and its first steps beside the CPU's; returns where MuJoCo is installed
#
# Needs nvcc, CMake, a C++ compiler, and a Python (PYTHON, default python3) with torch (CUDA), pybind11, pytest,
# hypothesis, safetensors and tqdm. JAX, cuVS and KeOps are timed where they are installed. Packages that this Python
# lacks are taken as wheels from the folder SDW_WHEELS; csrc/cuda/README.md has the list that returns need. An extension
# compiled elsewhere for this Python and GPU, in sdw_fast/, is taken as it is with SDW_PREBUILT=1: it spares minutes.
#
# A stage that fails or runs out of its time is reported and the next begins with all of its own; the exit status is then
# 1. $OUT gets log.txt and results.tar.gz, the tables.
set -uo pipefail
ulimit -c 0
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no Python: set PYTHON to one that has torch" >&2; exit 2; }
PATH=$(dirname "$PYTHON"):$PATH:/usr/local/cuda/bin
device=cuda patience=${SDW_PATIENCE:-100} stages=() # percent of every limit
for argument in "$@"; do
    case $argument in
        --dry-run) device=cpu patience=${SDW_PATIENCE:-1000} ;;
        build | tests | sanitize | ops | knn | distill) stages+=("$argument") ;;
        *) echo "unknown stage '$argument': choose of build tests sanitize ops knn distill" >&2; exit 2 ;;
    esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build tests sanitize ops knn distill)
cd "$(dirname "$0")/.." || exit 2
work=$PWD/build/gpu_check
results=$work/results
OUT=${OUT:-$work}
rm -rf "$results" "$work/together" "$work/failed"
mkdir -p "$OUT" "$results" "$work/together" && OUT=$(cd "$OUT" && pwd) || exit 2
SDW_WHEELS=${SDW_WHEELS:+$(cd "$SDW_WHEELS" && pwd)}
packages=$work/packages # wheels unpacked
export PYTHON SDW_WHEELS device work packages
export PYTHONPATH=$PWD:$packages PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export MINARI_DATASETS_PATH=$work/datasets TQDM_MININTERVAL=10
export XLA_PYTHON_CLIENT_PREALLOCATE=false # JAX would take three quarters of the memory

run() { # name, seconds at most, command: an abort lets Python say where it was
    local name=$1 limit=$((($2 * patience + 99) / 100)) began=$SECONDS status
    shift 2
    printf '\n== %s\n' "$name"
    timeout --signal=ABRT --kill-after=5 "$limit" "$@"
    status=$?
    case $status in
        0) echo "-- $name: done in $((SECONDS - began)) s" ;;
        124 | 137) echo "-- $name: FAILED, ran out of its $limit s" ;;
        *) echo "-- $name: FAILED with status $status after $((SECONDS - began)) s" ;;
    esac
    [ "$status" -eq 0 ] || echo "$name" >>"$work/failed"
}

together() { # seconds at most, then name and command, name and command …: side by side, printed one after the other
    local limit=$1 number=0 other
    shift
    while [ $# -gt 0 ]; do
        run "$1" "$limit" bash -c "$2" >"$work/together/$number" 2>&1 &
        number=$((number + 1))
        shift 2
    done
    wait
    for ((other = 0; other < number; other++)); do cat "$work/together/$other"; done
}

python() { # seconds at most, name, module, arguments
    local limit=$1 name=$2
    shift 2
    run "$name" "$limit" "$PYTHON" -m "$@" --out "$results" --device "$device"
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
        )" -DCMAKE_CUDA_FLAGS=--split-compile=0) # the kernels of a file side by side
    fi
    command -v ninja >/dev/null && options+=(-G Ninja)
    cmake -S . -B "$work/$device" -DCMAKE_BUILD_TYPE=Release "${options[@]}" -DPython_EXECUTABLE="$PYTHON" \
        -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/sdw_fast" &&
        cmake --build "$work/$device" --parallel "$(nproc)" &&
        "$PYTHON" -c 'import sdw_fast; sdw_fast.show_config()'
}

tests() { # a file's: none that is emulated, and none that outlasts 30 seconds
    SDW_EMULATOR=0 SDW_TEST_SECONDS=$((30 * patience / 100)) "$PYTHON" -m pytest -v -m gpu --capture=sys --durations=5 \
        -p no:cacheprovider "$1"
    case $? in
        0) ;;
        5) echo "no test in it is for a GPU" ;; # pytest found none
        *) return 1 ;;
    esac
}

touch_ops() { # tool of compute-sanitizer, ops
    local tool=$1 command=("$PYTHON" -m benchmarks.gpu touch "${@:2}" --device "$device")
    if [ "$device" = cuda ]; then
        # Of our kernels only: their mangled names hold their namespace.
        command=(compute-sanitizer --tool "$tool" --kernel-name kns=sdw --error-exitcode 9 --print-limit 20
            "${command[@]}")
    fi
    # Without PyTorch's own allocator, so that every tensor has an end that can be overrun.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}"
}

stage_build() {
    [ -z "$SDW_WHEELS" ] || run "wheels" 30 bash -c wheels
    if [ -n "${SDW_PREBUILT:-}" ]; then
        run "prebuilt" 60 "$PYTHON" -c 'import sdw_fast; sdw_fast.show_config()'
    else
        run "build" 120 bash -c build
    fi
}

stage_tests() {
    local file commands=()
    for file in tests/ops/test_*.py tests/test_density.py tests/test_distiller_gpu.py; do
        commands+=("tests: $file" "tests $file")
    done
    together 90 "${commands[@]}"
}

stage_sanitize() {
    together 90 "memcheck" "touch_ops memcheck" "synccheck" "touch_ops synccheck" "racecheck" "touch_ops racecheck"
}

stage_ops() {
    local table
    python 20 "every op once" benchmarks.gpu touch
    for table in outer_step:30 unrolled_bc:50 behavior_matching:25 behavior_matching_million:25 initialization:20 \
        weighted_bc_loss:40 weighted_bc_loss_16_million:40 ceilings:20; do
        python "${table#*:}" "table: ${table%:*}" benchmarks.gpu table "${table%:*}"
    done
}

stage_knn() {
    local size sizes=(1e6:20 1e5:20 1e7:90) # rows, seconds
    [ "$device" = cuda ] || sizes=(2e3:20)
    for size in "${sizes[@]}"; do
        python "${size#*:}" "neighbors of ${size%:*} rows" benchmarks.bench_knn_gpu surface:17 --rows "${size%:*}" \
            --verify 1000 --peers "torch.cdist + topk" "cuVS brute force" "KeOps argKmin"
    done
}

stage_distill() {
    python 50 "distillation" benchmarks.gpu_distill
    python 90 "distillation of hopper-medium, with returns" benchmarks.gpu_distill --returns
}

check() {
    local began stage
    began=$(date +%s)
    if [ "$device" = cpu ]; then
        echo "DRY RUN on the CPU with tiny shapes; no figure below means anything"
    else
        "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())' || { echo "NO GPU: try --dry-run"; return 3; }
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
        nvcc --version | tail -2
    fi
    stage_build
    for stage in "${stages[@]}"; do
        [ "$stage" = build ] || "stage_$stage"
    done
    printf '\n== summary\n'
    "$PYTHON" -m benchmarks.gpu summary --out "$results" --device "$device" --since "$began"
    printf '\n%s s in all; ' "$SECONDS"
    if [ -s "$work/failed" ]; then
        echo "FAILED: $(paste -sd, "$work/failed")"
        return 1
    fi
    echo "every stage passed"
}

export -f wheels build tests touch_ops
export patience
check 2>&1 | tee "$OUT/log.txt"
status=${PIPESTATUS[0]}
tar -czf "$OUT/results.tar.gz" -C "$results" --exclude=minari .
exit "$status"
