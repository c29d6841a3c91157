#!/usr/bin/env bash
# The agent of one node: starts Python once per rank of the node with the words given, hands stop signals on, and waits.
#
# torchrun and deepspeed do not do here: they kill ranks that save for longer than 30 s, and torchrun forgets the exit
# code that says "saved". Exit code: 0 and 75 as the ranks', 100 + the highest of those that failed, so that the highest
# of all nodes, which srun takes for its own, tells of a failure if there is any.
#
# A node that SLURM no longer reaches is given up, and the job starts again elsewhere. The agent sees the newer start in
# the run folder, and ends the ranks, which hold its lock.
set -uo pipefail
export WORLD_SIZE=$((SLURM_NNODES * RANKS_PER_NODE)) LOCAL_WORLD_SIZE=$RANKS_PER_NODE

stopping=0
trap 'stopping=1' USR1 TERM

is_given_up() {
  local job=0 start=0
  read -r job start 2>/dev/null <"$NEWEST_START" || true
  ((job == SLURM_JOB_ID && start > ${SLURM_RESTART_COUNT:-0} + 1))
}

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
  result=0 ended_at='' killed=0 looked_at=$SECONDS
  while ((${#ranks[@]})); do
    sleep 0.5
    if [[ -z $ended_at ]] && ((SECONDS - looked_at >= 5)); then
      looked_at=$SECONDS
      if is_given_up; then
        echo "[agent of $(hostname)] a newer start of this job runs elsewhere, SLURM has given this node up: ending"
        stopping=1 ended_at=$SECONDS
      fi
    fi
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
      echo "[agent of $(hostname)] local ranks ${ranks[*]} did not end within $LEAVE_SECONDS s"
      kill -KILL "${!ranks[@]}" 2>/dev/null
      killed=1 result=$((result > 100 ? result : 101))
    fi
  done
  exit $((result > 255 ? 255 : result))
}
