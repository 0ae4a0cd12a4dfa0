#!/usr/bin/env bash
# again.sh COMMAND...: runs COMMAND, and again while it ends with 75 (it saved its state and wants to be started again).
# For services that take every exit code but 0 for a failure: Vertex AI. Inside of a container, as its first process.
set -euo pipefail

RESUME=75
asked=""
child=""

# Of the nodes of a job Vertex AI tells by CLUSTER_SPEC; JAX reads these variables. Nothing is told of a job of one.
places() {
  python3 - <<'PYTHON'
import json, os, shlex

spec = json.loads(os.environ["CLUSTER_SPEC"])
pools, task = spec["cluster"], spec["task"]
hosts = [host for pool in sorted(pools) for host in pools[pool]]
before = sum(len(pools[pool]) for pool in pools if pool < task["type"])
if len(hosts) > 1:
    print("JAX_COORDINATOR_ADDRESS=" + shlex.quote(hosts[0]))
    print("JAX_NUM_PROCESSES=%d" % len(hosts))
    print("JAX_PROCESS_ID=%d" % (before + int(task["index"])))
PYTHON
}

if (($# == 0)); then
  echo "usage: again.sh COMMAND..." >&2
  exit 2
fi
if [[ -n ${CLUSTER_SPEC:-} ]]; then
  told=$(places)
  set -a
  eval "$told"
  set +a
fi
# The first process of a container passes no signal on by itself.
trap 'asked=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
while [[ -z $asked ]]; do
  "$@" &
  child=$!
  if [[ -n $asked ]]; then kill -TERM "$child" 2>/dev/null || true; fi # the signal came before its number was known
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # else a signal ended the waiting, not the command
  done
  child=""
  if ((code != RESUME)) || [[ -n $asked ]]; then exit "$code"; fi
  echo "---- $(date -u +%FT%TZ): saved; starting again"
  sleep "${LAIF_AGAIN_SECONDS:-5}"
done
exit "$RESUME"
