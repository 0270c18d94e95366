#!/usr/bin/env bash
# The CPU kernels on arm64, from an x86-64 machine with Debian or Ubuntu: compiles the core with a cross compiler and runs
# the kernels' tests (tests/ops) under qemu-user, on the distribution's Python for arm64 and PyPI's wheels. Needs
#   apt-get install g++-aarch64-linux-gnu qemu-user-static
# and a Python that has the [dev] extra (PYTHON); writes into build/arm64 alone. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
PATH=$(dirname "$PYTHON"):$PATH # cmake from the same environment
work=$PWD/build/arm64
system=$work/system site=$work/site package=$work/package
mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$system" "$package"

if [ ! -e "$system/usr/bin/python3" ]; then # by lists of its own: the machine's packages are not touched
    cat >"$work/apt/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "$(id -un)";
Dir::State "$work/apt";
Dir::State::status "/dev/null";
Dir::Cache "$work/apt/cache";
END
    export APT_CONFIG=$work/apt/apt.conf
    apt-get -qq update
    apt-get -qq -y --no-install-recommends --download-only install python3 libpython3-dev libstdc++6
    for file in "$work"/apt/cache/archives/*.deb; do dpkg-deb -x "$file" "$system"; done
fi
version=$(basename "$(readlink "$system/usr/bin/python3")") # python3.11
if [ ! -e "$site/torch" ]; then
    # Without what depends on the machine that pip runs on. 2.9.1: PyPI's later ones for arm64 need CUDA's libraries.
    "$PYTHON" -m pip install --quiet --no-deps --target "$site" --python-version "${version#python}" \
        --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform any \
        torch==2.9.1 filelock typing-extensions sympy mpmath networkx jinja2 MarkupSafe fsspec numpy scipy pybind11 \
        pytest pluggy iniconfig packaging pygments pytest-timeout hypothesis sortedcontainers attrs
fi

cmake -S . -B "$work/core" -DCMAKE_BUILD_TYPE=Release -DSDW_CUDA=0 -DSDW_WERROR="${SDW_WERROR:-1}" \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DCMAKE_STRIP=/usr/bin/aarch64-linux-gnu-strip -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
    -DPython_EXECUTABLE="$PYTHON" -DPython_INCLUDE_DIR="$system/usr/include/$version" -DPYTHON_MODULE_EXTENSION=.so \
    -DCMAKE_CXX_FLAGS="-I$system/usr/include" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package/sdw_fast"
cmake --build "$work/core" -j "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
cp -r sdw_fast/*.py sdw_fast/ops "$package/sdw_fast/"

# The tests of the compiled kernels, as test_isa.py and test_knn.py choose them. Those that start another Python cannot: the
# kernel of this machine does not know what it is.
cd "$work"
env SDW_EMULATOR=0 OMP_NUM_THREADS=2 PYTHONPATH="$package:$site" PYTHONDONTWRITEBYTECODE=1 \
    qemu-aarch64-static -L "$system" "$system/usr/bin/$version" -m pytest -q -p no:cacheprovider --timeout=3600 \
    -k "(compiled or cpu or native) and not (isa or instruction_set or emulated or cuda)" ../../tests/ops "$@"
