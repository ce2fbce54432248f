# SPDX-License-Identifier: Apache-2.0
#
# To be sourced, with $root set to this repository's folder. Both functions make sure that Debian packages are there. As
# root, they say in one line what they install, and install it. Without root, packages of headers are unpacked into
# build/debian, and one line says what else is missing; then
#
#   need_packages PACKAGE...  fails
#   want_packages PACKAGE...  goes on, and adds it to $without
#
# On other systems they do nothing, and CMake reports what it does not find.

packages_listed='' without='' log_of_download=''

# Sets $missing. A command of the same name will do: npm, for example, need not be Debian's.
find_missing() {
  missing=''
  command -v dpkg-query > /dev/null || return 0
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null)" = installed ] ||
      command -v "$package" > /dev/null || missing="$missing $package"
  done
}

# Installs $missing. The output is shown only if it fails.
install_missing() {
  echo "$0: installing$missing"
  log=$(mktemp)
  if ! {
    { [ -n "$packages_listed" ] || apt-get update; } &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
  } > "$log" 2>&1; then
    cat "$log" >&2
    rm "$log"
    echo "$0: apt-get could not install$missing" >&2
    return 1
  fi
  rm "$log"
  packages_listed=yes
}

# Unpacks those of $missing that are only headers, which needs no root, and leaves the others in $missing. CMake finds
# them by CMAKE_PREFIX_PATH.
unpack_headers() {
  suite=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
  others='' unpacked=''
  for package in $missing; do
    folder=$root/build/debian/$suite/$package
    case $package in
      libasio-dev | libexpected-dev | libcli11-dev | catch2)
        if [ ! -d "$folder" ]; then
          "$root/tests/unpack" "$suite" "$package" > /dev/null 2>&1 && unpacked="$unpacked $package" ||
            log_of_download="; the log of the download is $folder.log"
        fi
        ;;
    esac
    if [ -d "$folder" ]; then
      export CMAKE_PREFIX_PATH="$folder/usr${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}"
    else
      others="$others $package"
    fi
  done
  [ -z "$unpacked" ] || echo "$0: not installed, so unpacked into build/debian:$unpacked"
  missing=$others
}

# Leaves in $missing what cannot be had. Fails if apt-get does.
provide() {
  find_missing "$@"
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" = 0 ]; then
    install_missing && missing=''
  else
    unpack_headers
  fi
}

need_packages() {
  provide "$@" || return 1
  [ -z "$missing" ] ||
    { echo "$0: not installed:$missing; as root: apt-get install$missing$log_of_download" >&2; return 1; }
}

want_packages() {
  provide "$@" || return 1
  [ -z "$missing" ] ||
    echo "$0: not installed, so what needs it is left out:$missing; as root: apt-get install$missing$log_of_download" >&2
  without=$without$missing
}
