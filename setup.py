"""Builds the compiled core with CMake. Needs pybind11 and cmake (pip brings both) and a C++17 compiler; never torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def require_compiler() -> None:
    """Ends the installation with one readable sentence where there is no C++ compiler."""
    wanted = os.environ.get("CXX")
    candidates = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            f"sdw_fast compiles C++ and found no compiler (looked for {', '.join(candidates)}). Install one and run "
            "the command again: `apt-get install g++ make` on Debian and Ubuntu, `dnf install gcc-c++ make` on Fedora, "
            "`xcode-select --install` on macOS, or `conda install -c conda-forge cxx-compiler make`."
        )


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; keeps the build tree, so that a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: importable only once the build has begun

        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize = os.environ.get("SDW_SANITIZE", "")
        build = ROOT / "build" / "-".join(filter(None, ["cmake", sys.implementation.cache_tag, *sanitize.split(",")]))
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DSDW_CUDA={os.environ.get('SDW_CUDA', 'auto')}",
            f"-DSDW_SANITIZE={sanitize}",
            f"-DSDW_WERROR={os.environ.get('SDW_WERROR', '0')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('SDW_BUILD_TYPE', 'Release')}",
        ]
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("sdw_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
