#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Tests cmake/packages.sh, with stubs in place of apt-get, dpkg-query, id and tests/unpack.
set -eu
packages=$(cd "$(dirname "$0")/.." && pwd)/cmake/packages.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/bin" "$folder/tests"
export folder

stub() { # PATH SCRIPT
  printf '#!/bin/sh\n%s\n' "$2" > "$folder/$1"
  chmod +x "$folder/$1"
}
stub bin/dpkg-query 'for package; do :; done; [ "$package" != here-dev ] || echo installed'
stub bin/id 'echo "$user"'
stub bin/apt-get 'cp "$folder/output" "$folder/said_before"; echo "apt-get says: $*"; [ "$network" = yes ]'
stub tests/unpack '[ "$network" = yes ] && mkdir -p "$folder/build/debian/$1/$2/usr"'

# Runs the commands, and compares their exit status and what they print.
check() { # USER_ID NETWORK COMMANDS STATUS OUTPUT
  status=0
  user=$1 network=$2 PATH=$folder/bin:$PATH CMAKE_PREFIX_PATH='' \
    sh -c 'set -eu; root=$folder; . "$0"; eval "$1"' "$packages" "$3" > "$folder/output" 2>&1 || status=$?
  sed "s|^$packages: ||; s|$folder|ROOT|g; s|/debian/[a-z]*/|/debian/SUITE/|g" "$folder/output" > "$folder/words"
  [ "$status" = "$4" ] && [ "$(cat "$folder/words")" = "$5" ] && return
  printf 'user %s, network %s: %s\nexpected status %s and:\n%s\ngot status %s and:\n' "$1" "$2" "$3" "$4" "$5" "$status"
  cat "$folder/words"
  exit 1
}

check 0 yes 'need_packages here-dev sh' 0 ''

# As root: what is installed is said before.
check 0 yes 'need_packages here-dev absent-dev sh absent; echo end' 0 'installing absent-dev absent
end'
[ "$(cat "$folder/said_before")" = "$packages: installing absent-dev absent" ]
check 0 yes 'want_packages absent-dev; echo "without:$without"' 0 'installing absent-dev
without:'
check 0 no 'want_packages absent-dev; echo end' 1 'installing absent-dev
apt-get says: update
apt-get could not install absent-dev'

# Without root: one line.
check 1 yes 'need_packages here-dev absent-dev absent; echo end' 1 \
  'not installed: absent-dev absent; as root: apt-get install absent-dev absent'
check 1 yes 'want_packages here-dev absent-dev absent; echo "without:$without"' 0 \
  'not installed, so what needs it is left out: absent-dev absent; as root: apt-get install absent-dev absent
without: absent-dev absent'

# Headers need no root.
check 1 no 'need_packages libasio-dev; echo end' 1 'not installed: libasio-dev; as root: apt-get install libasio-dev;'\
' the log of the download is ROOT/build/debian/SUITE/libasio-dev.log'
check 1 yes 'need_packages libasio-dev catch2; echo "$CMAKE_PREFIX_PATH"' 0 \
  'not installed, so unpacked into build/debian: libasio-dev catch2
ROOT/build/debian/SUITE/catch2/usr:ROOT/build/debian/SUITE/libasio-dev/usr'
check 1 no 'need_packages libasio-dev; echo end' 0 end
check 1 no 'want_packages libasio-dev absent; echo "without:$without"' 0 \
  'not installed, so what needs it is left out: absent; as root: apt-get install absent
without: absent'
