#!/usr/bin/env bash
# Runs a command as the body of a Slurm job, and puts the job back in the queue when the command was stopped (status 3).
# A job of several tasks also goes back when one of them died and ended the others, at most 20 times; not with status 2.
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
# A signal that ends `wait` while the command ends makes bash forget the command's status: wait for what is over.
while kill -0 "$pid" 2>/dev/null; do
  sleep 0.2 || true
done
status=0
wait "$pid" || status=$?

died=$((${SLURM_NTASKS:-1} > 1 && status != 0 && status != 2 && ${SLURM_RESTART_COUNT:-0} < 20))
if ((status == 3 || died)); then
  # A job that was cancelled is COMPLETING by now: it stays cancelled.
  if [[ $(scontrol show job --oneliner "$SLURM_JOB_ID" || true) =~ JobState=(COMPLETING|CANCELLED) ]]; then
    echo "requeue.sh: job $SLURM_JOB_ID was cancelled; submit it again to go on"
  else
    echo "requeue.sh: job $SLURM_JOB_ID goes back in the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
