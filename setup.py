"""The native decode engine, an optional extension: without a C++ compiler the install succeeds without it."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("sparsecli/decode/native")


class BuildNative(build_ext):
    """A plain shared library with a C interface, which ctypes loads."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        if not self.inplace:  # what an earlier build left would hide that there is no compiler now
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        return []  # no module initialisation: Python never imports it


class AnyPythonWheel(bdist_wheel):
    """One wheel for all versions of Python: the library has no Python in it."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            "sparsecli.decode.native._native",
            sources=[str(path) for path in sorted(SOURCES.rglob("*.cpp")) if path.parent.name != "tests"],
            depends=[str(path) for pattern in ("*.h", "*.inl") for path in sorted(SOURCES.rglob(pattern))],
            include_dirs=[str(SOURCES)],
            # Instruction sets are chosen at run time: nothing here depends on the machine that builds.
            extra_compile_args=["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-w"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
)
