# SPDX-License-Identifier: Apache-2.0
#
# Runs one CASE, with the arguments that CMakeLists.txt gives: cmake -DCASE=... -D... -P run.cmake

cmake_policy(VERSION 3.21)

set(here ${REPOSITORY}/tests/consumers)
set(work ${WORK}/${CASE})
set(prefix ${WORK}/install)
file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})

set(config "")
if(CONFIG)
  set(config --config ${CONFIG})
endif()
separate_arguments(flags UNIX_COMMAND "${FLAGS}")
set(dependency_includes "")
foreach(dir IN LISTS ASIO BOOST EXPECTED)
  if(NOT dir STREQUAL "/usr/include")  # with -isystem, #include_next would not find its headers
    list(APPEND dependency_includes -isystem ${dir})
  endif()
endforeach()
set(includes -I${REPOSITORY}/include ${dependency_includes})

# Runs a command, which must succeed without a warning. Sets `output` to its output on one line.
function(run)
  execute_process(COMMAND ${ARGV} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
  list(JOIN ARGV " " command)
  message("$ ${command}\n${output}")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "failed: ${result}")
  elseif(output MATCHES "warning:|WARNING:|CMake [A-Za-z ]*Warning")
    message(FATAL_ERROR "succeeded with a warning")
  endif()
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  set(output "${output}" PARENT_SCOPE)
endfunction()

# Configures the project in `folder`; the rest are arguments for cmake.
function(configure_command folder)
  set(command ${CMAKE_COMMAND} -S ${here}/${folder} -B ${work} -G ${GENERATOR} --no-warn-unused-cli
    -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_FLAGS=${FLAGS}
    -DCMAKE_BUILD_TYPE=${CONFIG} -DCMAKE_RUNTIME_OUTPUT_DIRECTORY=$<1:${work}>
    -DVERSION=${VERSION} -DLIBRARY=runtime_bridge::runtime_bridge -DCMAKE_PREFIX_PATH=${prefix} ${ARGN})
  if(STANDARD AND NOT ARGN MATCHES "CMAKE_CXX_STANDARD")
    list(APPEND command -DCMAKE_CXX_STANDARD=${STANDARD})
  endif()
  set(command ${command} PARENT_SCOPE)
endfunction()

function(consume folder)
  configure_command(${folder} ${ARGN})
  run(${command})
  run(${CMAKE_COMMAND} --build ${work} ${config})
  run(${work}/consumer)
endfunction()

# The command must fail, with a message that matches each of the regular expressions after REASON.
function(fail)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "REASON")
  execute_process(COMMAND ${arg_UNPARSED_ARGUMENTS} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
  message("${output}")
  if(result EQUAL 0)
    message(FATAL_ERROR "${CASE} was not refused")
  endif()
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  foreach(reason IN LISTS arg_REASON)
    if(NOT output MATCHES "${reason}")
      message(FATAL_ERROR "the reason does not say: ${reason}")
    endif()
  endforeach()
endfunction()

# The project must be rejected; the rest are arguments for cmake and the REASON.
function(refuse folder)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "REASON")
  configure_command(${folder} ${arg_UNPARSED_ARGUMENTS})
  fail(${command} REASON ${arg_REASON})
endfunction()

# An installed tree must have all headers, and no others.
function(check_headers folder)
  file(GLOB_RECURSE expected RELATIVE ${REPOSITORY}/include ${REPOSITORY}/include/*.hpp)
  file(GLOB_RECURSE installed RELATIVE ${folder} ${folder}/*)
  if(NOT installed STREQUAL expected)
    message(FATAL_ERROR "${folder} has: ${installed}\nexpected: ${expected}")
  endif()
endfunction()

# Builds and runs the consumer with Meson; the rest are arguments for `meson setup`.
function(consume_with_meson)
  file(COPY ${here}/main.cpp ${here}/meson DESTINATION ${work})
  file(CREATE_LINK ${REPOSITORY} ${work}/meson/subprojects/runtime_bridge SYMBOLIC)
  if(STANDARD)
    list(APPEND ARGN -Dcpp_std=c++${STANDARD})
  endif()
  run(${MESON} setup ${work}/build ${work}/meson -Dversion=${VERSION} ${ARGN})
  run(${MESON} compile -C ${work}/build)
  run(${work}/build/consumer)
endfunction()

# Compiles `sources` without any build system and runs the result; the rest are flags.
function(compile sources)
  run(${COMPILER} ${STANDARD_FLAG} ${flags} ${sources} ${ARGN} -o ${work}/consumer)
  run(${work}/consumer)
endfunction()

# The consumers use the dependencies that this project found.
set(dependencies "")
foreach(name IN ITEMS ASIO BOOST EXPECTED)
  if(${name})
    list(GET ${name} 0 ${name})
    list(APPEND dependencies -DRUNTIME_BRIDGE_${name}_INCLUDE_DIR=${${name}})
  endif()
endforeach()
set(boost -DRUNTIME_BRIDGE_COMPONENTS=boost -DCOMPONENTS=boost -DLIBRARY=runtime_bridge::boost)
# As on a machine that has no dependencies installed.
set(bare -DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF -DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF
  -DCMAKE_FIND_USE_CMAKE_ENVIRONMENT_PATH=OFF -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF)
set(ways_out_boost
  "needs Boost 1\\.81 or newer" "apt install libboost-dev" "a target Boost::headers" "-DRUNTIME_BRIDGE_BOOST_INCLUDE_DIR=")
set(ways_out_asio
  "needs standalone Asio 1\\.22\\.1 or newer" "apt install libasio-dev" "a target asio::asio"
  "-DRUNTIME_BRIDGE_ASIO_INCLUDE_DIR=" "-DRUNTIME_BRIDGE_FETCH_DEPENDENCIES=ON")

# Meson takes the compiler and its flags from the environment.
if(CASE MATCHES "meson")
  if(NOT MESON)
    message("skipped: there is no meson")
    return()
  endif()
  list(JOIN dependency_includes " " folders)
  set(ENV{CXX} ${COMPILER})
  set(ENV{CXXFLAGS} "${FLAGS} ${folders}")
  if(BOOST)
    cmake_path(GET BOOST PARENT_PATH folder)
    set(ENV{BOOST_ROOT} ${folder})
  endif()
endif()

if(CASE STREQUAL "add_subdirectory" OR CASE STREQUAL "fetch_content")
  consume(${CASE} ${dependencies})
  run(${CMAKE_COMMAND} --install ${work} ${config} --prefix ${work}/installed)
  if(EXISTS ${work}/installed)
    message(FATAL_ERROR "the library was installed along with a project that did not ask for it")
  endif()

elseif(CASE STREQUAL "own_targets")
  if(NOT ASIO OR NOT EXPECTED)
    message("skipped: the folders of Asio and tl::expected are not known")
    return()
  endif()
  consume(own_targets ${bare} -DOWN_ASIO=${ASIO} -DOWN_EXPECTED=${EXPECTED})

elseif(CASE STREQUAL "fetched")
  if(NOT ASIO OR NOT EXPECTED)
    message("skipped: the folders of Asio and tl::expected are not known")
    return()
  endif()
  # What a download would bring, with the folders of the two repositories.
  file(MAKE_DIRECTORY ${work}/asio/asio/include ${work}/expected/include)
  file(CREATE_LINK ${ASIO}/asio ${work}/asio/asio/include/asio SYMBOLIC)
  file(CREATE_LINK ${ASIO}/asio.hpp ${work}/asio/asio/include/asio.hpp SYMBOLIC)
  file(CREATE_LINK ${EXPECTED}/tl ${work}/expected/include/tl SYMBOLIC)
  consume(add_subdirectory ${bare} -DRUNTIME_BRIDGE_FETCH_DEPENDENCIES=ON
    -DFETCHCONTENT_SOURCE_DIR_ASIO=${work}/asio -DFETCHCONTENT_SOURCE_DIR_TL-EXPECTED=${work}/expected)

elseif(CASE STREQUAL "plain")
  compile(${here}/main.cpp ${includes} -pthread)

elseif(CASE STREQUAL "two_units")
  compile("${here}/two_units/main.cpp;${here}/two_units/other.cpp" ${includes} -pthread)

elseif(CASE STREQUAL "separate_compilation")
  set(units ${here}/two_units/main.cpp ${here}/two_units/other.cpp)
  list(APPEND includes -DRUNTIME_BRIDGE_SEPARATE_COMPILATION)
  compile("${units};${here}/separate_compilation.cpp" ${includes} -pthread)
  # Without the file that includes src.hpp, the linker says what is missing.
  execute_process(COMMAND ${COMPILER} ${STANDARD_FLAG} ${flags} ${units} ${includes} -pthread -o ${work}/incomplete
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
  if(result EQUAL 0 OR NOT output MATCHES "undefined (reference|symbol).*runtime_bridge")
    message(FATAL_ERROR "the units do not need what is compiled separately: ${output}")
  endif()

elseif(CASE STREQUAL "missing_asio")
  refuse(add_subdirectory ${bare} REASON "it was not found" ${ways_out_asio})

elseif(CASE STREQUAL "old_asio")
  file(WRITE ${work}/old/asio/version.hpp "#define ASIO_VERSION 101800\n")
  refuse(add_subdirectory -DRUNTIME_BRIDGE_ASIO_INCLUDE_DIR=${work}/old
    REASON "too old" "101800" ${ways_out_asio})

elseif(CASE STREQUAL "missing_expected")
  refuse(add_subdirectory ${bare} -DRUNTIME_BRIDGE_ASIO_INCLUDE_DIR=${ASIO} -DCMAKE_CXX_STANDARD=20
    REASON "needs tl::expected" "it was not found" "apt install libexpected-dev" "a target tl::expected"
    "-DRUNTIME_BRIDGE_EXPECTED_INCLUDE_DIR=" "-DRUNTIME_BRIDGE_FETCH_DEPENDENCIES=ON" "-DCMAKE_CXX_STANDARD=23")

elseif(CASE STREQUAL "std_expected")
  consume(add_subdirectory ${bare} -DRUNTIME_BRIDGE_ASIO_INCLUDE_DIR=${ASIO} -DCMAKE_CXX_STANDARD=23)

elseif(CASE STREQUAL "components")
  refuse(add_subdirectory -DRUNTIME_BRIDGE_COMPONENTS=curl
    REASON "has no component \"curl\"" "components are: asio, boost")

elseif(CASE STREQUAL "boost_add_subdirectory")
  consume(add_subdirectory ${bare} ${dependencies} ${boost})

elseif(CASE STREQUAL "boost_fetch_content")
  consume(fetch_content ${bare} ${dependencies} ${boost})

elseif(CASE STREQUAL "boost_own_targets")
  if(NOT BOOST OR NOT EXPECTED)
    message("skipped: the folders of Boost and tl::expected are not known")
    return()
  endif()
  consume(own_targets ${bare} ${boost} -DOWN_BOOST=${BOOST} -DOWN_EXPECTED=${EXPECTED})

elseif(CASE STREQUAL "boost_plain")
  compile(${here}/main.cpp ${includes} -DRUNTIME_BRIDGE_USE_BOOST_ASIO -pthread)

elseif(CASE STREQUAL "missing_boost")
  refuse(add_subdirectory ${bare} ${boost} REASON "it was not found" ${ways_out_boost})

elseif(CASE STREQUAL "old_boost")
  file(WRITE ${work}/old/boost/version.hpp "#define BOOST_VERSION 107400\n")
  refuse(add_subdirectory ${boost} -DRUNTIME_BRIDGE_BOOST_INCLUDE_DIR=${work}/old
    REASON "too old" "BOOST_VERSION 107400" ${ways_out_boost})

elseif(CASE MATCHES "^two_flavours")
  set(units ${here}/two_flavours/main.cpp ${here}/two_flavours/boost.cpp)
  if(CASE STREQUAL "two_flavours_separately")
    list(APPEND units ${here}/separate_compilation.cpp ${here}/two_flavours/separate_compilation.cpp)
    list(APPEND includes -DRUNTIME_BRIDGE_SEPARATE_COMPILATION)
  elseif(COMPILER_ID STREQUAL "GNU")
    list(APPEND includes -flto -flto-partition=one -Wodr)  # warns of a class that differs between the two files
  endif()
  compile("${units}" ${includes} -pthread)

elseif(CASE STREQUAL "install")
  file(REMOVE_RECURSE ${prefix})
  run(${CMAKE_COMMAND} --install ${BUILD} ${config} --prefix ${prefix})
  check_headers(${prefix}/include)

elseif(CASE STREQUAL "find_package")
  consume(find_package ${dependencies})

elseif(CASE STREQUAL "wrong_version")
  refuse(find_package ${dependencies} -DVERSION=99.0
    REASON "compatible with requested version \"99\\.0\"" "considered but not accepted" "version: ${VERSION}")

elseif(CASE STREQUAL "installed_missing_asio")
  refuse(find_package ${bare}
    REASON "set runtime_bridge_FOUND to FALSE" "Reason given by package" "it was not found" ${ways_out_asio})

elseif(CASE STREQUAL "boost_find_package")
  consume(find_package ${bare} ${dependencies} ${boost})

elseif(CASE STREQUAL "both_components")
  consume(find_package ${dependencies} "-DCOMPONENTS=asio boost")

elseif(CASE STREQUAL "installed_missing_boost")
  refuse(find_package ${bare} ${boost}
    REASON "set runtime_bridge_FOUND to FALSE" "Reason given by package" "it was not found" ${ways_out_boost})

elseif(CASE MATCHES "pkg_config$")
  set(package runtime_bridge)
  if(CASE STREQUAL "boost_pkg_config")
    set(package runtime_bridge-boost)
  endif()
  if(NOT PKG_CONFIG)
    message("skipped: there is no pkg-config")
    return()
  endif()
  set(ENV{PKG_CONFIG_PATH} ${prefix}/share/pkgconfig)
  run(${PKG_CONFIG} --exact-version=${VERSION} ${package})
  run(${PKG_CONFIG} --cflags --libs ${package})
  separate_arguments(output UNIX_COMMAND "${output}")
  compile(${here}/main.cpp ${output} ${dependency_includes})

elseif(CASE STREQUAL "meson")
  consume_with_meson(--wrap-mode=forcefallback)
  run(${MESON} install -C ${work}/build --destdir ${work}/installed)
  if(EXISTS ${work}/installed)
    message(FATAL_ERROR "the library was installed along with a project that did not ask for it")
  endif()

elseif(CASE STREQUAL "boost_meson")
  consume_with_meson(--wrap-mode=forcefallback -Dlibrary=runtime_bridge-boost
    -Druntime_bridge:asio=disabled -Druntime_bridge:boost=enabled)
  # Without this the program would be compiled with the other Asio, if the system has it.
  file(READ ${work}/build/compile_commands.json commands)
  if(NOT commands MATCHES "-DRUNTIME_BRIDGE_USE_BOOST_ASIO")
    message(FATAL_ERROR "the dependency does not choose Boost.Asio")
  endif()

elseif(CASE STREQUAL "meson_install")
  run(${MESON} setup ${work}/library ${REPOSITORY} --prefix=${work}/installed)
  run(${MESON} install -C ${work}/library)
  check_headers(${work}/installed/include)
  set(ENV{PKG_CONFIG_PATH} ${work}/installed/share/pkgconfig)
  if(PKG_CONFIG)
    run(${PKG_CONFIG} --cflags runtime_bridge-boost)
    if(NOT output MATCHES "-DRUNTIME_BRIDGE_USE_BOOST_ASIO")
      message(FATAL_ERROR "runtime_bridge-boost.pc does not choose Boost.Asio")
    endif()
  endif()
  consume_with_meson(--wrap-mode=nofallback)

elseif(CASE STREQUAL "meson_missing")
  # As on a machine that has no headers installed.
  set(ENV{CXXFLAGS} -nostdinc)
  set(ENV{BOOST_ROOT} ${work}/boost)
  fail(${MESON} setup ${work}/library ${REPOSITORY} -Dboost=enabled
    REASON "needs standalone Asio 1\\.22\\.1 or newer, and it was not found" "apt install libasio-dev"
    "meson wrap install asio" "-Druntime_bridge:asio=disabled" "needs Boost 1\\.81 or newer" "apt install libboost-dev"
    "needs tl::expected" "apt install libexpected-dev")

elseif(CASE STREQUAL "meson_old_asio")
  file(WRITE ${work}/old/asio/version.hpp "#define ASIO_VERSION 101800\n")
  set(ENV{CXXFLAGS} "-I${work}/old $ENV{CXXFLAGS}")
  fail(${MESON} setup ${work}/library ${REPOSITORY} REASON "too old" "101800" "apt install libasio-dev")

elseif(CASE STREQUAL "deb")
  if(NOT DPKG_DEB)
    message("skipped: there is no dpkg-deb")
    return()
  endif()
  configure_command(../.. -DRUNTIME_BRIDGE_BUILD_TESTS=OFF -DRUNTIME_BRIDGE_BUILD_EXAMPLES=OFF ${dependencies})
  list(TRANSFORM command REPLACE "^${work}$" ${work}/library)
  run(${command})
  run(${CMAKE_CPACK_COMMAND} -G DEB --config ${work}/library/CPackConfig.cmake -B ${work})
  set(deb ${work}/libruntime-bridge-dev_${VERSION}_all.deb)
  run(${DPKG_DEB} --info ${deb})
  foreach(field IN ITEMS "Package: libruntime-bridge-dev" "Version: ${VERSION}" "Architecture: all" "Section: libdevel"
      "Depends: libasio-dev \\(>= 1:1\\.22\\.1\\)" "Recommends: libexpected-dev" "Suggests: libboost-dev \\(>= 1\\.81\\)"
      "Maintainer: [^ ]" "Description: Call asynchronous Asio code from synchronous code")
    if(NOT output MATCHES " ${field}")
      message(FATAL_ERROR "the package does not say: ${field}")
    endif()
  endforeach()
  set(root ${work}/root)
  run(${DPKG_DEB} --extract ${deb} ${root})
  check_headers(${root}/usr/include)
  file(GLOB_RECURSE others RELATIVE ${root} ${root}/*)
  list(FILTER others EXCLUDE REGEX
    "^usr/include/|^usr/share/(cmake/runtime_bridge|pkgconfig)/|^usr/share/doc/libruntime-bridge-dev/copyright$")
  if(others OR NOT EXISTS ${root}/usr/share/doc/libruntime-bridge-dev/copyright)
    message(FATAL_ERROR "the package has other files, or no license: ${others}")
  endif()
  set(prefix ${root}/usr)
  consume(find_package ${dependencies})
  if(PKG_CONFIG)
    set(ENV{PKG_CONFIG_PATH} ${root}/usr/share/pkgconfig)
    run(${PKG_CONFIG} --cflags runtime_bridge)
    separate_arguments(output UNIX_COMMAND "${output}")
    run(${COMPILER} ${STANDARD_FLAG} ${flags} -E ${here}/main.cpp ${output} ${dependency_includes} -o ${work}/preprocessed)
  else()
    message("skipped: there is no pkg-config; all else is right")
  endif()

elseif(CASE STREQUAL "pages")
  include(${here}/pages.cmake)

elseif(CASE STREQUAL "packaging")
  include(${here}/packaging.cmake)

else()
  message(FATAL_ERROR "no such case: ${CASE}")
endif()
