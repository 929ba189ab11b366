# shellcheck shell=bash
# Sourced by the launch scripts. They define `usage` and set `dry_run` (empty or 1) and `job` (what
# follows `--`: the arguments of piflow_jax.main).

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$0: needs bash 4.4 or later, this is $BASH_VERSION" >&2
  exit 1
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() {
  echo "launch: $*" >&2
}

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# For mistakes of the caller.
refuse() {
  echo "${0##*/}: $*" >&2
  usage >&2
  exit 2
}

# One line that a shell reads back as the same words. Not `printf %q`: its backslashes are hard to read
# in the commands that contain commands.
quoted() {
  local word line="" apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$apostrophe/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# A count in the variable $2, so that arithmetic never sees anything else; without leading zeros, which
# would make it octal.
check_number() {
  [[ ${!2} =~ ^[0-9]{1,9}$ ]] || refuse "$1 must be a whole number, got '${!2}'"
  printf -v "$2" %d "$((10#${!2}))"
}

# Sets `workdir`. Mistakes that can be seen here should not cost a machine first.
check_job() {
  local argument config=""
  workdir=""
  for argument in "$@"; do
    case $argument in
      *$'\n'*) refuse "an argument of the run contains a line break: $(quoted "$argument")" ;;
      --config=?*) config=1 ;;
      --workdir=?*) workdir="${argument#*=}" ;;
      --*) ;;
      *) refuse "'$argument' is no argument of piflow_jax.main, which are --key=value" ;;
    esac
  done
  [[ $config ]] || refuse "no --config=FILE after --"
  [[ $workdir ]] || refuse "no --workdir=DIRECTORY after --"
}

# The extras of the package that a job with these arguments needs on a TPU.
extras() {
  local found=tpu
  case "$*" in *gs://*) found+=,gcs ;; esac
  case "$*" in *hf:*) found+=,hub ;; esac
  case "$*" in *base_dtype=int[48]* | *base_dtype=float8*) found+=,qwix ;; esac
  case "$* " in
    *data.text_encoder=* | *evaluation.clip=* | *.parquet*) found+=,text ;;
    *.pth[\ \'\"@,]* | *.pt[\ \'\"@,]* | *.ckpt[\ \'\"@,]* | *.bin[\ \'\"@,]*) found+=,torch ;;
  esac
  echo "$found"
}

# The program's code is what is committed, so that a log can name it.
note_commit() {
  local changes
  say "code of commit $(git -C "$root" rev-parse --short HEAD)"
  changes="$(git -C "$root" status --porcelain)"
  [[ ! $changes ]] || say "warning: changes that are not committed are left behind"
}
