#!/usr/bin/env bash
# Runs one process of a run and notes how it ended. `piflow_jax.main` exits 0 both when it has finished
# and when SIGTERM made it save and leave; only who saw the signal can tell the two apart.
set -euo pipefail

usage() {
  cat <<'END'
usage: worker.sh run [--dir=DIR] COMMAND [ARGUMENT...]
       worker.sh state --dir=DIR
       worker.sh halt --dir=DIR

run    starts COMMAND and passes SIGTERM on to it. An end with status 0, or by the signal, after
       a SIGTERM is "stopped".
       Without --dir the exit status is COMMAND's, but 143 if stopped.
       With --dir, DIR/<SLURM_PROCID or 0> gets a line: finished, stopped, halted or failed
       <status>; the exit status is COMMAND's, but 0 if stopped, so that srun does not kill the
       processes that are still saving.
state  prints "worker: " and that line; or running, lost (no process and no line) or none.
halt   sends SIGTERM; the end is "halted" instead of "stopped", and nobody restarts it.
END
}

refuse() {
  echo "worker.sh: $*" >&2
  usage >&2
  exit 2
}

# A process id may have gone to another program since, after a reboot for one.
alive() {
  local pid
  pid="$(cat "$record.pid" 2>/dev/null)" || return 1
  [[ "$(ps -o args= -p "$pid" 2>/dev/null)" == *worker.sh*run* ]]
}

# In this order: a process that ends meanwhile has left its line before it is gone.
state() {
  if alive; then
    echo running
  elif [[ -s $record ]]; then
    cat "$record"
  elif [[ -e $record.pid ]]; then
    echo lost
  else
    echo none
  fi
}

supervise() {
  local child="" signals=0 seen code end
  if [[ $dir ]]; then
    mkdir -p "$dir"
    echo $$ >"$record.pid"
    rm -f "$record" "$record.halted"
  fi
  trap 'signals=$((signals + 1)); [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  "$@" &
  child=$!
  ((signals == 0)) || kill -TERM "$child" # it came before there was a child
  while :; do  # a signal ends `wait` early, with a status that is not the child's
    seen=$signals code=0
    wait "$child" || code=$?
    ((signals != seen)) || break
  done
  if ((signals > 0 && code == 0 || code == 143)); then
    end=stopped
  elif ((code == 0)); then
    end=finished
  else
    end="failed $code"
  fi
  if [[ ! $dir ]]; then
    [[ $end != stopped ]] || code=143
    exit "$code"
  fi
  if [[ $end == stopped ]]; then
    code=0
    [[ ! -e $record.halted ]] || end=halted
  fi
  # In one piece: the file must never be seen half-written.
  echo "$end" >"$record.new"
  mv "$record.new" "$record"
  exit "$code"
}

action="${1:-}"
shift || true
dir=""
if [[ ${1:-} == --dir=?* ]]; then
  dir="${1#*=}"
  shift
fi
record="$dir/${SLURM_PROCID:-0}"

case $action in
  run)
    (($# > 0)) || refuse "no command"
    supervise "$@"
    ;;
  state | halt)
    [[ $dir ]] || refuse "no --dir"
    (($# == 0)) || refuse "unexpected '$1'"
    if [[ $action == state ]]; then
      echo "worker: $(state)"
    elif alive; then
      touch "$record.halted"
      kill -TERM "$(cat "$record.pid")"
    fi
    ;;
  -h | --help) usage ;;
  *) refuse "run, state or halt, not '$action'" ;;
esac
