#!/usr/bin/env bash
# What only a GPU can tell, the most wanted first: its tests, and the figures that lie beside those of CPUs.
#
#   bash benchmarks/gpu.sh [NAME] [FOLDER]
#
# NAME ends the names of the results, as in moe_layer_h200.md; FOLDER is benchmarks/results unless told. Each part has a
# time limit; of layers and steps, what was measured by then is kept. Exit code 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
name=${1:-gpu} results=${2:-benchmarks/results}
failed=0

part() {
  local seconds=$1
  shift
  echo "== $*"
  timeout --signal INT --kill-after 20 "$seconds" "$@" || { echo "== exit code $? (124: over $seconds s)" && failed=1; }
}

part 240 python -m pytest -m gpu
part 300 python -m benchmarks.moe_layer --output "$results/moe_layer_$name.md"
part 600 python -m benchmarks.training_step --output "$results/training_step_$name.json"
part 240 python -m benchmarks.compiled_blocks --dim 2048 --tokens 2048 --batch 4 --dtypes bfloat16 \
  --output "$results/compiled_blocks_$name.md"
for recipe in gpt2_reference mosaic_small; do
  part 90 python -m mosaic_dist profile "recipes/$recipe.py" --output "$results/profile_${recipe}_$name"
done
exit $failed
