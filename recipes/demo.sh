#!/usr/bin/env bash
# The whole path on any machine: tokenizer, shards, training, a stop and a resume, export, generated text.
# usage: recipes/demo.sh [CORPUS] [STEPS]    CORPUS: "stdlib" or a folder of text; results go to demo/<corpus>/
set -euo pipefail
cd "$(dirname "$0")/.."

corpus=${1:-stdlib}
out=demo/$(basename "$corpus")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  steps=${2:-400}
  ranks=$gpus
  layout=()
else
  steps=${2:-420}
  ranks=2
  layout=(--expert_parallel 2 --batch_tokens 1024 --micro_batch_size 1)
fi

show() { # print a command, then run it
  printf '\n$ %s\n' "$*"
  "$@"
}

mkdir -p "$out"
[ -e "$out/tokenizer.json" ] ||
  show python -m data_prep.train_tokenizer --input "$corpus" --vocab_size 8192 --output "$out/tokenizer.json"
[ -e "$out/data" ] ||
  show python -m data_prep.tokenize_to_mds --input "$corpus" --tokenizer "$out/tokenizer.json" --output "$out/data" --seq_len 512 --validation_fraction 0.05

train=(deepspeed --num_gpus "$ranks" recipes/t4_moe.py --ds_config ds_configs/zero2.json --data "$out/data"
  --output "$out/run" --steps "$steps" --schedule.warmup_steps $((steps / 20)) --validate_every_steps $((steps / 4 + 1))
  --validation_samples 64 "${layout[@]}")
show "${train[@]}" --stop_at_step $((steps / 2))
echo "stopped half way; the same command goes on from its checkpoint"
show "${train[@]}"

rm -rf "$out/model"
show python -m mosaic_dist export --run "$out/run" --output "$out/model"
show python -m mosaic_dist generate --model "$out/model" --prompt "def main(" --max_new_tokens 80

printf '\nloss curve: %s\nmodel:      %s\n' "$out/run/loss.png" "$out/model"
