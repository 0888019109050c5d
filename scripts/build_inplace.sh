#!/bin/sh
# Builds the extension into mudsc_fast/ of this checkout, for development without an install.
# Extra arguments go to CMake, for example: scripts/build_inplace.sh -DMUDSC_FAST_CUDA=OFF
set -eu
cd "$(dirname "$0")/.."
mkdir -p build
python="${PYTHON:-python3}"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
generator=Ninja folder=build/inplace
command -v ninja >/dev/null || { generator="Unix Makefiles" && folder=build/inplace-make; }
cmake -S . -B "$folder" -G "$generator" -DSKBUILD_PROJECT_VERSION="$version" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/mudsc_fast" -DMUDSC_FAST_WERROR=ON "$@" >build/inplace.log 2>&1 || {
    cat build/inplace.log
    exit 1
}
cmake --build "$folder" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}"
