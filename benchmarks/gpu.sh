#!/usr/bin/env bash
# What only a GPU can tell, the most wanted first. What the probe found and a compact table come last.
#
#   bash benchmarks/gpu.sh [NAME] [FOLDER]
#
# NAME ends the names of the results, as in moe_layer_h200.md; FOLDER is benchmarks/results unless told. Every part has
# a time limit, and all together end within LIMIT seconds (480): what is left over is left out. Of layers and steps,
# what was measured by then is kept. Exit code 1 where a part failed. With TINY=1 all sizes are the smallest, for any
# machine; with SLOW=3 all limits are three times as long. ONLY='probe|tests' runs parts of these names.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
name=${1:-gpu} results=${2:-benchmarks/results} slow=${SLOW:-1} limit=$((${LIMIT:-480} * ${SLOW:-1}))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
failed=0 table=()

part() { # NAME SECONDS COMMAND...: its output, and its row of the table
  local part=$1 seconds=$(($2 * slow)) left=$((limit - SECONDS)) begun=$SECONDS code=0 last
  shift 2
  [[ $part =~ ^(${ONLY:-.*})$ ]] || return
  [ "$seconds" -gt "$left" ] && seconds=$left
  if [ "$seconds" -lt 5 ]; then
    table+=("$(printf '%-26s left out: no time' "$part")")
    return
  fi
  echo "== $part: $*"
  timeout --signal INT --kill-after 10 "$seconds" "$@" >"$scratch/log" 2>&1 || code=$?
  cat "$scratch/log"
  [ "$code" -ne 0 ] && failed=1 && echo "== exit code $code (124: over $seconds s)"
  last=$(grep -E ' (passed|failed|skipped)|[Ee]rror:|tokens/s|done:|^\| ours|FAILED' "$scratch/log" | tail -1)
  table+=("$(printf '%-26s exit %-3s %4d s  %s' "$part" "$code" $((SECONDS - begun)) "${last:0:110}")")
}

# sizes: those of a GPU, and the smallest
scale=(--scale full --rounds 3)
compiled=(--dim 2048 --tokens 2048 --batch 4 --rounds 5 --dtypes bfloat16)
layer=()
recipes=(mosaic_small gpt2_reference)
run=(recipes/t4_moe.py --steps 30 --schedule.warmup_steps 3 --batch_tokens 8192 --micro_batch_size 64 --precision bf16)
samples=2000 held_out=64 stop=16
if [ -n "${TINY:-}" ]; then
  scale=(--scale tiny --rounds 1)
  compiled=(--dim 64 --layers 1 --tokens 32 --rounds 1 --dtypes bfloat16 --blocks dense)
  layer=(--sizes 64x64x64x4x2 --rounds 1)
  run=(recipes/t4_moe.py --steps 4 --schedule.warmup_steps 1 --batch_tokens 512 --micro_batch_size 4 --model.dim 64
    --model.layers.attention.heads 2 --model.embedding.rank 16 --precision bf16)
  recipes=(gpt2_reference) samples=200 held_out=8 stop=2
fi
run+=(--model.vocab_size 18 --model.max_seq_len 64 --data "$scratch/data" --output "$scratch/run" --ds_config ds_configs/zero1.json
  --checkpoint.every_steps "$stop" --validate_every_steps "$stop" --validation_samples "$held_out")
# only these files: others need packages that a machine for measurements may lack
mapfile -t tests < <(grep -rl 'mark\.gpu' --include='test_*.py' tests | LC_ALL=C sort)

part probe 100 python -m benchmarks.gpu_probe
grep -E '^[^ (].{33} ' "$scratch/log" | cut -c1-130 >"$scratch/probe"
part tests 120 python -m pytest -m gpu -p no:cacheprovider --timeout 90 "${tests[@]}"
if python -c 'import streaming' 2>"$scratch/log"; then
  part data 30 python -m data_prep.arithmetic --output "$scratch/data" --samples "$samples" --seq_len 64
  part train 50 python "${run[@]}" --stop_at_step "$stop"
  part resume 50 python "${run[@]}"
else
  table+=("$(printf '%-26s left out: %s' 'data, train, resume' "$(tail -1 "$scratch/log")")")
fi
for recipe in "${recipes[@]}"; do
  part "step of $recipe" 110 python -m benchmarks.training_step --recipes "$recipe" --dtype bf16 "${scale[@]}" \
    --output "$results/training_step_${recipe}_$name.json"
done
part 'compiled blocks' 70 python -m benchmarks.compiled_blocks "${compiled[@]}" \
  --output "$results/compiled_blocks_$name.md"
part 'MoE layer' 90 python -m benchmarks.moe_layer "${layer[@]}" --output "$results/moe_layer_$name.md"
for recipe in "${recipes[@]}"; do
  [ -n "${TINY:-}" ] || part "profile of $recipe" 60 python -m mosaic_dist profile "recipes/$recipe.py" \
    --output "$results/profile_${recipe}_$name"
done
echo "== probe" && cat "$scratch/probe"
echo "== parts ($SECONDS s)"
printf '%s\n' "${table[@]}"
exit $failed
