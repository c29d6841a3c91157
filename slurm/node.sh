#!/usr/bin/env bash
# The agent of one node: starts Python once per rank of the node with the words given, hands stop signals on, and waits.
#
# torchrun and deepspeed do not do here: they kill ranks that save for longer than 30 s, and torchrun forgets the exit
# code that says "saved". Exit code: 0 and 75 as the ranks', 100 + the highest of those that failed, so that the highest
# of all nodes, which srun takes for its own, tells of a failure if there is any.
set -uo pipefail
export WORLD_SIZE=$((SLURM_NNODES * RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$RANKS_PER_NODE

stopping=0
trap 'stopping=1' USR1 TERM

declare -A ranks=()
for ((i = 0; i < RANKS_PER_NODE; i++)); do
  (
    trap '' USR1 TERM # until Python listens: a signal must not end what is still importing
    export LOCAL_RANK=$i RANK=$((SLURM_NODEID * RANKS_PER_NODE + i))
    exec python -u "$@"
  ) &
  ranks[$!]=$i
done

{ # read to its end before it runs: this file may change while a job runs
  result=0 ended_at='' killed=0
  while ((${#ranks[@]})); do
    sleep 0.5
    ((!stopping)) || kill -USR1 "${!ranks[@]}" 2>/dev/null # again and again: see above
    for pid in "${!ranks[@]}"; do
      ! kill -0 "$pid" 2>/dev/null || continue
      wait "$pid"
      code=$?
      if ((code != 0 && code != 75 && !killed)); then
        echo "[agent of $(hostname)] local rank ${ranks[$pid]} ended with exit code $code"
        ((code += 100))
      fi
      ((code <= result || killed)) || result=$code
      ended_at=${ended_at:-$SECONDS}
      unset "ranks[$pid]"
    done
    if [[ -n $ended_at ]] && ((SECONDS - ended_at > LEAVE_SECONDS && ${#ranks[@]})); then
      echo "[agent of $(hostname)] local ranks ${ranks[*]} did not end within $LEAVE_SECONDS s of the first"
      kill -KILL "${!ranks[@]}" 2>/dev/null
      killed=1 result=$((result > 100 ? result : 101))
    fi
  done
  exit $((result > 255 ? 255 : result))
}
