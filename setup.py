"""Build the native modules where that is possible; pyproject.toml holds everything else.

There are two: `chargpt._native` with the C++ kernels, and `chargpt._native_cuda` with the CUDA kernels where torch is a
build with CUDA and nvcc is here; no GPU is needed for that. An install never fails because of them, and neither's
failure harms the other. What happened is recorded in `chargpt/_native.json`, which `chargpt info` shows and
`chargpt/kernels/native.py` checks before it loads a module, because pip hides the output of a build.
"""

import glob
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BINDINGS_CUDA = "csrc/bindings/cuda.cpp"
SOURCES = sorted({*glob.glob("csrc/bindings/*.cpp"), *glob.glob("csrc/cpu/*.cpp")} - {BINDINGS_CUDA})
# As torch uses it: at::parallel_for is inline. Apple's compiler has none; there each kernel runs on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
COMPILE_ARGS = ["-O3", "-g0", "-fvisibility=hidden", *OPENMP]
LINK_ARGS = OPENMP

CUDA_SOURCES = [BINDINGS_CUDA, *sorted(glob.glob("csrc/cuda/*.cu"))]
CUDA_COMPILE_ARGS = {
    "cxx": ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden"],
    "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"],
}
ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise; newer GPUs compile the PTX
JOB_BYTES = 3 << 30  # memory that one compiler may come to need


class NotBuiltError(Exception):
    """Why a native module was not built, as a sentence that ends in what to do."""


class BuildNative(build_ext):
    """Compile the native modules with torch.utils.cpp_extension, or record why not."""

    def run(self) -> None:
        package = Path("chargpt") if self.inplace else Path(self.build_lib, "chargpt")
        package.mkdir(parents=True, exist_ok=True)
        record: dict[str, str | None] = {"python": platform.python_version(), "torch": None, "cuda": None}
        record["sources"] = runpy.run_path("chargpt/kernels/sources.py")["digest"](Path("csrc"))
        try:
            record["torch"] = require_torch()
        except NotBuiltError as problem:
            record["problem"] = record["cuda_problem"] = self.give_up("native modules were", problem, package)
        else:
            _, record["problem"] = self.attempt("native module was", self.compile_cpp, package, "_native.*.so")
            record["cuda"], record["cuda_problem"] = self.attempt(
                "CUDA kernels were", self.compile_cuda, package, "_native_cuda.*.so"
            )
        (package / "_native.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def attempt(
        self, what: str, compile_it: Callable[[], str | None], package: Path, modules: str
    ) -> tuple[str | None, str | None]:
        """What `compile_it` returns, or why it failed."""
        try:
            return compile_it(), None
        except NotBuiltError as problem:
            return None, self.give_up(what, problem, package, modules)

    def give_up(self, what: str, problem: NotBuiltError, package: Path, modules: str = "_native*.so") -> str:
        """Say so, and remove what an earlier build left."""
        for module in package.glob(modules):
            module.unlink()
        print(f"chargpt: the {what} not built: {problem}", file=sys.stderr)
        return str(problem)

    def compile_cpp(self) -> None:
        """Compile the C++ kernels against the torch of this environment."""
        import torch
        from torch.utils.cpp_extension import CppExtension

        self.compile(
            CppExtension(
                "chargpt._native",
                SOURCES,
                define_macros=[("CHARGPT_TORCH_VERSION", f'"{torch.__version__}"')],
                extra_compile_args=COMPILE_ARGS,
                extra_link_args=LINK_ARGS,
            )
        )

    def compile_cuda(self) -> str:
        """Compile the CUDA kernels and return the version of CUDA and the architectures that it was done for."""
        import torch
        from torch.utils import cpp_extension

        version, cpp_extension.CUDA_HOME = require_toolkit(str(torch.__version__), torch.version.cuda)
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)  # torch's default asks the GPU
        self.compile(
            cpp_extension.CUDAExtension(
                "chargpt._native_cuda",
                CUDA_SOURCES,
                extra_compile_args=CUDA_COMPILE_ARGS,
            )
        )
        return f"{version} for {architectures}"

    def compile(self, extension: Extension) -> None:
        from torch.utils.cpp_extension import BuildExtension

        # ninja's own default is two more than the cores, however little memory there is
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        os.environ.setdefault("MAX_JOBS", str(jobs(os.cpu_count() or 1, memory)))
        self.distribution.ext_modules = [extension]
        command = BuildExtension(self.distribution)
        command.editable_mode, command.inplace = self.editable_mode, self.inplace
        command.build_lib, command.build_temp = self.build_lib, self.build_temp
        command.force = True  # objects left over from a build against another torch must not be linked again
        command.ensure_finalized()
        try:
            command.run()
        except Exception as error:  # whatever the toolchain raises, the package works without the module
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise NotBuiltError(
                f"compiling failed ({first_line}); install again with `pip install -v` to see the compiler's messages"
            ) from None


def require_torch() -> str:
    """The version of the torch to compile against. Raises NotBuiltError where nothing can or shall be compiled."""
    if os.environ.get("CHARGPT_NO_NATIVE", "0") not in ("", "0"):
        raise NotBuiltError("CHARGPT_NO_NATIVE was set during the install; install again without it")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise NotBuiltError("Python.h is missing; get Python's headers (Debian: python3-dev) and install again")
    require_compiler()
    try:
        import torch
        import torch.utils.cpp_extension
    except (ImportError, OSError) as error:
        raise NotBuiltError(
            f"torch cannot be imported while building ({error}); install torch first, "
            "or install without --no-build-isolation"
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


def require_toolkit(torch_version: str, torch_cuda: str | None) -> tuple[str, str]:
    """The version and the folder of a CUDA toolkit that fits this torch. Raises NotBuiltError where there is none.

    torch_cuda: the version of CUDA that torch was built with; None: without
    """
    if torch_cuda is None:
        raise NotBuiltError(f"torch {torch_version} is a build without CUDA; install one with CUDA, then install again")
    advice = f"install the CUDA toolkit {torch_cuda} or set CUDA_HOME to it, then install again"
    try:
        version, home = find_toolkit()
    except (OSError, subprocess.CalledProcessError):
        raise NotBuiltError(f"no nvcc was found that runs; {advice}") from None
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise NotBuiltError(
            f"nvcc is of CUDA {version}, but torch {torch_version} was built with CUDA {torch_cuda}; {advice}"
        )
    return version, home


def find_toolkit() -> tuple[str, str]:
    """The version and the folder of the CUDA toolkit here. Raises OSError or CalledProcessError where none answers.

    nvcc itself is asked, because the one on the PATH may be a script or a link with no headers and libraries around it.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    plan = ["--dryrun", "-x", "cu", os.devnull]  # how it would compile an empty file
    said = [subprocess.run([nvcc, *x], check=True, capture_output=True, text=True) for x in (["--version"], plan)]
    version = re.search(r"release (\d+\.\d+)", said[0].stdout)
    folder = re.search(r"_HERE_=(.+)", said[1].stderr)
    if version is None or folder is None:
        raise OSError(f"{nvcc} does not answer as nvcc does")
    return version[1], str(Path(folder[1]).parent)


def jobs(cores: int, memory: int) -> int:
    """How many files to compile at a time: what the cores and the memory, in bytes, are good for."""
    return max(1, min(cores, memory // JOB_BYTES))


if __name__ == "__main__":
    setup(ext_modules=[Extension("chargpt._native", SOURCES)], cmdclass={"build_ext": BuildNative})
