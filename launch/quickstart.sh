#!/usr/bin/env bash
# The quickstart: the packaged tiny model learns to answer a message with JSON. Offline, under two minutes on two cores.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
  echo "usage: launch/quickstart.sh [WORKDIR, by default runs/quickstart] [--config.section.key=value ...]"
  exit
fi
if [[ $# -gt 0 && $1 != -* ]]; then
  workdir=$1
  shift
else
  workdir=runs/quickstart
fi
if [[ $# -gt 0 && $1 != -* ]]; then
  echo "usage: launch/quickstart.sh [WORKDIR] [--config.section.key=value ...]" >&2
  exit 2
fi
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
exec "$launch/train.sh" --config="${launch%/*}/configs/quickstart.py" --workdir="$workdir" "$@"
