# SPDX-License-Identifier: Apache-2.0
#
# `cpack -G DEB` in the build folder makes a Debian package of the headers.

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME runtime_bridge)
set(CPACK_PACKAGE_CONTACT "The runtime_bridge developers <runtime-bridge@example.invalid>")
set(CPACK_DEBIAN_PACKAGE_NAME libruntime-bridge-dev)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
# Programs that are compiled as C++23 do not need tl::expected.
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libasio-dev (>= 1:1.22.1)")
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS libexpected-dev)
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "libboost-dev (>= 1.81)")
set(CPACK_DEBIAN_PACKAGE_DESCRIPTION "${PROJECT_DESCRIPTION}
 RuntimeBridge runs coroutines and other asynchronous operations of Asio on a
 thread of its own. Any thread can call them and wait for their results, with
 deadlines, cancellation and a shutdown that does not hang.
 .
 The library consists of headers.")

# Debian wants the license under this name. Other installations do not get it: `deb` is not part of all components.
install(FILES LICENSE DESTINATION share/doc/${CPACK_DEBIAN_PACKAGE_NAME} RENAME copyright
  COMPONENT deb EXCLUDE_FROM_ALL)
set(CPACK_INSTALL_CMAKE_PROJECTS
  "${PROJECT_BINARY_DIR};runtime_bridge;ALL;/" "${PROJECT_BINARY_DIR};runtime_bridge;deb;/")

# Otherwise cpack would first build all tests.
set(CMAKE_SKIP_INSTALL_ALL_DEPENDENCY ON)
include(CPack)
