#!/usr/bin/env bash
# A run on GPUs of a Slurm cluster.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
usage: launch/gpu.sh [OPTION...] -- --config=FILE --workdir=DIR [--config.KEY=VALUE...]

Submits a Slurm job with one process per GPU. The job puts itself back into the queue when it was
pre-empted or reached its time limit, and ends when the run has finished or failed.
Run it from a checkout on a file system that all nodes share; DIR must be on one too.

  --nodes=N            nodes (1)
  --gpus-per-node=N    GPUs, and processes, per node (8)
  --cpus-per-task=N    cores per process (the cluster's default)
  --time=LIMIT         Slurm's time limit of one attempt (the cluster's default)
  --partition=NAME     --account=NAME     --qos=NAME
  --job-name=NAME      (piflow)
  --grace=SECONDS      SIGTERM so long before the time limit; saving has to fit into it (180)
  --max-restarts=N     attempts after the first (100)
  --setup=COMMAND      run on the first node before the processes, such as 'module load cuda'
  --python=PATH        (python)
  --logs=DIR           log and status of the job (runs/launch)
  --sbatch-flag=FLAG   handed to sbatch as it is; may be repeated
  --dry-run            print the commands and the batch script, run nothing
END
}

nodes=1 gpus=8 cpus="" job_name=piflow grace=180 max_restarts=100
setup=: python=python logs="runs/launch" dry_run="" flags=()
while (($# > 0)); do
  case $1 in
    -h | --help) usage && exit ;;
    --nodes=*) nodes="${1#*=}" ;;
    --gpus-per-node=*) gpus="${1#*=}" ;;
    --cpus-per-task=*) cpus="${1#*=}" ;;
    --time=?* | --partition=?* | --account=?* | --qos=?*) flags+=("$1") ;;
    --job-name=?*) job_name="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --max-restarts=*) max_restarts="${1#*=}" ;;
    --setup=?*) setup="${1#*=}" ;;
    --python=?*) python="${1#*=}" ;;
    --logs=?*) logs="${1#*=}" ;;
    --sbatch-flag=?*) flags+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --) break ;;
    *) refuse "unknown argument '$1'" ;;
  esac
  shift
done
[[ ${1:-} == -- ]] || refuse "no arguments of the run; they follow --"
shift
job=("$@")
check_job "${job[@]}"
check_number --nodes nodes
check_number --gpus-per-node gpus
check_number --grace grace
check_number --max-restarts max_restarts
((nodes > 0 && gpus > 0)) || refuse "--nodes and --gpus-per-node must be at least 1"
[[ $job_name =~ ^[A-Za-z0-9._-]+$ ]] || refuse "--job-name may have letters, digits, '.', '_' and '-'"
step=(srun --kill-on-bad-exit=1 --label)
if [[ $cpus ]]; then
  check_number --cpus-per-task cpus
  flags+=("--cpus-per-task=$cpus")
  step+=("--cpus-per-task=$cpus") # since Slurm 22.05 srun does not take it over from sbatch
fi
[[ $logs == /* ]] || logs="$root/$logs"

# All processes of a node see all of its GPUs, no --gpus-per-task: on Slurm JAX takes the device with
# the number of the local process.
# --signal without "B:" reaches the processes and not this script, as does the notice of a pre-emption
# on most clusters. Where it does reach the script, the trap keeps it alive until they have saved.
# Slurm itself requeues a job whose node failed or whose pre-emption gave no time (--requeue).
# A job that leaves within its notice counts as completed, so it has to ask. It must not ask when
# somebody has cancelled it (scancel): Slurm would start it again.
batch="$(
  cat <<END
#!/usr/bin/env bash
set -euo pipefail
trap : TERM
cd $(quoted "$root")
$setup
status=$(quoted "$logs/$job_name")-"\$SLURM_JOB_ID".status
rm -rf "\$status"
code=0
$(quoted "${step[@]}" bash launch/worker.sh run) --dir="\$status" $(quoted "$python" -m piflow_jax.main "${job[@]}") || code=\$?
if ((code != 0)); then
  echo "launch: failed with status \$code; not restarted"
  exit "\$code"
fi
if ! grep -qrx stopped "\$status"; then
  if ! grep -qrx finished "\$status"; then
    echo "launch: no process left its status in \$status; do the nodes share it?"
    exit 1
  fi
  echo "launch: finished"
  exit 0
fi
state="\$(squeue --noheader --jobs="\$SLURM_JOB_ID" --format=%T)"
if [[ \$state != RUNNING ]]; then
  echo "launch: stopped and saved; the job is \$state, so Slurm decides what comes next"
elif ((\${SLURM_RESTART_COUNT:-0} >= $max_restarts)); then
  echo "launch: stopped and saved; not restarted after \$SLURM_RESTART_COUNT restarts"
  exit 1
else
  echo "launch: stopped and saved; back into the queue"
  scontrol requeue "\$SLURM_JOB_ID"
fi
END
)"

submit=(
  sbatch --parsable "--job-name=$job_name" "--nodes=$nodes" "--ntasks-per-node=$gpus"
  "--gpus-per-node=$gpus" "--signal=TERM@$grace" --requeue --open-mode=append
  "--output=$logs/%x-%j.log" "${flags[@]}"
)

run mkdir -p "$logs"
if [[ $dry_run ]]; then
  echo "$(quoted "${submit[@]}") <<'END_OF_BATCH_SCRIPT'"
  echo "$batch"
  echo "END_OF_BATCH_SCRIPT"
  exit
fi
id="$("${submit[@]}" <<<"$batch")"
id="${id%%;*}" # with several clusters: id;cluster
say "job $id; log: $logs/$job_name-$id.log"
say "to stop it: scancel $id"
