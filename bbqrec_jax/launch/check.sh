#!/usr/bin/env bash
# Questions to Google Cloud before a launch goes on; nothing is changed.
#   check.sh bucket NAME        refuses a bucket on which a checkpoint cannot be moved to its place in one piece
#   check.sh active NAME FLAG.. waits until a queued resource has its TPU; the flags say where it is
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

case $1 in
  bucket)
    found=$(gcloud storage buckets describe "gs://$2" --raw --format='value(hierarchicalNamespace.enabled)')
    [[ $found == True ]] || fail "gs://$2 has no hierarchical namespace, without which folders are renamed file by file:" \
      "make a bucket with --enable-hierarchical-namespace --uniform-bucket-level-access"
    ;;
  active)
    shown=
    while true; do
      state=$(gcloud compute tpus queued-resources describe "$2" "${@:3}" --format='value(state.state)')
      [[ $state == "$shown" ]] || echo "$2: $state"
      shown=$state
      case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING) fail "the queued resource $2 is $state: delete it and create it again" ;;
      esac
      sleep 30
    done
    ;;
  *) fail "check.sh bucket NAME or check.sh active NAME FLAG.., got $1" ;;
esac
