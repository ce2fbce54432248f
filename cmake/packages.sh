# SPDX-License-Identifier: Apache-2.0
#
# To be sourced. `need_packages PACKAGE...` makes sure that Debian packages are installed: as root it installs the
# missing ones, otherwise it prints them and fails. On other systems it does nothing, and CMake reports what it does not
# find.

packages_listed=
need_packages() {
  command -v dpkg-query > /dev/null || return 0
  missing=
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null)" = installed ] || missing="$missing $package"
  done
  [ -z "$missing" ] && return 0
  if [ "$(id -u)" != 0 ]; then
    echo "$0: these Debian packages are missing. Install them and run this again:" >&2
    echo "  apt-get install$missing" >&2
    return 1
  fi
  echo "$0: installing$missing"
  # The output is shown only if it fails.
  log=$(mktemp)
  if ! {
    { [ -n "$packages_listed" ] || apt-get update; } &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
  } > "$log" 2>&1; then
    cat "$log" >&2
    rm "$log"
    return 1
  fi
  rm "$log"
  packages_listed=yes
}
