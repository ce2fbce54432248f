#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Sends PROGRAM, the example interrupt, a SIGINT while it waits: interrupt.sh PROGRAM. It must end at once.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/output"
"$1" > "$folder/output" &
program=$!
{
  read -r said # it is about to call; a signal that comes before that counts, too
  kill -INT "$program"
  begin=$(date +%s%N)
  cat > "$folder/rest"
  took=$((($(date +%s%N) - begin) / 1000000))
} < "$folder/output"
status=0
wait "$program" || status=$?
echo "$said"
cat "$folder/rest"
echo "ended with status $status after $took ms"
[ "$status" = 130 ] && grep -q '^interrupted: runtime_bridge: a stop was requested' "$folder/rest" && [ "$took" -lt 5000 ]
