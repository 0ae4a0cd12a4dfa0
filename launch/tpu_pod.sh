#!/usr/bin/env bash
# A study on Cloud TPU VMs with plain gcloud: queued resources, one or several slices, on demand, reserved or spot.
# The worker's side of it is launch/tpu_worker.sh. How to: docs/how-to/tpu_pod.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RESUME=75 # EX_TEMPFAIL: the run saved its state and wants to be started again
KILLS=10  # how often `run --watch` starts again after workers were killed
KEYS="PROJECT ZONE NAME TYPE RUNTIME SLICES CAPACITY SERVICE_ACCOUNT NETWORK SUBNETWORK INTERNAL_IPS LABELS VALID_FOR RUN SECRETS"

usage() {
  cat <<'TEXT'
usage: launch/tpu_pod.sh VERB [settings] [-- COMMAND...]

verbs
  create            ask for the slices and wait until they are ready
  setup             copy the code (the last commit) to every worker and install it, with pinned requirements
  run -- COMMAND    start COMMAND in the background on all workers and return
  run --watch -- COMMAND
                    create and set up what is missing, start COMMAND, and stay: after a preemption ask for the slices
                    again and start COMMAND again, which resumes from its checkpoints; end when it has ended
  logs              the log of one worker (--slice 0 --worker 0); --follow keeps showing it
  status            the request, the slices, and the run on every worker
  stop              SIGTERM to the recorded process of the run on every worker (it saves); SIGKILL after --grace seconds
  delete            give the slices back; asks first, unless --yes

settings: as --flag VALUE, else from the environment (LAIF_POD_PROJECT, ...), else from a file of KEY=VALUE lines
          (--settings FILE, or launch/pod.env where it exists; see launch/pod.env.example)
  --project, --zone, --name        needed; --name is the request's, and the slices' with -0, -1, ... behind it
  --type v5litepod-16              accelerator type of one slice; needed to create
  --slices 1                       slices of that type, joined by the data-centre network
  --capacity on-demand             on-demand, reserved, or spot
  --runtime VERSION                TPU software version (default: the one for the type)
  --service-account EMAIL          what the workers may do: it needs the bucket of the run
  --network, --subnetwork, --labels KEY=VALUE,...
  --internal-ips yes               no external addresses: run this from a machine inside the network
  --valid-for 24h                  how long the request may wait in the queue
  --run study                      name of the run on the workers: several may follow each other, one at a time
  --secrets FILE                   KEY=VALUE lines, mode 600 (HF_TOKEN, WANDB_API_KEY, LAIF_LABEL_TOKEN, ...): copied to the
                                   workers by setup, never shown, given to the command as environment variables

options
  --dry-run         print every command in place of running it
  --worktree        setup: the files as they are now, with changes that are not committed
  --poll 60         run --watch: seconds between looks
  --retries 0       run --watch: how often to start again after an exit code other than 0 and 75
  --recreations 100 run --watch: how often to ask for lost slices again
  --slice I, --worker I, --lines 200, --follow, --grace 120, --yes

exit codes: 0 done; 2 a mistake in what was asked; 69 the pod cannot be had or reached; else that of COMMAND. A COMMAND that
ends with 75 has saved its state and wants to be started again, which `run --watch` does; also after a worker was killed.
TEXT
}

# ---- settings ----------------------------------------------------------------------------------------------------

die() { # CODE MESSAGE...
  local code=$1
  shift
  printf 'tpu_pod: %s\n' "$*" >&2
  exit "$code"
}

say() { printf '%s tpu_pod: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

known() { [[ " $KEYS " == *" $1 "* ]]; }

read_settings() { # FILE: KEY=VALUE lines; only for what neither a flag nor the environment gives
  local file=$1 line key value
  [[ -f $file ]] || die 2 "there is no settings file $file"
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -n ${line//[[:space:]]/} && $line != \#* ]] || continue
    key=${line%%=*} value=${line#*=}
    if [[ $line != *=* ]] || ! known "$key"; then die 2 "$file: \`$line\`: lines are KEY=VALUE, with a KEY of: $KEYS"; fi
    value=${value#\"} value=${value%\"}
    local name="LAIF_POD_$key"
    [[ -n ${!name:-} ]] || printf -v "$name" '%s' "$value"
  done <"$file"
}

get() { # KEY: its value, or nothing
  local name="LAIF_POD_$1"
  printf '%s' "${!name:-}"
}

need() { # KEY...
  local key flag
  for key in "$@"; do
    flag=$(tr '[:upper:]_' '[:lower:]-' <<<"$key")
    [[ -n $(get "$key") ]] || die 2 "no $flag: give --$flag, LAIF_POD_$key in the environment, or $key=... in launch/pod.env"
  done
}

default_runtime() { # of an accelerator type, after https://cloud.google.com/tpu/docs/runtimes
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die 2 "type \`$1\`: known are v2-, v3-, v4-, v5litepod- (v5e), v5p- and v6e-, followed by a number; else give --runtime" ;;
  esac
}

check_settings() {
  need PROJECT ZONE NAME
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,48}[a-z0-9])?$ ]] || die 2 "name \`$NAME\`: lower-case letters, digits and -, at most 50, a letter first"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die 2 "zone \`$ZONE\`: it looks like us-west4-a; a region is not enough"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die 2 "slices \`$SLICES\`: a number from 1"
  [[ $RUN =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die 2 "run \`$RUN\`: letters, digits, . _ - only"
  case $CAPACITY in on-demand | reserved | spot) ;; *) die 2 "capacity \`$CAPACITY\`: one of on-demand, reserved, spot" ;; esac
  case $(get INTERNAL_IPS) in "" | yes | no) ;; *) die 2 "internal-ips: yes or no" ;; esac
  [[ -z $(get TYPE) || $(get TYPE) =~ ^v[0-9][a-z]*-[0-9]+$ ]] || die 2 "type \`$(get TYPE)\`: it looks like v5litepod-16, v5p-64 or v6e-32"
  if [[ -n $(get TYPE) && -z $(get RUNTIME) ]]; then default_runtime "$(get TYPE)" >/dev/null; fi
  local file
  file=$(get SECRETS)
  if [[ -n $file ]]; then
    [[ -f $file ]] || die 2 "there is no secrets file $file"
    [[ $(stat -c %a "$file" 2>/dev/null || stat -f %Lp "$file") == 600 ]] || die 2 "$file can be read by others: chmod 600 $file"
    if grep -Evq '^([A-Za-z_][A-Za-z0-9_]*=.*|#.*|[[:space:]]*)$' "$file"; then die 2 "$file: only lines of KEY=VALUE"; fi
  fi
}

# ---- running and asking ------------------------------------------------------------------------------------------

shown() { # the command as a shell reads it, on the script's own standard output
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  printf '%s\n' "${line% }" >&3
}

tpus() { # ARGUMENT...: gcloud; --dry-run: prints it
  if [[ -n $DRY ]]; then
    shown gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE"
  else
    gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE"
  fi
}

wait_a_while() { [[ -n $DRY ]] || sleep "$POLL"; }

nodes() { # the slices' names
  local i
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

ask() { # COMMAND...: its output; `absent` if there is no such thing; `unknown` if it cannot be told now
  local out
  if out=$("$@" 2>"$SCRATCH/ask"); then
    printf '%s\n' "${out:-unknown}"
  elif grep -Eq 'NOT_FOUND|was not found|does not exist' "$SCRATCH/ask"; then
    echo absent
  elif grep -Eq 'PERMISSION_DENIED|active account|invalid_grant|has not been used in project|SERVICE_DISABLED' "$SCRATCH/ask"; then
    cat "$SCRATCH/ask" >&2
    echo refused
  else
    sed 's/^/  gcloud: /' "$SCRATCH/ask" >&2
    echo unknown
  fi
}

request_state() { ask tpus queued-resources describe "$NAME" '--format=value(state.state)'; }

node_state() { ask tpus tpu-vm describe "$1" '--format=value(state)'; }

node_workers() { ask tpus tpu-vm describe "$1" '--format=value(networkEndpoints.len())'; }

# absent, waiting, ready, lost (preempted or gone: ask anew), failed, deleting, refused, unknown
pod_state() {
  local state node
  state=$(request_state)
  if [[ -n $DRY ]]; then # as if the request were granted at once
    [[ ! -f $SCRATCH/requested ]] || for node in $(nodes); do node_state "$node" >/dev/null; done
    if [[ -f $SCRATCH/requested ]]; then echo ready; else echo absent; fi
    return
  fi
  case $state in
    absent | refused | unknown) echo "$state" && return ;;
    SUSPENDING | SUSPENDED) echo lost && return ;;
    FAILED) echo failed && return ;;
    DELETING) echo deleting && return ;;
    ACTIVE) ;;
    *) echo waiting && return ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING
  esac
  for node in $(nodes); do
    state=$(node_state "$node")
    case $state in
      READY) ;;
      refused | unknown) echo "$state" && return ;;
      absent | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) echo lost && return ;;
      *) echo waiting && return ;; # CREATING, STARTING, RESTARTING, REPAIRING
    esac
  done
  echo ready
}

reach() { # ssh|scp ARGUMENT...: the workers
  local verb=$1
  shift
  [[ $(get INTERNAL_IPS) != yes ]] || set -- "$@" --internal-ip
  tpus tpu-vm "$verb" "$@" --quiet
}

on_all() { # REMOTE COMMAND as one string: on every worker of every slice at once; its output; fails if one fails
  local node pids=() pid code=0
  for node in $(nodes); do
    if [[ -n $DRY ]]; then
      reach ssh "$node" --worker=all "--command=$1"
      continue
    fi
    reach ssh "$node" --worker=all "--command=$1" </dev/null >"$SCRATCH/out.$node" 2>"$SCRATCH/err.$node" &
    pids+=($!)
  done
  [[ -z $DRY ]] || return 0
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  for node in $(nodes); do
    cat "$SCRATCH/out.$node"
    ((code == 0)) || sed "s/^/  $node: /" "$SCRATCH/err.$node" >&2
  done
  return "$code"
}

copy_to_all() { # FILE REMOTE_NAME, into the home folder of every worker
  local node
  for node in $(nodes); do
    reach scp "$1" "$node:$2" --worker=all --scp-flag=-p && continue
    say "the copy to $node failed. For several workers gcloud takes the key from the agent: eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine"
    return 1
  done
}

worker() { # VERB ARGUMENT...: the remote command, quoted once for the worker's shell
  printf 'bash laif/launch/tpu_worker.sh'
  printf ' %q' "$@"
}

# ---- verbs -------------------------------------------------------------------------------------------------------

request() {
  local type runtime arguments=()
  need TYPE
  type=$(get TYPE)
  runtime=$(get RUNTIME)
  runtime=${runtime:-$(default_runtime "$type")}
  arguments=("--accelerator-type=$type" "--runtime-version=$runtime")
  if ((SLICES > 1)); then arguments+=("--node-count=$SLICES" "--node-prefix=$NAME"); else arguments+=("--node-id=$NAME"); fi
  case $CAPACITY in spot) arguments+=(--spot) ;; reserved) arguments+=(--reserved) ;; *) ;; esac
  [[ -z $(get VALID_FOR) ]] || arguments+=("--valid-until-duration=$(get VALID_FOR)")
  [[ -z $(get SERVICE_ACCOUNT) ]] || arguments+=("--service-account=$(get SERVICE_ACCOUNT)" --scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ -z $(get NETWORK) ]] || arguments+=("--network=$(get NETWORK)")
  [[ -z $(get SUBNETWORK) ]] || arguments+=("--subnetwork=$(get SUBNETWORK)")
  [[ $(get INTERNAL_IPS) != yes ]] || arguments+=(--internal-ips)
  [[ -z $(get LABELS) ]] || arguments+=("--labels=$(get LABELS)")
  say "asking for $SLICES x $type ($CAPACITY) in $ZONE"
  tpus queued-resources create "$NAME" "${arguments[@]}" --async --quiet
  [[ -z $DRY ]] || touch "$SCRATCH/requested"
}

refused() {
  die 69 "Google Cloud refuses, see above. Are you logged in (gcloud auth login), is the API enabled (gcloud services enable tpu.googleapis.com), and have you the role roles/tpu.admin?"
}

until_ready() { # waits for the request; 0: ready, 1: lost or failed on the way
  local state told="" absent=0
  while true; do
    state=$(pod_state)
    [[ $state == "$told" ]] || say "$NAME: $state"
    told=$state
    case $state in
      ready) return 0 ;;
      refused) refused ;;
      lost | failed) return 1 ;;
      absent) ((absent < 5)) && absent=$((absent + 1)) || return 1 ;; # a new request takes a moment to be seen
    esac
    wait_a_while
  done
}

verb_create() {
  local state
  need TYPE
  state=$(pod_state)
  case $state in
    absent) request ;;
    refused) refused ;;
    *) say "$NAME exists already ($state)" ;;
  esac
  until_ready || {
    tpus queued-resources describe "$NAME" >&2 || true
    die 69 "$NAME cannot be had: its state is above. Give it back with \`delete\`, then try another zone, type or capacity"
  }
}

pack_code() { # into the state folder, so that a later recreation installs the same
  local commit
  if [[ -n $WORKTREE ]]; then
    commit=worktree-$(date -u +%Y%m%dT%H%M%SZ)
    (cd "$ROOT" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' f; do [[ ! -f $f ]] || printf '%s\0' "$f"; done |
      tar --null -czf "$STATE/code.tar.gz" -T -)
  else
    commit=$(git -C "$ROOT" rev-parse --short=12 HEAD) || die 2 "$ROOT is no git checkout; use --worktree from one"
    [[ -z $(git -C "$ROOT" status --porcelain --untracked-files=no) ]] || say "changes that are not committed stay here (or: --worktree)"
    git -C "$ROOT" archive --format=tar.gz -o "$STATE/code.tar.gz" HEAD
  fi
  printf '%s\n' "$commit" >"$STATE/code"
}

install_everywhere() {
  local code
  code=$(cat "$STATE/code")
  say "installing $code on every worker"
  copy_to_all "$STATE/code.tar.gz" laif-code.tar.gz || return 1
  if [[ -n $(get SECRETS) ]]; then copy_to_all "$(get SECRETS)" .laif-secrets || return 1; fi
  on_all "$(unpack) && $(worker install "$code")"
}

# The files that an older version had and this one has not must go; what was installed and what runs wrote may stay.
unpack() {
  printf '%s' 'if [ -f laif/launch/tpu_worker.sh ] && bash laif/launch/tpu_worker.sh busy; then exit 3; fi; ' \
    'umask 077 && mkdir -p laif && ' \
    'find laif -mindepth 1 -maxdepth 1 ! -name .venv ! -name .installed ! -name runs ! -name labels -exec rm -rf {} + && ' \
    'tar xzf laif-code.tar.gz -C laif && ' \
    'if [ -f .laif-secrets ]; then chmod 600 .laif-secrets; fi'
}

verb_setup() {
  pack_code
  install_everywhere || die 69 "the installation failed, see above"
}

start_everywhere() { # COMMAND...
  on_all "$(worker start "$RUN" -- "$@")"
}

verb_run() {
  (($# > 0)) || die 2 "run: no command. Write it behind --, for example: run -- laif run configs/quickstart.yaml"
  if [[ -n $WATCH ]]; then
    watch_run "$@"
  else
    start_everywhere "$@" || die 69 "the run did not start on every worker, see above. Was \`setup\` done? \`stop\` ends it where it did start"
    say "started; look with: launch/tpu_pod.sh logs --follow"
  fi
}

verb_logs() {
  local node=$NAME arguments=("$RUN" "$LINES_SHOWN")
  ((SLICES == 1)) || node=$NAME-$SLICE
  ((SLICE < SLICES)) || die 2 "slice $SLICE: there are $SLICES, from 0"
  [[ -z $FOLLOW ]] || arguments+=(follow)
  reach ssh "$node" "--worker=$WORKER" "--command=$(worker log "${arguments[@]}")"
}

verb_status() {
  local node state
  state=$(request_state)
  if [[ -n $DRY ]]; then
    for node in $(nodes); do node_state "$node" >/dev/null; done
    on_all "$(worker status "$RUN")"
    return
  fi
  echo "request $NAME: $state"
  [[ $state != absent ]] || return 0
  [[ $state != refused && $state != unknown ]] || die 69 "the state cannot be read"
  for node in $(nodes); do echo "slice $node: $(node_state "$node")"; done
  [[ $(pod_state) == ready ]] || return 0
  on_all "$(worker status "$RUN")" | sort
}

verb_stop() { # a watcher elsewhere hears of it, and ends
  on_all "$(worker stop "$RUN" "$GRACE" for-good)" || die 69 "not every worker could be reached, see above; the run may go on there"
}

verb_delete() {
  local answer
  if [[ -z $YES && -z $DRY ]]; then
    read -r -p "Give back $NAME ($SLICES slice(s) in $ZONE) with all that is on its disks? [y/N] " answer || answer=n
    [[ $answer == [yY]* ]] || die 2 "nothing was deleted"
  fi
  tpus queued-resources delete "$NAME" --force --quiet "$@"
}

# ---- run --watch -------------------------------------------------------------------------------------------------

# One word for the run on all workers: never, running, done, resume, stopped, mixed, unreachable; or failed or killed, and a
# code.
run_state() {
  local out node count expected=0 lines
  if [[ -n $DRY ]]; then
    on_all "$(worker status "$RUN")"
    echo "done"
    return
  fi
  for node in $(nodes); do
    count=$(node_workers "$node")
    [[ $count =~ ^[0-9]+$ ]] || { echo unreachable && return; }
    expected=$((expected + count))
  done
  out=$(on_all "$(worker status "$RUN")") || { echo unreachable && return; }
  lines=$(grep -c '^state=' <<<"$out" || true)
  ((lines == expected)) || { echo unreachable && return; }
  summary "$out" "$expected"
}

summary() { # OUTPUT EXPECTED
  local all=$2 never running saved finished bad
  never=$(grep -c '^state=never' <<<"$1" || true)
  running=$(grep -c '^state=running' <<<"$1" || true)
  finished=$(grep -c '^state=finished .*exit=0$' <<<"$1" || true)
  saved=$(grep -Ec "^state=lost|^state=finished .*exit=$RESUME\$" <<<"$1" || true)
  # A worker that ended with an error takes the others along, with 75; it alone says what happened. Of a worker that was
  # killed (128 and more) the cause is outside of the run: memory, or the machine.
  bad=$(sed -n 's/^state=finished .*exit=\([0-9]*\)$/\1/p' <<<"$1" | grep -Evx "0|$RESUME" | sort -n | head -n 1 || true)
  if ((never == all)); then
    echo never
  elif ((running == all)); then
    echo running
  elif ((running > 0)); then
    echo mixed # some have ended: the others soon will, by themselves, or must be stopped
  elif grep -q '^state=stopped' <<<"$1"; then
    echo stopped
  elif [[ -n $bad ]] && ((bad < 128)); then
    echo "failed $bad"
  elif [[ -n $bad ]]; then
    echo "killed $bad"
  elif ((finished == all)); then
    echo "done"
  elif ((saved > 0 || never > 0)); then
    echo resume
  fi
}

lock() { # one watcher per pod on this machine
  local other
  if ! mkdir "$STATE/lock" 2>/dev/null; then
    other=$(cat "$STATE/lock/pid" 2>/dev/null || true)
    if [[ -n $other ]] && kill -0 "$other" 2>/dev/null; then die 2 "process $other watches $NAME already"; fi
    rm -rf "$STATE/lock"
    mkdir "$STATE/lock"
  fi
  echo $$ >"$STATE/lock/pid"
  LOCKED=1
}

give_back() { # a request that is lost, so that its name is free again
  local state
  say "giving the lost request $NAME back"
  while true; do
    state=$(request_state)
    case $state in
      absent) return 0 ;;
      refused) refused ;;
      DELETING | unknown) ;;
      *) tpus queued-resources delete "$NAME" --force --async --quiet || true ;;
    esac
    wait_a_while
  done
}

bring_up() { # until the pod is ready; asks for it, and again when it was lost
  local state told=""
  while true; do
    state=$(pod_state)
    [[ $state == "$told" || $state == ready ]] || say "$NAME: $state"
    told=$state
    case $state in
      ready) return ;;
      absent)
        INSTALLED=""
        request || say "the request was not taken; asking again"
        ;;
      failed | lost)
        INSTALLED=""
        ((RECREATED < RECREATIONS)) || die 69 "$NAME was lost $((RECREATED + 1)) times; --recreations $RECREATIONS allows no more"
        RECREATED=$((RECREATED + 1))
        give_back
        continue
        ;;
      refused) refused ;;
    esac
    wait_a_while
  done
}

launch_it() { # COMMAND...: installs what is missing and starts; what fails is tried again at the next look
  if [[ -z $INSTALLED ]] && ! install_everywhere; then
    BROKEN=$((BROKEN + 1))
    ((BROKEN < 5)) || die 69 "the installation failed $BROKEN times, see above"
    return 0
  fi
  INSTALLED=1
  if start_everywhere "$@"; then
    BROKEN=0
  else
    BROKEN=$((BROKEN + 1))
    ((BROKEN < 5)) || die 69 "the start failed $BROKEN times, see above"
    say "not every worker started; looking again"
  fi
}

watch_run() { # COMMAND...
  local state mixed=0 failures=0 killed=0 silent=0
  need TYPE
  [[ -n $DRY ]] || lock
  INSTALLED="" RECREATED=0 BROKEN=0
  if [[ -n $WORKTREE || ! -f $STATE/code.tar.gz || -n $DRY ]]; then pack_code; fi
  bring_up
  state=$(run_state 2>/dev/null) # nothing may be installed yet
  if [[ $state == running && -z $DRY ]]; then
    # Another watcher's, or this one's before its machine went to sleep.
    [[ $(printf '%q ' "$@") == "$(cat "$STATE/command.$RUN" 2>/dev/null || true)" ]] ||
      die 2 "\`$RUN\` is running another command there; \`stop\` it, or choose another name with --run"
    INSTALLED=1
    say "\`$RUN\` is running already; watching it"
  else
    printf '%q ' "$@" >"$STATE/command.$RUN"
    launch_it "$@"
  fi
  while true; do
    wait_a_while
    if [[ $(pod_state) != ready ]]; then bring_up; fi
    state=resume
    [[ -z $INSTALLED ]] || state=$(run_state)
    if [[ $state == unreachable ]]; then silent=$((silent + 1)); else silent=0; fi
    if [[ $state == mixed ]]; then mixed=$((mixed + 1)); else mixed=0; fi
    case $state in
      done) say "\`$RUN\` is done" && return 0 ;;
      running) ;;
      stopped) say "\`$RUN\` was stopped; the same command goes on with it" && return "$RESUME" ;;
      unreachable) ((silent < 20)) || die 69 "the workers of $NAME have not answered $silent times, though the slices are ready" ;;
      mixed)
        # A lost worker ends the others within a minute or two, by their heartbeat.
        ((mixed < 5)) || { say "part of the workers ended and the rest did not: stopping them" && on_all "$(worker stop "$RUN" "$GRACE")" >&2; }
        ;;
      never | resume)
        say "starting \`$RUN\` again; it goes on from its last checkpoint"
        launch_it "$@"
        ;;
      killed*)
        killed=$((killed + 1))
        ((killed <= KILLS)) || { say "workers were killed $killed times, the last with exit code ${state#killed }" && return "${state#killed }"; }
        say "a worker was killed (exit code ${state#killed }); starting \`$RUN\` again"
        launch_it "$@"
        ;;
      failed*)
        failures=$((failures + 1))
        if ((failures > RETRIES)); then
          SLICE=0 verb_logs || true
          say "\`$RUN\` ended with exit code ${state#failed }; its log is above"
          return "${state#failed }"
        fi
        say "\`$RUN\` ended with exit code ${state#failed }; start $failures of $RETRIES more"
        launch_it "$@"
        ;;
    esac
  done
}

# ---- command line ------------------------------------------------------------------------------------------------

clean_up() {
  rm -rf "$SCRATCH"
  [[ -z $LOCKED ]] || rm -rf "$STATE/lock"
}

main() {
  local verb=${1:-} key settings=""
  DRY="" WATCH="" FOLLOW="" YES="" WORKTREE="" LOCKED=""
  POLL=60 RETRIES=0 RECREATIONS=100 SLICE=0 WORKER=0 LINES_SHOWN=200 GRACE=120
  case $verb in
    create | setup | run | logs | status | stop | delete) shift ;;
    -h | --help | help) usage && exit 0 ;;
    "") usage >&2 && exit 2 ;;
    *) die 2 "\`$verb\`: the verbs are create, setup, run, logs, status, stop, delete (--help)" ;;
  esac
  while (($# > 0)); do
    case $1 in
      --) shift && break ;;
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY=1 ;;
      --watch) WATCH=1 ;;
      --follow) FOLLOW=1 ;;
      --yes) YES=1 ;;
      --worktree) WORKTREE=1 ;;
      --settings | --poll | --retries | --recreations | --slice | --worker | --lines | --grace | --[a-z]*)
        key=$(tr '[:lower:]-' '[:upper:]_' <<<"${1#--}")
        (($# > 1)) || die 2 "$1 needs a value"
        case $key in
          SETTINGS) settings=$2 ;;
          POLL) POLL=$2 ;;
          RETRIES | RECREATIONS | SLICE | WORKER | GRACE | LINES)
            [[ $2 =~ ^[0-9]+$ ]] || die 2 "$1 $2: a number"
            [[ $key != LINES ]] || key=LINES_SHOWN
            printf -v "$key" '%s' "$2"
            ;;
          *)
            known "$key" || die 2 "unknown option $1 (--help)"
            printf -v "LAIF_POD_$key" '%s' "$2"
            ;;
        esac
        shift
        ;;
      *) die 2 "\`$1\`: options start with --, and the command stands behind a lone --" ;;
    esac
    shift
  done
  [[ $verb == run || $# -eq 0 ]] || die 2 "$verb takes no command"
  if [[ -n $settings ]]; then
    read_settings "$settings"
  elif [[ -f $ROOT/launch/pod.env ]]; then
    read_settings "$ROOT/launch/pod.env"
  fi
  PROJECT=$(get PROJECT) ZONE=$(get ZONE) NAME=$(get NAME)
  SLICES=$(get SLICES) CAPACITY=$(get CAPACITY) RUN=$(get RUN)
  SLICES=${SLICES:-1} CAPACITY=${CAPACITY:-on-demand} RUN=${RUN:-study}
  check_settings
  command -v gcloud >/dev/null || [[ -n $DRY ]] || die 2 "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  exec 3>&1
  SCRATCH=$(mktemp -d)
  trap clean_up EXIT
  STATE=${XDG_STATE_HOME:-$HOME/.local/state}/laif/pods/$NAME
  [[ -z $DRY ]] || STATE=$SCRATCH
  mkdir -p "$STATE"
  "verb_$verb" "$@"
}

main "$@"
