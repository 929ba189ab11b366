#!/usr/bin/env bash
# A run on TPUs of a GKE cluster that xpk made.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
usage: launch/xpk.sh run NAME --cluster=NAME --tpu-type=TYPE [OPTION...] \
                     -- --config=FILE --workdir=DIR [--config.KEY=VALUE...]
       launch/xpk.sh status|logs|delete NAME --cluster=NAME [OPTION...]

run     submits the workload; the cluster restarts it after pre-emptions
status  what xpk lists about it
logs    follows the first process of the first slice, with kubectl
delete  stops and removes it

  --cluster=NAME       a cluster made by xpk
  --tpu-type=TYPE      such as v5litepod-16
  --num-slices=N       (1)
  --project=ID         --zone=ZONE
  --max-restarts=N     (100)
  --grace=SECONDS      between SIGTERM and SIGKILL; saving has to fit into it (180)
  --base-image=IMAGE   image with Python 3.11 or later; xpk adds the committed code (python:3.12)
  --setup=COMMAND      run in the container before the program (pip install -q -e '.[tpu]', with
                       the further extras that the run needs)
  --image=IMAGE        an image with everything, this repository as its working directory; used as
                       it is, instead of --base-image, and without --setup's default
  --xpk-flag=FLAG      handed to `xpk workload create` as it is, such as --storage=NAME; may be
                       repeated
  --dry-run            print the commands, run none

DIR is in a bucket, gs://bucket/run, or on storage that all pods share.
END
}

command="${1:-}"
case $command in
  run | status | logs | delete) shift ;;
  -h | --help) usage && exit ;;
  *) refuse "the first argument must be run, status, logs or delete, not '$command'" ;;
esac
name="" cluster="" tpu_type="" slices=1 max_restarts=100 grace=180 dry_run=""
base_image="" image="" setup="" flags=() place=()
while (($# > 0)); do
  case $1 in
    -h | --help) usage && exit ;;
    --cluster=?*) cluster="${1#*=}" ;;
    --tpu-type=?*) tpu_type="${1#*=}" ;;
    --num-slices=*) slices="${1#*=}" ;;
    --project=?* | --zone=?*) place+=("$1") ;;
    --max-restarts=*) max_restarts="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --base-image=?*) base_image="${1#*=}" ;;
    --image=?*) image="${1#*=}" ;;
    --setup=?*) setup="${1#*=}" ;;
    --xpk-flag=?*) flags+=("${1#*=}") ;;
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
[[ $cluster ]] || refuse "no --cluster"
check_number --num-slices slices
check_number --max-restarts max_restarts
check_number --grace grace

if [[ $command != run ]]; then
  (($# == 0)) || refuse "$command takes no arguments of a run"
  case $command in
    status) run xpk workload list "--cluster=$cluster" "--filter-by-job=$name" "${place[@]}" ;;
    delete) run xpk workload delete "--workload=$name" "--cluster=$cluster" --force "${place[@]}" ;;
    logs)
      selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0"
      selector+=",batch.kubernetes.io/job-completion-index=0"
      run kubectl logs --follow --all-containers "--selector=$selector"
      ;;
  esac
  exit
fi

[[ ${1:-} == -- ]] || refuse "no arguments of the run; they follow --"
shift
job=("$@")
check_job "${job[@]}"
[[ $tpu_type ]] || refuse "no --tpu-type"
[[ ! $image || ! $base_image ]] || refuse "--image and --base-image exclude each other"
[[ $image || $setup ]] || setup="pip install -q -e '.[$(extras "${job[@]}")]'"

# `exec`: xpk sends SIGTERM to the shell of this command, and worker.sh has to be that process.
# worker.sh exits 143 when it was stopped. xpk restarts on 42 and 127 to 255, so on this and on
# crashes, and ends the workload on 0 (finished) and on 1 and 2 (the program's errors).
work="${setup:+$setup && }exec $(quoted bash launch/worker.sh run python -m piflow_jax.main "${job[@]}")"
# shellcheck disable=SC2016 # not meant to expand
case $work in
  *'$('* | *'$$'* | *$'\n'*) refuse "Kubernetes would change '\$(', '\$\$' or a line break: $work" ;;
esac

create=(
  xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$tpu_type"
  "--num-slices=$slices" "--max-restarts=$max_restarts"
  "--termination-grace-period-seconds=$grace" "${place[@]}"
)
if [[ $image ]]; then
  run "${create[@]}" "--docker-image=$image" "--command=$work" "${flags[@]}"
  exit
fi
stage="${TMPDIR:-/tmp}/piflow_jax.XXXXXX"
if [[ ! $dry_run ]]; then
  stage="$(mktemp -d "$stage")"
  trap 'rm -rf "$stage"' EXIT
  note_commit
fi
run mkdir -p "$stage/code"
run git -C "$root" archive --format=tar "--output=$stage/code.tar" HEAD
run tar -xf "$stage/code.tar" -C "$stage/code"
run "${create[@]}" "--base-docker-image=${base_image:-python:3.12}" "--script-dir=$stage/code" \
  "--command=$work" "${flags[@]}"
