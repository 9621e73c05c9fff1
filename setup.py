"""Build the native module where that is possible; pyproject.toml holds everything else.

An install never fails because of it. What happened is recorded in `chargpt/_native.json`, which `chargpt info` shows
and `chargpt/kernels/native.py` checks before it loads the module, because pip hides the output of a build.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/bindings.cpp", "csrc/cpu/attention.cpp", "csrc/cpu/cross_entropy.cpp"]
COMPILE_ARGS = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp"]  # OpenMP as torch uses: at::parallel_for is inline
LINK_ARGS = ["-fopenmp"]


class NotBuiltError(Exception):
    """Why there is no native module, as a sentence that ends in what to do."""


class BuildNative(build_ext):
    """Compile `chargpt._native` with torch.utils.cpp_extension, or record why not."""

    def run(self) -> None:
        record = {"python": platform.python_version(), "torch": None, "problem": None}
        package = Path("chargpt") if self.inplace else Path(self.build_lib, "chargpt")
        package.mkdir(parents=True, exist_ok=True)
        try:
            record["torch"] = self.compile()
        except NotBuiltError as problem:
            record["problem"] = str(problem)
            for stale in package.glob("_native.*.so"):
                stale.unlink()
            print(f"chargpt: the native module was not built: {problem}", file=sys.stderr)
        (package / "_native.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def compile(self) -> str:
        """Compile against the torch of this environment and return its version. Raises NotBuiltError."""
        if os.environ.get("CHARGPT_NO_NATIVE", "0") not in ("", "0"):
            raise NotBuiltError("CHARGPT_NO_NATIVE was set during the install; install again without it")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise NotBuiltError("Python.h is missing; get Python's headers (Debian: python3-dev) and install again")
        require_compiler()
        try:
            import torch
            from torch.utils.cpp_extension import BuildExtension, CppExtension
        except (ImportError, OSError) as error:
            raise NotBuiltError(
                f"torch cannot be imported while building ({error}); install torch first, "
                "or install without --no-build-isolation"
            ) from None

        os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))  # ninja's own default is two more than the cores
        macros = [("CHARGPT_TORCH_VERSION", f'"{torch.__version__}"')]
        self.distribution.ext_modules = [
            CppExtension(
                "chargpt._native",
                SOURCES,
                define_macros=macros,
                extra_compile_args=COMPILE_ARGS,
                extra_link_args=LINK_ARGS,
            )
        ]
        command = BuildExtension(self.distribution)
        command.editable_mode, command.inplace = self.editable_mode, self.inplace
        command.force = True  # objects left over from a build against another torch must not be linked again
        command.ensure_finalized()
        try:
            command.run()
        except Exception as error:  # whatever the toolchain raises, the package works without the module
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise NotBuiltError(
                f"compiling failed ({first_line}); install again with `pip install -v` to see the compiler's messages"
            ) from None
        return str(torch.__version__)


def require_compiler() -> None:
    """Raise NotBuiltError unless the C++ compiler that torch.utils.cpp_extension will call can be run."""
    compiler = os.environ.get("CXX", "c++")
    try:
        subprocess.run([*shlex.split(compiler), "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise NotBuiltError(
            f"the C++ compiler {compiler!r} does not run; install one (Debian: g++) or set CXX, then install again"
        ) from None


setup(ext_modules=[Extension("chargpt._native", SOURCES)], cmdclass={"build_ext": BuildNative})
