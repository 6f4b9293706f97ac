#!/usr/bin/env bash
# Everything that a GPU changes, measured in one command, without a network and in under nine minutes:
#   bash benchmarks/gpu.sh [WHEELS_DIR] [options of gpu.py]
# The machine has one GPU and a Python (PYTHON, by default python3) with a torch for CUDA. WHEELS_DIR holds the other
# packages (tools/fetch_wheels.sh made it elsewhere); they are unpacked into a temporary folder, not installed. They come
# before what the machine's Python has itself, and none of them is torch or one of the packages that come with it.
# One H200 has run it: results/README.md.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
path=$PWD
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  [ -d "$1" ] || { echo "error: $1 is no folder of wheels; make it with tools/fetch_wheels.sh." >&2; exit 2; }
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -c 'if True:
    import pathlib, sys, zipfile
    for wheel in sorted(pathlib.Path(sys.argv[1]).rglob("*.whl")):
        zipfile.ZipFile(wheel).extractall(sys.argv[2])' "$1" "$site"
  path=$path:$site
  shift
fi
"$python" -c 'import torch' 2>/dev/null ||
  { echo "error: $python has no torch; name another with PYTHON=/path/to/python." >&2; exit 2; }
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 CUDA_DEVICE_MAX_CONNECTIONS=1
"$python" benchmarks/gpu.py "$@"
