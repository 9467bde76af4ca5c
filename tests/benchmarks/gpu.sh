#!/usr/bin/env bash
# What every recipe costs on a GPU: minutes, peak memory, the time as a multiple of a plain pass.
#
#   tests/benchmarks/gpu.sh OUT                     random checkpoints of the shapes 1B, 3B and 8B (Llama 3's)
#   TEXT=FILE tests/benchmarks/gpu.sh OUT FOLDER    a real one, calibrated on FILE
#   DEVICE=cpu SHAPES=tiny RECIPES="flap best" tests/benchmarks/gpu.sh OUT     whether all of it works, without a GPU
#
# Tables: OUT/NAME.md. The checkpoints stay in OUT/NAME for the next time.
set -euo pipefail
out=${1:?usage: gpu.sh OUT [FOLDER...]}
shift
mkdir -p "$out"
out=$(realpath "$out")
folders=()
for folder in "$@"; do folders+=("$(realpath "$folder")"); done
text=${TEXT:+$(realpath "$TEXT")}
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}

shape() {
  case $1 in
    tiny) echo --hidden 64 --intermediate 160 --layers 2 --heads 4 --kv-heads 2 --vocab 256 --windows 8 --length 32 ;;
    1B) echo --hidden 2048 --intermediate 8192 --layers 16 --heads 32 --kv-heads 8 --vocab 128256 ;;
    3B) echo --hidden 3072 --intermediate 8192 --layers 28 --heads 24 --kv-heads 8 --vocab 128256 ;;
    8B) echo --hidden 4096 --intermediate 14336 --layers 32 --heads 32 --kv-heads 8 --vocab 128256 ;;
    *) echo "SHAPES: unknown $1; expected tiny, 1B, 3B, 8B" >&2; return 1 ;;
  esac
}

measure() { # FOLDER NAME [options...]
  local folder=$1 name=$2
  shift 2
  $python -m tests.benchmarks.device_cost "$folder" --device "${DEVICE:-cuda}" ${RECIPES:+--recipes $RECIPES} "$@" |
    tee "$out/$name.md"
}

for folder in "${folders[@]}"; do
  measure "$folder" "$(basename "$folder")" --text "${text:?TEXT=FILE to calibrate on}"
done
[ $# -eq 0 ] || exit 0
for name in ${SHAPES:-1B 3B 8B}; do
  sizes=$(shape "$name")
  [ -f "$out/$name/calibration.npy" ] ||
    $python -m tests.benchmarks.big_checkpoint "$out/$name" --windows 128 --length 512 $sizes
  measure "$out/$name" "$name"
done
