#!/usr/bin/env bash
# `jaxtune train` on one free GPU.
set -euo pipefail

if (($# == 0)); then
  cat >&2 <<USAGE
usage: launch/train.sh --config=FILE.py --workdir=DIR [--config.section.key=value ...]

Picks a free GPU where there is one (or the CUDA_VISIBLE_DEVICES that is set) and becomes \`jaxtune train\`, so that
signals reach it and its exit status is yours. The same command goes on with a run that was stopped (status 3).
USAGE
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=gpus.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpus.sh"

command -v jaxtune >/dev/null || { echo "train.sh: jaxtune is not on PATH: pip install -e ." >&2; exit 2; }
claim_gpus 1
if [[ -n ${gpus[0]} && -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
  export CUDA_VISIBLE_DEVICES=${gpus[0]}
  echo "train.sh: GPU $CUDA_VISIBLE_DEVICES" >&2
fi
exec jaxtune train "$@"
