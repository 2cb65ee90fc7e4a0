#!/bin/sh
# Average a run in several independent processes, and join their results:
#
#     sh parts.sh SOURCE RESULT PARTS [OPTION]...
#
# Each part may also be started on another machine, or again after it was killed.
set -eu
source=$1 result=$2 parts=$3
shift 3

part=0
while [ "$part" -lt "$parts" ]; do
    ckavg pema "$source" --out "$result" --part "$part/$parts" --wait --quiet "$@" &
    part=$((part + 1))
done
wait
ckavg join "$result"
