# SPDX-License-Identifier: Apache-2.0
#
# Not run by this project's CI, only with stand-ins for vcpkg's functions.

# The sources that this port is part of. A copy of the port elsewhere gets them by vcpkg_from_git.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release)  # nothing is compiled

vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DRUNTIME_BRIDGE_BUILD_TESTS=OFF -DRUNTIME_BRIDGE_BUILD_EXAMPLES=OFF)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME runtime_bridge CONFIG_PATH share/cmake/runtime_bridge)
vcpkg_fixup_pkgconfig()

file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
