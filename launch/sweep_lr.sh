#!/usr/bin/env bash
# One `jaxtune train` a learning rate: what is finished is skipped, what was stopped goes on, a failure stops no other.
set -euo pipefail

wrong() {
  [[ -z ${1-} ]] || echo "sweep_lr.sh: $1" >&2
  cat >&2 <<USAGE
usage: launch/sweep_lr.sh CONFIG OUTDIR LR [LR ...] [-- flags of jaxtune train]

Trains in OUTDIR/lr=LR (its output in jaxtune.log there), one process a free GPU, or one at a time without GPUs. The
GPUs can be named by CUDA_VISIBLE_DEVICES. Ends with a table sorted by evaluation loss, also in OUTDIR/sweep.csv.
PYTHON names the interpreter that has jaxtune (by default python3). Start it again to go on, or with more rates.

exit status
  0  all rates are trained
  1  a rate failed; the others are trained
  2  the command line is wrong
  3  stopped by a signal; the same command goes on
USAGE
  exit 2
}

(($# >= 3)) || wrong
config=$1 outdir=${2%/}
shift 2
rates=() values=" "
while (($#)) && [[ $1 != -- ]]; do
  [[ $1 =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ && $1 =~ ^[^eE]*[1-9] ]] ||
    wrong "'$1' is not a learning rate: expected a positive number such as 1e-4; flags follow a --"
  LC_ALL=C printf -v value %.9g "$1" # elsewhere printf may want a decimal comma
  [[ $values != *" $value "* ]] || wrong "the learning rate $1 is given twice"
  values+="$value "
  rates+=("$1")
  shift
done
flags=("${@:2}")
((${#rates[@]})) || wrong "no learning rate is given"
[[ -f $config ]] || wrong "CONFIG: there is no file $config"
for flag in "${flags[@]}"; do
  case $flag in
    --config | --config=* | --workdir | --workdir=* | --config.optim.lr | --config.optim.lr=*)
      wrong "$flag: the sweep sets this itself" ;;
  esac
done
python=${PYTHON:-python3}
command -v jaxtune >/dev/null || wrong "jaxtune is not on PATH: pip install -e ."
"$python" -c "import jaxtune.report.sweep_table" || wrong "$python cannot import jaxtune; name the interpreter: PYTHON=..."

finished() { [[ -f $1/summary.json && (-d $1/adapter || -d $1/model) ]]; }

queue=()
for rate in "${rates[@]}"; do
  run=$outdir/lr=$rate
  mkdir -p "$run"
  if finished "$run"; then echo "lr=$rate: finished before"; else queue+=("$rate"); fi
done
"$python" -m jaxtune.report.sweep_table --plan "$outdir" # sweep.json, for the page and the table

# shellcheck source-path=SCRIPTDIR source=gpus.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpus.sh"
((${#queue[@]} == 0)) || claim_gpus "${#queue[@]}"

declare -A rate_of=() gpu_of=() # by process id; what runs now
stopping="" failed=0 stopped=0

# The first signal lets every run save (TERM); one more interrupts them at once, as `jaxtune train` does at a second ^C.
# shellcheck disable=SC2317 # the trap calls it
stop() {
  local signal=TERM
  [[ -z $stopping ]] || signal=INT
  stopping=yes
  ((${#rate_of[@]} == 0)) || kill -s "$signal" "${!rate_of[@]}" 2>/dev/null || true
}
trap stop TERM INT HUP

start() { # RATE GPU
  local run=$outdir/lr=$1
  rm -f "$run/exit_status"
  echo "lr=$1: started${2:+ on GPU $2}, log in $run/jaxtune.log"
  # Without a GPU to name, CUDA_VISIBLE_DEVICES stays as it is.
  env ${2:+"CUDA_VISIBLE_DEVICES=$2"} jaxtune train --config="$config" --workdir="$run" "${flags[@]}" \
    --config.optim.lr="$1" </dev/null >>"$run/jaxtune.log" 2>&1 &
  rate_of[$!]=$1 gpu_of[$!]=$2
  [[ -z $stopping ]] || kill -s TERM "$!" # the signal came before the line above
}

collect() { # PID of a run that ended
  local rate=${rate_of[$1]} status=0
  wait "$1" || status=$?
  gpus+=("${gpu_of[$1]}")
  unset "rate_of[$1]" "gpu_of[$1]"
  echo "$status" >"$outdir/lr=$rate/exit_status"
  case $status in
    0) echo "lr=$rate: finished" ;;
    3 | 130 | 143) stopped=$((stopped + 1)) && echo "lr=$rate: stopped" ;;
    *) failed=$((failed + 1)) && echo "lr=$rate: failed with exit status $status" ;;
  esac
}

while ((${#rate_of[@]})) || [[ -z $stopping && ${#queue[@]} -gt 0 ]]; do
  while [[ -z $stopping && ${#queue[@]} -gt 0 && ${#gpus[@]} -gt 0 ]]; do
    start "${queue[0]}" "${gpus[0]}"
    queue=("${queue[@]:1}") gpus=("${gpus[@]:1}")
  done
  sleep 0.2 || true # `wait -n -p` would do, in bash 5.1; a signal ends it
  for pid in "${!rate_of[@]}"; do
    kill -0 "$pid" 2>/dev/null || collect "$pid"
  done
done

"$python" -m jaxtune.report.sweep_table "$outdir"
if ((stopped + ${#queue[@]})); then
  echo "sweep_lr.sh: stopped; the same command goes on" >&2
  exit 3
fi
exit $((failed > 0))
