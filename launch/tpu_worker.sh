#!/usr/bin/env bash
# One worker's part of a run. launch/tpu_pod.sh calls it over ssh on every worker; on one machine it works by hand too.
#
# A run has a folder, $LAIF_RUNS/NAME (default ~/laif-runs/NAME), with
#   command     what runs, quoted for a shell
#   log         its output, appended to at every start
#   pid         the process: "PID START BOOT". START is its start time in clock ticks and BOOT the boot's id, so that a
#               number which the system has given to another process since is never taken for it
#   supervisor  the same of the process that waits for it and leads its process group
#   exit        the exit code, once it has ended
#   stopped     is there if somebody wanted it stopped
set -euo pipefail

HOME_OF_CODE="${LAIF_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
RUNS="${LAIF_RUNS:-$HOME/laif-runs}"
SECRETS="${LAIF_SECRETS:-$HOME/.laif-secrets}"
PORT=8482 # of the coordinator, as JAX itself would choose it on a TPU VM

usage() {
  cat <<'TEXT'
usage: tpu_worker.sh install CODE_ID          install the code beside this script, with pinned requirements and jax[tpu]
       tpu_worker.sh start NAME -- COMMAND    start COMMAND in the background as the run NAME
       tpu_worker.sh status NAME              one line: state=never|running|finished|stopped|lost, and more
       tpu_worker.sh log NAME [LINES] [follow]
       tpu_worker.sh stop NAME [SECONDS [for-good]]
                                              SIGTERM to the recorded process; SIGKILL to its group after SECONDS (120);
                                              for-good: who watches the run shall not start it again
       tpu_worker.sh busy                     exit code 0 and a line if a run is running here
       tpu_worker.sh environment              what `start` tells JAX about the pod
TEXT
}

fail() { # CODE MESSAGE...
  local code=$1
  shift
  printf 'tpu_worker: %s: %s\n' "$(hostname)" "$*" >&2
  exit "$code"
}

# ---- processes ---------------------------------------------------------------------------------------------------

boot_id() { cat /proc/sys/kernel/random/boot_id; }

start_time() { # PID -> field 22 of /proc/PID/stat; the name before it may hold spaces and brackets
  local stat rest
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  rest=${stat##*) }
  # shellcheck disable=SC2086 # split on purpose
  set -- $rest
  [[ $1 != Z ]] || return 1 # ended, and only not yet waited for
  printf '%s\n' "${20}"
}

record() { # FILE PID
  local started
  started=$(start_time "$2") || return 1
  printf '%s %s %s\n' "$2" "$started" "$(boot_id)" >"$1.part"
  mv "$1.part" "$1"
}

alive() { # FILE: prints the recorded process id if exactly that process still runs
  local pid started boot
  [[ -f $1 ]] || return 1
  read -r pid started boot <"$1" || return 1
  [[ $boot == "$(boot_id)" && $(start_time "$pid" || true) == "$started" ]] || return 1
  printf '%s\n' "$pid"
}

# ---- the pod -----------------------------------------------------------------------------------------------------

metadata() { # ATTRIBUTE of this TPU VM
  curl --silent --fail --max-time 10 --header 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

tpu_env_value() { # KEY, from lines such as  MEGASCALE_NUM_SLICES: '2'
  sed -n "s/^[[:space:]]*$1:[[:space:]]*//p" <<<"$2" | tr -d "'\"\r" | head -n 1
}

# A TPU VM tells by its metadata who the others are. Said in variables, a process that cannot reach the coordinator ends
# with a clear message, and every tool that runs here sees the same pod.
pod_environment() {
  local worker endpoints tpu_env slices slice coordinator hosts=() list entry
  worker=$(metadata agent-worker-number) || return 0 # no TPU VM: nothing to tell
  endpoints=$(metadata worker-network-endpoints) || fail 1 "the metadata has no worker-network-endpoints"
  tpu_env=$(metadata tpu-env) || tpu_env=""
  IFS=, read -r -a list <<<"$endpoints"
  for entry in "${list[@]}"; do hosts+=("${entry##*:}"); done # "name:id:address", or the address alone
  slices=$(tpu_env_value MEGASCALE_NUM_SLICES "$tpu_env")
  slice=$(tpu_env_value MEGASCALE_SLICE_ID "$tpu_env")
  coordinator=$(tpu_env_value MEGASCALE_COORDINATOR_ADDRESS "$tpu_env")
  coordinator=${coordinator%%:*}
  ((${#hosts[@]} * ${slices:-1} > 1)) || return 0
  printf 'JAX_COORDINATOR_ADDRESS=%s:%s\n' "${coordinator:-${hosts[0]}}" "$PORT"
  printf 'JAX_NUM_PROCESSES=%s\n' $((${#hosts[@]} * ${slices:-1}))
  printf 'JAX_PROCESS_ID=%s\n' $((worker + ${#hosts[@]} * ${slice:-0}))
}

# ---- verbs -------------------------------------------------------------------------------------------------------

install_code() { # CODE_ID
  local uv version
  cd "$HOME_OF_CODE"
  if [[ -f .installed && $(cat .installed) == "$1" ]]; then
    echo "$(hostname): installed already ($1)"
    return
  fi
  rm -f .installed
  PATH="$HOME/.local/bin:$PATH"
  if ! uv=$(command -v uv); then
    python3 -m pip install --quiet --user uv || fail 1 "cannot install uv: the worker needs pip and the network"
    uv=$(command -v uv) || fail 1 "uv was installed but is not in $HOME/.local/bin"
  fi
  version=$(sed -n 's/^jax==//p' requirements/py312.txt)
  [[ -n $version ]] || fail 1 "requirements/py312.txt pins no jax"
  [[ -d .venv ]] || "$uv" venv --quiet --python 3.12 .venv
  "$uv" pip install --quiet --python .venv/bin/python -r requirements/py312.txt
  "$uv" pip install --quiet --python .venv/bin/python -c requirements/py312.txt "jax[tpu]==$version" 'etils[epath-gcs]'
  "$uv" pip install --quiet --python .venv/bin/python --no-deps -e .
  .venv/bin/python -c 'import jax, laif_jax' || fail 1 "the installed packages cannot be imported"
  echo "$1" >.installed
  echo "$(hostname): installed $1, jax $version"
}

start() { # NAME -- COMMAND...
  local name=$1 folder pid line
  shift 2
  folder=$RUNS/$name
  mkdir -p "$folder"
  if pid=$(alive "$folder/pid"); then fail 3 "run \`$name\` is running already, as process $pid; stop it first"; fi
  rm -f "$folder/pid" "$folder/supervisor" "$folder/exit" "$folder/stopped"
  printf '%q ' "$@" >"$folder/command"
  # Asked for in its own statement, so that a failure ends the script.
  line=$(pod_environment)
  while IFS= read -r line; do [[ -z $line ]] || export "${line?}"; done <<<"$line"
  printf '\n---- %s: %s\n' "$(date -u +%FT%TZ)" "$(cat "$folder/command")" >>"$folder/log"
  setsid bash "${BASH_SOURCE[0]}" supervise "$name" -- "$@" </dev/null >>"$folder/log" 2>&1 &
  for _ in $(seq 100); do
    if [[ -f $folder/pid || -f $folder/exit ]]; then
      echo "$(hostname): started \`$name\`, log in $folder/log"
      return
    fi
    sleep 0.1
  done
  fail 1 "run \`$name\` did not start within 10 s; look at $folder/log"
}

supervise() { # NAME -- COMMAND...: in a session of its own; waits for the command and writes down how it ended
  local name=$1 folder child code=0
  shift 2
  folder=$RUNS/$name
  cd "$HOME_OF_CODE"
  export PATH="$HOME_OF_CODE/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  if [[ -f $SECRETS ]]; then
    [[ $(stat -c %a "$SECRETS") == 600 ]] || fail 1 "$SECRETS must have mode 600"
    set -a
    # shellcheck disable=SC1090 # a file of KEY=VALUE lines
    . "$SECRETS"
    set +a
  fi
  # When the machine goes down everybody gets SIGTERM; this process stays until the command has saved and ended.
  trap ':' TERM HUP INT
  record "$folder/supervisor" "$BASHPID"
  "$@" &
  child=$!
  record "$folder/pid" "$child" || true # it may have ended already
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # else a signal ended the waiting, not the command
  done
  printf '%s\n' "$code" >"$folder/exit.part"
  mv "$folder/exit.part" "$folder/exit"
  printf -- '---- %s: ended with exit code %s\n' "$(date -u +%FT%TZ)" "$code"
  trap '' TERM
  kill -TERM -- "-$BASHPID" 2>/dev/null || true # what the command left behind in its group would hold the chips
}

busy() {
  local file pid
  for file in "$RUNS"/*/pid; do
    if pid=$(alive "$file"); then
      echo "$(hostname): run \`$(basename "$(dirname "$file")")\` is running as process $pid; stop it first"
      return 0
    fi
  done
  return 1
}

status() { # NAME
  local folder=$RUNS/$1 pid
  if pid=$(alive "$folder/pid"); then
    echo "state=running worker=$(hostname) pid=$pid"
  elif [[ -f $folder/stopped && $(cat "$folder/exit" 2>/dev/null || echo 0) != 0 ]]; then
    echo "state=stopped worker=$(hostname) exit=$(cat "$folder/exit")"
  elif [[ -f $folder/exit ]]; then
    echo "state=finished worker=$(hostname) exit=$(cat "$folder/exit")"
  elif alive "$folder/supervisor" >/dev/null; then
    echo "state=running worker=$(hostname)" # between the command's end and the note of it
  elif [[ -f $folder/command ]]; then
    echo "state=lost worker=$(hostname)" # killed with its supervisor, or the machine was started anew
  else
    echo "state=never worker=$(hostname)"
  fi
}

stop() { # NAME SECONDS for-good
  local folder=$RUNS/$1 grace=${2:-120} pid leader waited=0
  if [[ ${3:-} == for-good && -d $folder ]]; then touch "$folder/stopped"; fi
  if ! pid=$(alive "$folder/pid"); then
    echo "$(hostname): run \`$1\` is not running"
    return
  fi
  leader=$(alive "$folder/supervisor" || true)
  kill -TERM "$pid" # it saves a checkpoint and ends
  while alive "$folder/pid" >/dev/null && ((waited < grace * 5)); do
    sleep 0.2
    waited=$((waited + 1))
  done
  if alive "$folder/pid" >/dev/null; then
    echo "$(hostname): process $pid is still there after $grace s: SIGKILL"
    if [[ -n $leader ]]; then kill -KILL -- "-$leader" 2>/dev/null || true; fi
    kill -KILL "$pid" 2>/dev/null || true
    echo 137 >"$folder/exit"
  fi
  for _ in $(seq 50); do
    [[ ! -f $folder/exit ]] || break
    sleep 0.1
  done
  echo "$(hostname): stopped \`$1\`, exit code $(cat "$folder/exit" 2>/dev/null || echo unknown)"
}

main() {
  local verb=${1:-} name=${2:-}
  case $verb in
    install) [[ -n $name ]] || fail 2 "install needs the id of the code" && install_code "$name" && return ;;
    environment) pod_environment && return ;;
    busy)
      busy
      return
      ;;
    start | supervise | status | log | stop) ;;
    *) usage >&2 && exit 2 ;;
  esac
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail 2 "\`$name\` is no name of a run: letters, digits, . _ - only"
  shift 2
  case $verb in
    start | supervise)
      [[ ${1:-} == -- && $# -ge 2 ]] || fail 2 "$verb NAME -- COMMAND"
      "$verb" "$name" "$@"
      ;;
    log)
      [[ -f $RUNS/$name/log ]] || fail 1 "run \`$name\` has no log here: it was never started"
      if [[ ${2:-} == follow ]]; then exec tail -n "${1:-200}" -F "$RUNS/$name/log"; fi
      exec tail -n "${1:-200}" "$RUNS/$name/log"
      ;;
    *) "$verb" "$name" "$@" ;;
  esac
}

main "$@"
