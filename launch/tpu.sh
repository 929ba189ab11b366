#!/usr/bin/env bash
# A run on a Cloud TPU slice, on all of its workers, over pre-emptions.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
usage: launch/tpu.sh run NAME --zone=ZONE --type=TYPE --version=VERSION [OPTION...] \
                     -- --config=FILE --workdir=DIR [--config.KEY=VALUE...]
       launch/tpu.sh status|logs|stop|delete NAME --zone=ZONE [OPTION...]

run     creates the TPU VM or takes the one of that name, installs the committed code, starts the
        program on every worker, shows worker 0's log, and starts it again after pre-emptions, until
        it has finished (exit status 0) or failed (1). It may be interrupted and called again: the
        program does not depend on it, and a running one is watched, not started twice.
status  the state of the TPU and of each worker's process
logs    follows the log of a worker
stop    SIGTERM to the program, which saves and leaves; the TPU stays, and is paid for
delete  deletes the TPU, and its queued resource with --queued

  --zone=ZONE          --project=ID
  --type=TYPE          accelerator type, such as v5litepod-16
  --version=VERSION    runtime version, such as v2-alpha-tpuv5-lite
  --queued             by a queued resource, also called NAME, which waits for capacity
  --spot               cheaper, and may be pre-empted
  --create-flag=FLAG   handed to gcloud's create as it is, such as --network=NAME; may be repeated
  --setup=COMMAND      run on every worker after installing, to mount a bucket for one
  --env=NAME=VALUE     in the program's environment on every worker; may be repeated
  --worker=N           whose log `logs` follows (0)
  --max-restarts=N     (100)
  --poll=SECONDS       between two looks at the TPU (30)
  --delete             `run` deletes the TPU when the program has finished
  --dry-run            print the commands, run none

DIR is in a bucket, gs://bucket/run, or an absolute path that all workers share. It outlives the TPU.
END
}

# --- arguments

command="${1:-}"
case $command in
  run | status | logs | stop | delete) shift ;;
  -h | --help) usage && exit ;;
  *) refuse "the first argument must be run, status, logs, stop or delete, not '$command'" ;;
esac
name="" zone="" type="" version="" queued="" setup="" worker=0 max_restarts=100 poll=30
delete="" dry_run="" place=() flags=() variables=()
while (($# > 0)); do
  case $1 in
    -h | --help) usage && exit ;;
    --zone=?*) zone="${1#*=}" ;;
    --project=?*) place+=("$1") ;;
    --type=?*) type="${1#*=}" ;;
    --version=?*) version="${1#*=}" ;;
    --queued) queued=1 ;;
    --spot) flags+=(--spot) ;;
    --create-flag=?*) flags+=("${1#*=}") ;;
    --setup=?*) setup="${1#*=}" ;;
    --env=*)
      [[ ${1#*=} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "--env must be NAME=VALUE, got '${1#*=}'"
      variables+=("${1#*=}")
      ;;
    --worker=*) worker="${1#*=}" ;;
    --max-restarts=*) max_restarts="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --) break ;;
    -*) refuse "unknown argument '$1'" ;;
    *) [[ ! $name ]] || refuse "two names, '$name' and '$1'" && name="$1" ;;
  esac
  shift
done
[[ $name ]] || refuse "no name"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  refuse "the name must be lower-case letters, digits and '-', got '$name'"
[[ $zone ]] || refuse "no --zone"
check_number --worker worker
check_number --max-restarts max_restarts
check_number --poll poll
((poll > 0)) || refuse "--poll must be at least 1"
place=("--zone=$zone" "${place[@]}")
if [[ $command == run ]]; then
  [[ ${1:-} == -- ]] || refuse "no arguments of the run; they follow --"
  shift
  job=("$@")
  check_job "${job[@]}"
  # A relative path would be on the worker's own disk, which a pre-emption deletes.
  [[ $workdir == /* || $workdir == *://* ]] || refuse "--workdir must be absolute, got '$workdir'"
  [[ $type ]] || refuse "no --type"
  [[ $version ]] || refuse "no --version"
elif (($# > 0)); then
  refuse "$command takes no arguments of a run"
fi

# --- the commands. What runs on a worker expands $HOME there, hence the single quotes.

# shellcheck disable=SC2016
code='"$HOME/piflow_code"' python='"$HOME/piflow_env/bin/python"' uv='"$HOME/.local/bin/uv"'
# shellcheck disable=SC2016
notes='"$HOME/piflow_run"' log='"$HOME/piflow_run/log"'
running="bash $code/launch/worker.sh state --dir=$notes 2>/dev/null | grep -q running"

vm() {
  local verb="$1"
  shift
  run gcloud compute tpus tpu-vm "$verb" "$name" "${place[@]}" "$@"
}

queue() {
  local verb="$1"
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "${place[@]}" "$@"
}

# --quiet: no questions; most answers are read by this script, and nobody sees a question then.
workers() { vm ssh --quiet --worker=all "--command=$1"; }

describe_vm() { vm describe "--format=value(state)"; }
describe_queue() { queue describe "--format=value(state.state)"; }

create() {
  if [[ $queued ]]; then
    queue create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" \
      "${flags[@]}"
  else
    vm create "--accelerator-type=$type" "--version=$version" "${flags[@]}"
  fi
}

remove() {
  if [[ $queued ]]; then
    queue delete --force --quiet # --force: its nodes too
  else
    vm delete --quiet
  fi
}

pack() {
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
}

# Only where the program does not run: it may, although its worker could not be asked.
install() {
  local steps="! $running || exit 0; set -e; rm -rf $code; mkdir $code; tar -xzf \"\$HOME/piflow_code.tar.gz\" -C $code"
  # uv, because the images' own Python is older than 3.11.
  steps+="; [ -x $uv ] || python3 -m pip install --user --quiet uv"
  steps+="; [ -x $python ] || $uv venv --quiet --python 3.12 \"\$HOME/piflow_env\""
  steps+="; cd $code; $uv pip install --quiet --python $python -e '.[$(extras "${job[@]}")]'"
  steps+="${setup:+; $setup}"
  run gcloud compute tpus tpu-vm scp "$archive" "$name:piflow_code.tar.gz" "${place[@]}" --quiet \
    --worker=all && workers "$steps"
}

# In the background and deaf to SIGHUP: the program must outlive the connection. Only where it does
# not run yet, so that a start that missed some workers can be repeated.
start() {
  local program set=""
  ((${#variables[@]} == 0)) || set="env $(quoted "${variables[@]}") "
  program="nohup ${set}bash launch/worker.sh run --dir=$notes $python -m piflow_jax.main $(quoted "${job[@]}")"
  # All of the background is redirected, or ssh would wait for it.
  workers "mkdir -p $notes && cd $code || exit; { $running || $program; } >>$log 2>&1 </dev/null &"
}

ask_workers() {
  local script="$code/launch/worker.sh"
  workers "if [ -e $script ]; then bash $script state --dir=$notes; else echo worker: none; fi"
}

halt() { workers "bash $code/launch/worker.sh halt --dir=$notes"; }
follow() { vm ssh --quiet "--worker=$worker" "--command=tail -n 20 -F $log"; }

# --- what the answers mean

# Sets `state`: the TPU's, or NONE, or UNKNOWN when Google could not be asked.
ask_state() {
  local answer
  if answer="$("$@" 2>"$errors")"; then
    state=$answer
  elif grep -q NOT_FOUND "$errors"; then
    state=NONE
  else
    state=UNKNOWN
    cat "$errors" >&2
  fi
}

# Sets `end` to what the workers' reports mean together. A failure counts at once, success only from
# all. Where one process vanished the others fail for want of it, so they are waited for, and
# their failures are not the program's.
judge_workers() {
  local answer report="" word
  if ! answer="$(ask_workers 2>/dev/null)" || [[ $answer != *worker:* ]]; then
    end=unreachable
    return
  fi
  report="$(grep -o 'worker: .*' <<<"$answer" | cut -d' ' -f2)"
  if grep -qxE "lost|none" <<<"$report"; then
    end=lost
    ! grep -qx running <<<"$report" || end=running
    return
  fi
  end=unreachable
  for word in finished stopped halted running failed; do
    ! grep -qx "$word" <<<"$report" || end=$word
  done
}

# Returns when the TPU is ready, whatever it takes.
provide() {
  local unknown=0
  while :; do
    if [[ $queued ]]; then
      ask_state describe_queue
      if [[ $state == ACTIVE ]]; then
        ask_state describe_vm
        [[ $state != NONE ]] || state=PROVISIONING # not yet, or not any more
      fi
    else
      ask_state describe_vm
    fi
    [[ $state == "${shown:-}" ]] || say "$name is ${state}"
    shown=$state
    case $state in
      READY) return ;;
      NONE)
        if ! create; then
          ((restarts > 0)) || fail "cannot create $name; for lack of capacity, --queued waits"
          count_restart # it existed before, so the request is right and capacity is what lacks
        fi
        continue
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        [[ ! $queued || $state == SUSPENDED ]] || { sleep "$poll" && continue; } # it will be suspended
        remove || count_failure "delete"
        continue
        ;;
      STOPPED)
        vm start || count_failure "start"
        continue
        ;;
      FAILED) fail "the queued resource $name failed; \`gcloud compute tpus queued-resources describe\` says why" ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        ((unknown < 10)) || fail "cannot ask for the state of $name"
        ;;
    esac
    sleep "$poll"
  done
}

launch() {
  local attempt
  judge_workers
  if [[ $end == running ]]; then
    say "the program is running already; \`stop\` it first to change its arguments"
    return
  fi
  for attempt in 1 2 3 4 5; do # a new machine may take a while to accept connections
    if install && start; then
      return
    fi
    say "attempt $attempt to install and start failed"
    sleep "$poll"
  done
  ask_state describe_vm
  [[ $state == READY ]] || return 0 # gone meanwhile; `watch` will notice
  fail "cannot install or start on $name"
}

# Sets `end` once the program does not run any more.
watch() {
  local unreachable=0
  while :; do
    show_log
    sleep "$poll"
    ask_state describe_vm
    case $state in
      READY) ;;
      UNKNOWN) continue ;; # no news are not bad news: this machine may be offline
      *) end=preempted && return ;;
    esac
    judge_workers
    case $end in
      running) unreachable=0 ;;
      unreachable)
        ((unreachable += 1))
        ((unreachable < 10)) || { end=lost && return; }
        ;;
      failed) # or a pre-emption that the state does not tell yet
        sleep "$poll"
        ask_state describe_vm
        [[ $state == READY || $state == UNKNOWN ]] || end=preempted
        return
        ;;
      *) return ;;
    esac
  done
}

follower=""
show_log() {
  [[ ! $follower ]] || ! kill -0 "$follower" 2>/dev/null || return 0
  set -m # its own process group, so that ssh goes with gcloud
  follow </dev/null 2>/dev/null &
  follower=$!
  set +m
}

hide_log() {
  [[ ! $follower ]] || kill -- "-$follower" 2>/dev/null || true
  follower=""
}

# What Google may refuse for a while is tried again, as often as there may be restarts.
count_failure() {
  say "cannot $1 $name"
  count_restart
}

# Deletes the TPU of a finished program, or says what it costs.
remove_at_last() {
  local attempt
  for attempt in 1 2 3 4 5; do
    ! remove || return 0
    say "attempt $attempt to delete $name failed"
    sleep "$poll"
    ask_state describe_vm
    [[ $state != NONE || $queued ]] || return 0 # gone by itself
  done
  fail "the program has finished, but $name cannot be deleted and is paid for; \`delete\` tries again"
}

restarts=0
count_restart() {
  ((restarts < max_restarts)) || fail "not restarted after $restarts restarts; the same command goes on"
  restarts=$((restarts + 1))
  sleep "$poll"
}

# --- run

plan() {
  archive="${TMPDIR:-/tmp}/piflow_jax.tar.gz"
  pack
  [[ ! $queued ]] || describe_queue
  describe_vm
  echo "# if there is none:"
  create
  echo "# unless the program runs already:"
  ask_workers
  install
  start
  follow
  echo "# every $poll seconds:"
  describe_vm
  ask_workers
  echo "# after a pre-emption, and then again from the second command:"
  remove
  [[ ! $delete ]] || echo "# when the program has finished:"
  [[ ! $delete ]] || remove
}

keep_running() {
  local lost=0
  archive="$(mktemp)" errors="$(mktemp)"
  trap 'hide_log; rm -f "$archive" "$errors"' EXIT
  trap 'say "no longer watched, but not stopped; the same command watches again"; exit 130' INT
  note_commit
  pack
  while :; do
    provide
    launch
    watch
    hide_log
    case $end in
      finished)
        say "finished"
        [[ ! $delete ]] || remove_at_last
        return
        ;;
      halted) say "stopped on request; the same command goes on" && return ;;
      failed) fail "the program failed on $name; \`logs\` shows why, \`delete\` ends the costs" ;;
      lost) # a machine was restarted, or the program and its supervisor were killed
        lost=$((lost + 1))
        ((lost <= 3)) || fail "the program vanished $lost times from $name"
        ;;
    esac
    count_restart
    say "$end; restart $restarts"
  done
}

case $command in
  run) if [[ $dry_run ]]; then plan; else keep_running; fi ;;
  status)
    [[ ! $queued ]] || describe_queue
    describe_vm
    ask_workers
    ;;
  logs) follow ;;
  stop) halt ;;
  delete) remove ;;
esac
