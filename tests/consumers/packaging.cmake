# SPDX-License-Identifier: Apache-2.0
#
# The case packaging of run.cmake. Bazel, vcpkg and Conan are not installed here. This checks what can be checked without
# them: versions, also of the inline namespace, and that vcpkg and Conan would package all files.

function(check_version file version)
  if(NOT version STREQUAL VERSION)
    message(FATAL_ERROR "${file} says version \"${version}\", the header says \"${VERSION}\"")
  endif()
endfunction()

# The inline namespace is named after the minor version.
string(REGEX REPLACE "^([0-9]+)\\.([0-9]+)\\..*" "v\\1_\\2" namespace "${VERSION}")
file(GLOB_RECURSE headers ${REPOSITORY}/include/*.hpp)
foreach(header IN LISTS headers)
  file(READ ${header} text)
  if(text MATCHES "\ninline namespace (v[0-9]+_[0-9]+) " AND NOT CMAKE_MATCH_1 STREQUAL namespace)
    message(FATAL_ERROR "${header} has the inline namespace ${CMAKE_MATCH_1}, and not ${namespace}")
  endif()
endforeach()

# The pages
foreach(page README.md packaging/README.md)
  file(READ ${REPOSITORY}/${page} text)
  string(REGEX MATCH "GIT_TAG v([0-9.]+)" _ "${text}")
  check_version(${page} "${CMAKE_MATCH_1}")
endforeach()

# Bazel
file(READ ${REPOSITORY}/MODULE.bazel module)
string(REGEX MATCH "\n    version = \"([^\"]*)\"" _ "${module}")
check_version(MODULE.bazel "${CMAKE_MATCH_1}")
file(READ ${REPOSITORY}/BUILD.bazel build)
if(NOT build MATCHES "hdrs = glob\\(\\[\"include/\\*\\*/\\*\\.hpp\"\\]\\)")
  message(FATAL_ERROR "BUILD.bazel does not take all headers")
endif()

# vcpkg, with stand-ins for its functions
set(port ${REPOSITORY}/packaging/vcpkg/runtime-bridge)
file(READ ${port}/vcpkg.json manifest)
string(JSON version GET "${manifest}" version)
check_version(vcpkg.json "${version}")
string(JSON PORT GET "${manifest}" name)
set(CURRENT_PACKAGES_DIR ${work}/vcpkg)
function(vcpkg_cmake_configure)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "SOURCE_PATH" "OPTIONS")
  run(${CMAKE_COMMAND} -S ${arg_SOURCE_PATH} -B ${work}/build -G ${GENERATOR} --no-warn-unused-cli
    -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_BUILD_TYPE=Release ${arg_OPTIONS} ${dependencies})
endfunction()
function(vcpkg_cmake_install)
  run(${CMAKE_COMMAND} --install ${work}/build --config Release --prefix ${CURRENT_PACKAGES_DIR})
endfunction()
function(vcpkg_cmake_config_fixup)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "PACKAGE_NAME;CONFIG_PATH" "")
  if(NOT EXISTS ${CURRENT_PACKAGES_DIR}/${arg_CONFIG_PATH}/${arg_PACKAGE_NAME}Config.cmake)
    message(FATAL_ERROR "vcpkg would not find the CMake package in ${arg_CONFIG_PATH}")
  endif()
endfunction()
function(vcpkg_fixup_pkgconfig)
endfunction()
function(vcpkg_install_copyright)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "FILE_LIST")
  file(INSTALL ${arg_FILE_LIST} DESTINATION ${CURRENT_PACKAGES_DIR}/share/${PORT} RENAME copyright)
endfunction()
include(${port}/portfile.cmake)
check_headers(${CURRENT_PACKAGES_DIR}/include)

# Conan, the same
if(PYTHON)
  run(${CMAKE_COMMAND} -E env PYTHONDONTWRITEBYTECODE=1
    ${PYTHON} -W error ${here}/conan_recipe.py ${REPOSITORY}/packaging/conan ${work}/conan)
  string(STRIP "${output}" output)
  check_version(conanfile.py "${output}")
  check_headers(${work}/conan/package/include)
  if(NOT EXISTS ${work}/conan/package/licenses/LICENSE)
    message(FATAL_ERROR "the recipe packages no license")
  endif()
else()
  message("skipped: there is no python3 to read Conan's recipe; all else is right")
endif()
