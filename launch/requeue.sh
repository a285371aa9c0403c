#!/usr/bin/env bash
# Runs a command as the body of a Slurm job, and puts the job back in the queue when the command was stopped (status 3).
set -euo pipefail

(($#)) || { echo "usage: launch/requeue.sh COMMAND [ARGUMENT ...]   (within a Slurm job)" >&2; exit 2; }
: "${SLURM_JOB_ID:?requeue.sh runs within a Slurm job; submit one with sbatch}"

pid='' stopped=''
forward() {
  stopped=1
  [[ -z $pid ]] || kill -s TERM "$pid" 2>/dev/null || true
}
trap forward TERM INT # before the command starts: a signal may come at once
"$@" &
pid=$!
[[ -z $stopped ]] || forward
status=0
wait "$pid" || status=$?
while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the command
  status=0
  wait "$pid" || status=$?
done

if ((status == 3)); then
  # A job that was cancelled is COMPLETING by now: it stays cancelled.
  if [[ $(scontrol show job --oneliner "$SLURM_JOB_ID" || true) =~ JobState=(COMPLETING|CANCELLED) ]]; then
    echo "requeue.sh: job $SLURM_JOB_ID was cancelled; submit it again to go on"
  else
    echo "requeue.sh: job $SLURM_JOB_ID goes back in the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
