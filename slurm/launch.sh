#!/usr/bin/env bash
# One start of a run under SLURM, and what follows from how it ended.
#
# The job scripts beside this one become it, in the batch shell on the first node of the job. It starts an agent on each
# node (node.sh), first for the doctor, then for the recipe with the words given to sbatch. A stop signal (preemption,
# time limit) goes to all ranks; a run that has saved and ended is requeued and goes on from its checkpoint. A run that
# failed is requeued too. The job gives up when MAX_FAILURES starts in a row have ended without a newer checkpoint,
# whether they failed or were told to stop.
#
# Settings, as environment variables at sbatch:
#   RECIPE           the recipe
#   DS_CONFIG        DeepSpeed JSON
#   OUTPUT           run folder, on a file system that all nodes see; default runs/NAME
#   DATA             dataset; default what the recipe says
#   EXPERT_PARALLEL  ranks that share the experts of a layer; default auto
#   VENV             Python environment, in the repository or elsewhere; default .venv
#   RANKS_PER_NODE   default: the job's GPUs per node, or 1
#   MASTER_PORT      where the ranks meet; default from the job's number. A busy port is passed over
#   MAX_FAILURES     starts without a newer checkpoint before the job gives up; default 3
#   LEAVE_SECONDS    time the other ranks have to end when one has ended; default 120
#   DOCTOR           0: start without an examination of the nodes
set -euo pipefail
: "${SLURM_JOB_ID:?start this with sbatch}" "${RECIPE:?set RECIPE}"
cd "$SLURM_SUBMIT_DIR"

# What a site needs before Python starts, for example:
#   module purge && module load cuda/12.8 nccl
# In a container, put srun's words for it into CONTAINER, with a VENV that the image has:
#   CONTAINER="--container-image=/images/mosaic.sqsh --container-mounts=$PWD,/scratch --container-workdir=$PWD"
CONTAINER=${CONTAINER:-}

name=$(basename "$RECIPE" .py)
DS_CONFIG=${DS_CONFIG:-ds_configs/zero1.json}
OUTPUT=${OUTPUT:-runs/$name}
EXPERT_PARALLEL=${EXPERT_PARALLEL:-auto}
VENV=${VENV:-.venv}
MAX_FAILURES=${MAX_FAILURES:-3}
DOCTOR=${DOCTOR:-1}
starts=$((${SLURM_RESTART_COUNT:-0} + 1))
export LEAVE_SECONDS=${LEAVE_SECONDS:-120}
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # "8" or "a100:8"; the second tells all of an exclusive node
export RANKS_PER_NODE=${RANKS_PER_NODE:-${gpus##*:}}
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun forgets it
PATH=$(realpath -m "$VENV")/bin:$PATH
export PATH

# NCCL. A site's own values win.
# Says which link or library failed; INFO is a page per rank.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# 4.096 us * 2^22 = 17 s, seven times, the most there is: a link that a switch restarts is no failure.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22} NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
# A lost peer ends the rank, instead of a wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# The last collectives of each rank are kept, and written when one does not end.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_FR_DUMP_ON_TIMEOUT=${TORCH_FR_DUMP_ON_TIMEOUT:-1}
# Batches of rows for the experts differ in size from step to step, which cuts the allocator's blocks into pieces.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are the site's: set them where a node has several networks.

say() {
  echo "[$(date '+%F %T')] $*"
}

is_free() { # whether nobody listens at a port of this node: only a refused connection says so
  local code=0
  timeout 2 bash -c "true >/dev/tcp/$MASTER_ADDR/$1" 2>/dev/null || code=$?
  ((code == 1))
}

find_port() { # below the ports that the system gives to clients, another one at each start
  local port i
  for ((i = 0; i < 100; i++)); do
    port=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 13 + starts * 101) % 10000))}
    port=$((port + i))
    if is_free "$port"; then
      MASTER_PORT=$port
      return
    fi
    say "port $port of $MASTER_ADDR is busy"
  done
  say "no free port from $((port - 99)) to $port: set MASTER_PORT"
  exit 1
}

newest_step() { # of the checkpoints
  local folder step=0
  for folder in "$OUTPUT"/checkpoints/step_*; do
    [[ $folder =~ step_([0-9]+)$ ]] && step=$((10#${BASH_REMATCH[1]}))
  done
  echo "$step"
}

last_step() { # of the metrics: how far the run has got
  tail -n 1 "$OUTPUT/metrics.jsonl" 2>/dev/null | grep -oP '"step": \K\d+' || echo 0
}

stopping=0 told_after=''
trap 'stopping=1 told_after=${told_after:-$SECONDS}' USR1 TERM

on_all_nodes() { # LOG WORDS: run Python on all ranks; its exit code, or 100 + the highest where any rank failed
  local code=0
  # shellcheck disable=SC2086 # CONTAINER is several words
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait="$LEAVE_SECONDS" \
    --output="$logs/$1_%n_%N.log" $CONTAINER bash slurm/node.sh "${@:2}" &
  local step_pid=$! has_told=0
  while kill -0 "$step_pid" 2>/dev/null; do
    if ((stopping)); then
      ((has_told++)) || say "told to stop: the run saves and ends"
      kill -USR1 "$step_pid" 2>/dev/null || true # to the agents; srun loses it while it starts them, so again and again
    fi
    sleep 2 &
    wait $! || true # a stop signal ends this wait
  done
  wait "$step_pid" || code=$?
  return "$code"
}

runs_on() { # whether SLURM still counts on this start, by what it says of the job
  # not so where somebody has cancelled the job, where SLURM requeues it by itself, and where this node was cut off and
  # another start of the job runs elsewhere
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID") || job=''
  [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=$((starts - 1)) "* ]]
}

requeue() {
  say "requeued"
  trap '' USR1 TERM
  scontrol requeue "$SLURM_JOB_ID" && sleep 600 # SLURM ends this shell
}

give_up() {
  say "$1"
  say "not requeued; the logs are in $logs"
  exit 1
}

count_start() { # this start as a failure, before it can be one: what takes the node with it, or SLURM kills, counts too
  step=$(newest_step) failures=0
  local failed_at=-1
  if ((starts > 1)) && [[ -f $attempts ]]; then # what another job of this run has failed at is not held against it
    read -r failed_at failures <"$attempts"
    ((failed_at == step)) || failures=0
  fi
  ((failures < MAX_FAILURES)) || give_up_after "$failures"
  echo "$step $((failures + 1))" >"$attempts"
}

give_up_after() { # FAILURES
  give_up "$1 starts in a row have failed after step $step (the last one got to step $(last_step))"
}

tell() {
  say "job $SLURM_JOB_ID ($SLURM_JOB_NAME), start $starts, from step $step, $failures failures there"
  cat <<END
  recipe      $RECIPE $*
  output      $OUTPUT
  data        ${DATA:-as the recipe says}
  deepspeed   $DS_CONFIG
  layout      $SLURM_NNODES nodes ($SLURM_JOB_NODELIST) x $RANKS_PER_NODE ranks, expert parallel $EXPERT_PARALLEL
  meeting at  $MASTER_ADDR:$MASTER_PORT
  python      $(command -v python)
  container   ${CONTAINER:-none}
  gives up    after $MAX_FAILURES failures at one step
  logs        $logs
END
}

train() { # WORDS: the doctor and the recipe; sets code
  code=0
  if ((DOCTOR)); then
    on_all_nodes doctor -m mosaic_dist doctor --folder "$OUTPUT" || code=101 # other nodes may be well
    cat "$logs"/doctor_0_*.log
  fi
  if ((stopping)); then
    code=75
  elif ((code == 0)); then
    local words=(--ds_config "$DS_CONFIG" --output "$OUTPUT" --expert_parallel "$EXPERT_PARALLEL")
    [[ -z ${DATA:-} ]] || words+=(--data "$DATA")
    on_all_nodes node "$RECIPE" "${words[@]}" "$@" || code=$?
  fi
}

tell_of_no_progress() { # of a start that was told to stop
  say "told to stop ${told_after:-?} s after the start, before it had saved a step: this start counts as a failure"
  if runs_on && [[ $job == *" PreemptTime=None "* ]]; then
    [[ $job =~ \ TimeLimit=([^ ]+) ]]
    say "the time limit (${BASH_REMATCH[1]}) is shorter than the lead of --signal, or leaves too little time for a" \
      "first step: raise --time, or lower N in --signal=B:USR1@N"
  fi
}

finish() {
  if ((code == 0)); then
    rm "$attempts"
    say "done: step $(last_step)"
    return
  fi
  local saved
  saved=$(newest_step)
  if ((code != 75)); then
    say "failed with exit code $code; the last lines of the first node:"
    tail -n 20 "$logs"/*_0_*.log
    ((code != 102)) || give_up "the settings or the data are wrong, and would be again"
  elif ((saved != step)); then
    say "saved: step $saved"
  else
    tell_of_no_progress
  fi
  ((saved != step || failures + 1 < MAX_FAILURES)) || give_up_after $((failures + 1))
  ! runs_on || requeue
}

main() {
  logs=$OUTPUT/slurm/$SLURM_JOB_ID.$starts
  attempts=$OUTPUT/slurm/failures
  mkdir -p "$logs"
  export NEWEST_START=$OUTPUT/slurm/newest_start # tells agents of an earlier start that SLURM has given their node up
  echo "$SLURM_JOB_ID $starts" >"$NEWEST_START.tmp"
  mv "$NEWEST_START.tmp" "$NEWEST_START"
  export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$(realpath "$logs")/collectives_rank_}
  count_start
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  find_port
  export MASTER_ADDR MASTER_PORT
  tell "$@"
  train "$@"
  finish
  exit "$code" # here, so that bash has read all that it runs: this file may change while a job runs
}

main "$@"
