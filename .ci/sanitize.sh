#!/usr/bin/env bash
# Builds the compiled core with sanitizers and runs the kernel tests (tests/ops) and the whole path, from a dataset to a
# cloned policy (tests/faults/test_attacks.py), under them:
#   .ci/sanitize.sh                 address and undefined behavior together, then threads
#   .ci/sanitize.sh thread          one of them ("address" or "thread")
# Each build has its own tree (build/cmake-*) and its own copy of the package (build/sanitize-*): the package in use is
# not touched. PYTHON names an interpreter that has the [dev] extra installed. Needs GCC or Clang on Linux.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
bin=$(cd "$(dirname "$PYTHON")" && pwd)
PYTHON=$bin/$(basename "$PYTHON")
PATH=$bin:$PATH # cmake from the same environment
root=$PWD
library() { "${CXX:-c++}" -print-file-name="$1"; }

# Python's and torch's own leaks are not ours. Reports end the process: a test that goes on could hide them.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# The kernels' threads meet through std::thread and std::atomic, which the thread sanitizer follows. PyTorch is
# not instrumented, so that what its threads hand over is invisible to it: calls out of it are ignored.
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1

run() { # name, -fsanitize= argument, runtime library
    local package=$root/build/sanitize-$1 runtime
    runtime=$(library "$3")
    # -O1, as the manuals of the sanitizers advise: the kernels are too slow without it.
    CXXFLAGS="-O1 ${CXXFLAGS:-}" SDW_CUDA=0 SDW_SANITIZE=$2 SDW_BUILD_TYPE=Debug \
        "$PYTHON" setup.py --quiet build --build-lib "$package"
    # The runtime must come first, before Python itself; libstdc++ with it, so that it finds the real __cxa_throw. The
    # thread sanitizer of older compilers does not know today's address-space randomization: switch it off. pytest must
    # not capture file descriptors, or a report would be lost with the process. Instrumented code is slow: a test may
    # take longer than elsewhere, also in the pytest that one of them starts. SDW_SANITIZE tells the tests, which leave
    # the CUDA emulator out.
    (cd "$package" && env LD_PRELOAD="$runtime $(library libstdc++.so.6)" OMP_NUM_THREADS=2 SDW_SANITIZE=$2 \
        PYTHONPATH="$package:$root" PYTEST_ADDOPTS="--capture=sys --timeout=3600" setarch "$(uname -m)" -R \
        "$PYTHON" -m pytest -q -p no:cacheprovider "$root/tests/ops" "$root/tests/faults/test_attacks.py" \
        -k "not first_trials")
}

[ $# -gt 0 ] || set -- address thread
for sanitizer in "$@"; do
    case $sanitizer in
        address) run address address,undefined libasan.so ;;
        thread) run thread thread libtsan.so ;;
        *) echo "unknown sanitizer '$sanitizer': choose address or thread" >&2; exit 2 ;;
    esac
done
