# SPDX-License-Identifier: Apache-2.0
"""Conan 2 recipe: `conan create packaging/conan -s compiler.cppstd=20`.

Not run by this project's CI, only with stand-ins for Conan's functions."""

import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy

required_conan_version = ">=2.0"


class RuntimeBridgeConan(ConanFile):
    name = "runtime_bridge"
    description = "Call asynchronous Asio code from synchronous code"
    license = "Apache-2.0"
    topics = ("asio", "coroutines", "synchronous", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"boost": [True, False]}
    default_options = {"boost": False}
    no_copy_source = True

    @property
    def _repository(self):
        return os.path.join(self.recipe_folder, "..", "..")

    def set_version(self):
        with open(os.path.join(self._repository, "include", "runtime_bridge.hpp"), encoding="utf-8") as header:
            numbers = re.findall(r"^#define RUNTIME_BRIDGE_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read(), re.M)
        self.version = ".".join(numbers)

    def export_sources(self):
        copy(self, "LICENSE", self._repository, self.export_sources_folder)
        copy(self, "include/*.hpp", self._repository, self.export_sources_folder)

    def requirements(self):
        if self.options.boost:
            self.requires("boost/[>=1.81.0]", transitive_headers=True)
        else:
            self.requires("asio/[>=1.22.1]", transitive_headers=True)
        # The header uses std::expected instead where there is one.
        self.requires("tl-expected/[>=1.0.0 <2]", transitive_headers=True)

    def package_id(self):
        self.info.clear()

    def validate(self):
        check_min_cppstd(self, 20)

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        copy(self, "include/*.hpp", self.source_folder, self.package_folder)

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "runtime_bridge")
        if self.options.boost:
            self.cpp_info.set_property("cmake_target_name", "runtime_bridge::boost")
            self.cpp_info.set_property("pkg_config_name", "runtime_bridge-boost")
            self.cpp_info.defines = ["RUNTIME_BRIDGE_USE_BOOST_ASIO"]
            self.cpp_info.requires = ["boost::headers", "tl-expected::tl-expected"]
        else:
            self.cpp_info.set_property("cmake_target_name", "runtime_bridge::runtime_bridge")
            self.cpp_info.set_property("pkg_config_name", "runtime_bridge")
        if self.settings.os in ["Linux", "FreeBSD"]:
            self.cpp_info.system_libs = ["pthread"]
