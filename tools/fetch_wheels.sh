#!/usr/bin/env bash
# Gather the wheels that benchmarks/gpu.sh needs on a machine without a network, in folders that are easy to carry:
#   bash tools/fetch_wheels.sh DIR [--have FILE] [--python 3.12] [--list]
# They are the locked packages of requirements/runtime.txt for Linux on x86_64, in DIR/1, DIR/2, ..., each below 60 MB.
# Left out are torch, what comes with it, and what FILE names: what "python -m pip freeze" says on that machine.
# --list only names them. Then, there: bash benchmarks/gpu.sh DIR
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { echo "error: $1; see the head of tools/fetch_wheels.sh." >&2; exit 2; }
limit=$((60 * 1000 * 1000))
target= have=/dev/null version=3.12 list=
while [ $# -gt 0 ]; do
  case $1 in
    --have) [ -f "${2:-}" ] || usage "--have needs a file"; have=$(realpath "$2"); shift ;;
    --python) [ -n "${2:-}" ] || usage "--python needs a version"; version=$2; shift ;;
    --list) list=1 ;;
    -*) usage "$1 is unknown" ;;
    *) target=$1 ;;
  esac
  shift
done

# torch and its own requirements; plots, preprocessing and W&B, which no part of the benchmark uses.
left_out='^(torch|triton|nvidia-.*|cuda-.*|sympy|mpmath|networkx|jinja2|markupsafe|fsspec|filelock|typing-extensions'
left_out+='|setuptools|matplotlib|contourpy|cycler|fonttools|kiwisolver|pillow|pyparsing|datatrove|pyarrow|wandb)$'
names=$(grep -oE '^[A-Za-z0-9][A-Za-z0-9._-]*==[^ ;\\]+' requirements/runtime.txt | while IFS= read -r pin; do
  name=${pin%%==*}
  if ! grep -qE "$left_out" <<<"$name" && ! tr '_' '-' <"$have" | grep -qiE "^$name(==| @|$)"; then
    echo "$pin"
  fi
done)
if [ -n "$list" ]; then echo "$names"; exit; fi
[ -n "$target" ] || usage "name a folder"

python=${PYTHON:-python3}
mkdir -p "$target"
target=$(realpath "$target")
loose=$(mktemp -d "$target/.loose-XXXXXX")
trap 'rm -rf "$loose"' EXIT
# shellcheck disable=SC2086  # a pin a word
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$loose" --implementation cp --abi "cp${version/./}" \
  --abi abi3 --abi none --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 $names
batch=0 size=$limit
for wheel in "$loose"/*.whl; do
  bytes=$(stat -c %s "$wheel")
  [ "$bytes" -lt "$limit" ] || { echo "error: $(basename "$wheel") alone has $bytes bytes, over 60 MB." >&2; exit 1; }
  if [ $((size + bytes)) -ge "$limit" ]; then
    batch=$((batch + 1)) size=0
    mkdir -p "$target/$batch"
  fi
  size=$((size + bytes))
  mv "$wheel" "$target/$batch/"
done
echo "$batch folders in $target; then, on the other machine: bash benchmarks/gpu.sh $target"
