# shellcheck shell=bash
# What the launch scripts have in common; they source this file and call `launch` with the program's arguments.
#
#   NPROC=N           processes of this machine (default: one a GPU, or 2 on CPU, where gloo connects them)
#   RUN_DIR=FOLDER    the run's folder (default: a new one named by date and time)
#   MAX_RESTARTS=N    how often the job restarts from its last checkpoint when a process dies (default 3)
#   SHUTDOWN_TIMEOUT  seconds a process has for its checkpoint after a signal (default 600)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines: see multinode.sh

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -d "$here/nostalgia" ]; then # a checkout runs without being installed
  export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
fi
module=${NOSTALGIA_MODULE:-nostalgia.train}

launch() {
  local printed nproc device folder code
  for word in "$@"; do
    case $word in -h | --help) exec python -m "$module" "$@" ;; esac
  done
  printed=$(python -m nostalgia.scripts.processes "$@") || return
  # The program's own exit code, which torchrun turns into 1: a process leaves it in this file, and ends with 0 after
  # 2, 3, 4 and 75, which a restart would not change.
  NOSTALGIA_EXIT_FILE=$(mktemp) || return
  export NOSTALGIA_EXIT_FILE
  trap 'rm -f "$NOSTALGIA_EXIT_FILE"' EXIT
  { read -r nproc; read -r device; read -r folder; } <<<"$printed"

  local options=(--nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
  if [ "${NNODES:-1}" -gt 1 ]; then
    options+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
      --rdzv-id "${RDZV_ID:-nostalgia}")
    # Nodes may start minutes apart; node 0 is where the others meet.
    if [ "$NODE_RANK" = 0 ]; then
      options+=(--rdzv-conf "is_host=true,read_timeout=600" --local-addr "$MASTER_ADDR")
    else
      options+=(--rdzv-conf "is_host=false,read_timeout=600")
    fi
  else
    options+=(--standalone)
  fi
  # accelerate launch cannot pass these options on; the program reads the strategy from the same ACCELERATE_* variables.
  if [ "$device" = cpu ]; then
    export ACCELERATE_USE_CPU=true
  fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-600}"
  if [ -n "$folder" ]; then
    set -- "$@" --run-dir "$folder" --resume auto # begins there; after a restart, goes on there
  fi
  forward torchrun "${options[@]}" -m "$module" "$@"
  code=$?
  if [ -s "$NOSTALGIA_EXIT_FILE" ]; then code=$(cat "$NOSTALGIA_EXIT_FILE"); fi
  return "$code"
}

# Run a command, pass every signal on to it once, and return its exit code.
forward() {
  set -m # a process group of its own: the terminal's Ctrl-C reaches it only through us
  "$@" &
  set +m
  local child=$! signal
  for signal in TERM INT HUP QUIT USR1; do
    # shellcheck disable=SC2064  # this child, now
    trap "kill -s $signal $child 2>/dev/null" "$signal"
  done
  wait "$child"
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait
  wait "$child"
  local code=$?
  trap - TERM INT HUP QUIT USR1
  return "$code"
}
