#!/usr/bin/env bash
# What a pod runs: container.sh WORKDIR COMMAND..
# Told to stop, the program saves and ends with status 0, with which Kubernetes would count its pod as done and not start
# it again. So status 0 without results becomes 75.
set -uo pipefail

workdir=$1
stopped=
"${@:2}" &
program=$!
trap 'stopped=yes; kill -TERM "$program" 2>/dev/null' TERM INT
# A signal ends `wait` early; asked once more, it has the status that the program ended with.
while kill -0 "$program" 2>/dev/null; do wait "$program"; done
wait "$program"
status=$?
((status == 0)) || exit "$status"
# The first host writes the results; shared storage may show them to the others a little later.
for ((second = 0; second < 60; second++)); do
  [[ ! -e $workdir/results.json ]] || exit 0
  [[ -z $stopped ]] || break
  sleep 1
done
echo "stopped before it was done: ends with status 75, to be started again"
exit 75
