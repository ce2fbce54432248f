#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a Conan recipe with stand-ins for Conan's functions: conan_recipe.py <folder of the recipe> <folder to work in>

Exports and packages it there, and prints its version."""

import fnmatch
import pathlib
import runpy
import shutil
import sys
import types


def copy(_, pattern, src, dst):
    """As conan.tools.files.copy: the pattern applies to the path below src."""
    for file in sorted(pathlib.Path(src).rglob("*")):
        path = file.relative_to(src)
        if file.is_file() and fnmatch.fnmatch(str(path), pattern):
            (pathlib.Path(dst) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, pathlib.Path(dst) / path)


def module(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


def main():
    folder, work = map(pathlib.Path, sys.argv[1:])
    module("conan", ConanFile=type("ConanFile", (), {}))
    module("conan.tools")
    module("conan.tools.build", can_run=None, check_min_cppstd=None)
    module("conan.tools.cmake", CMake=None, cmake_layout=None)
    module("conan.tools.files", copy=copy)

    recipe = runpy.run_path(str(folder / "conanfile.py"))["RuntimeBridgeConan"]()
    recipe.recipe_folder = str(folder)
    recipe.set_version()
    recipe.export_sources_folder = recipe.source_folder = str(work / "source")
    recipe.export_sources()
    recipe.package_folder = str(work / "package")
    recipe.package()
    runpy.run_path(str(folder / "test_package" / "conanfile.py"))
    print(recipe.version)


if __name__ == "__main__":
    main()
