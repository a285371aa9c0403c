# shellcheck shell=bash
# Sourced by train.sh and sweep_lr.sh.

# claim_gpus [MOST]: sets the array `gpus` to the CUDA devices this process may use, one entry a device; one empty entry
# where there is nothing to choose: no nvidia-smi, or one that fails. A CUDA_VISIBLE_DEVICES that is set is kept. A GPU is
# free when nvidia-smi shows less than 1 GiB in use and no other script here has claimed it: jobs started together would
# all see the same idle GPU. The claim is a lock on an open file, so it ends with the last process that inherits it.
claim_gpus() {
  local most=${1:-1000} listing index used lock claim
  gpus=()
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    ((${#gpus[@]})) || gpus=("")
    return
  fi
  if ! command -v nvidia-smi >/dev/null; then
    gpus=("")
    return
  fi
  if ! listing=$(nvidia-smi --query-gpu=index,memory.used --format=csv,noheader,nounits); then
    echo "${0##*/}: nvidia-smi fails; no GPU is chosen" >&2
    gpus=("")
    return
  fi
  export CUDA_DEVICE_ORDER=PCI_BUS_ID # the numbers nvidia-smi shows; CUDA's own order is fastest first
  while IFS=', ' read -r index used && ((${#gpus[@]} < most)); do
    if ! [[ $used =~ ^[0-9]+$ ]] || ((used >= 1024)); then continue; fi
    lock=${XDG_RUNTIME_DIR:-/tmp}/jaxtune-$UID-gpu$index.lock
    exec {claim}>"$lock"
    if flock -n "$claim"; then gpus+=("$index"); else exec {claim}>&-; fi
  done <<<"$listing"
  if ((${#gpus[@]} == 0)); then
    echo "${0##*/}: no GPU is free; to share one, set CUDA_VISIBLE_DEVICES. Memory used (index, MiB):" >&2
    echo "$listing" >&2
    exit 1
  fi
}
