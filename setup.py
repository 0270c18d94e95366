"""Builds the compiled core with CMake. Needs pybind11 and cmake (pip brings both) and a C++17 compiler; never torch.

CMAKE_ARGS, CMAKE_GENERATOR, CMAKE_BUILD_PARALLEL_LEVEL and CUDAARCHS are CMake's own. SDW_CUDA: 1, 0 or auto.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# CMake reads them in the first configuration of a folder, and never again.
READ_ONCE = ["CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAARCHS", "CMAKE_ARGS", "CMAKE_GENERATOR"]
NINJA = shutil.which("ninja") if sys.platform != "win32" else None  # there Visual Studio is asked for Clang


def require_compiler() -> None:
    """Ends the installation with one readable sentence where there is no C++ compiler, or no CMake."""
    wanted = os.environ.get("CXX")
    candidates = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    if sys.platform != "win32" and not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            f"sdw_fast compiles C++ and found no compiler (looked for {', '.join(candidates)}). Install one and run "
            "the command again: `apt-get install g++ make` on Debian and Ubuntu, `dnf install gcc-c++ make` on Fedora, "
            "`xcode-select --install` on macOS, or `conda install -c conda-forge cxx-compiler make`."
        )
    if not shutil.which("cmake"):
        raise SystemExit("sdw_fast is built by CMake, and there is none: pip install cmake")


def require_writable() -> None:
    """Ends the installation with one readable sentence where nothing can be built: setuptools, too, writes here."""
    if not os.access(ROOT, os.W_OK):
        raise SystemExit(f"sdw_fast is built in its source folder, and {ROOT} is read-only: install from a copy of it.")


def build_folder(*kind: str) -> Path:
    """One for each Python, kept, so that a second build compiles what changed; fresh where CMake would not notice."""
    folder = ROOT / "build" / "-".join(["cmake", sys.implementation.cache_tag, *kind])
    settings = "\n".join([str(ROOT), str(NINJA), *(f"{name}={os.environ.get(name, '')}" for name in READ_ONCE)])
    stamp = folder / "settings"
    if not stamp.exists() or stamp.read_text() != settings:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(settings)
    return folder


class CMakeBuild(build_ext):
    """Runs CMake for the one extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: importable only once the build has begun

        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize = os.environ.get("SDW_SANITIZE", "")
        build_type = os.environ.get("SDW_BUILD_TYPE", "Release")
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # The expression keeps generators of several configurations from adding theirs to the path.
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}/$<0:>",
            f"-DSDW_CUDA={os.environ.get('SDW_CUDA', 'auto')}",
            f"-DSDW_SANITIZE={sanitize}",
            f"-DSDW_WERROR={os.environ.get('SDW_WERROR', '0')}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
        ]
        given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **os.environ}
        if NINJA and not any(argument.startswith("-G") for argument in given):
            environment.setdefault("CMAKE_GENERATOR", "Ninja")
        build = build_folder(*filter(None, sanitize.split(",")))
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(build), *arguments, *given],
            ["cmake", "--build", str(build), "--config", build_type],
        ):
            subprocess.run(command, check=True, env=environment)


require_writable()
setup(ext_modules=[Extension("sdw_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
