#!/bin/bash
# A run on a spot TPU (VM or slice) that is asked for again whenever it is taken away, until the
# run is finished; then the TPU is given back. Runs on your machine, or better on a small VM:
#
#     NAME=vit ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#     SETUP='...' scripts/tpu.sh --config=CONFIG --workdir=gs://BUCKET/run
#
# SETUP is run on every host before each start: installs VIT_JAX if it isn't there.
set -u
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${SETUP:?}"
VIT_JAX=${VIT_JAX:-'~/venv/bin/vit-jax'}

tpus() { gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on_all() { tpus tpu-vm ssh "$NAME" --worker=all --ssh-flag="-o ServerAliveInterval=30" --command="$1"; }
queue() { tpus queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null; }
machine() { tpus tpu-vm describe "$NAME" --format='value(state)' 2>/dev/null; }

claim() { # Returns when the TPU is there.
  local now
  until [ "$(machine)" = READY ]; do
    now="$(queue)/$(machine)"
    echo "TPU $NAME: $now"
    case "$now" in
      /*) tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
        --runtime-version="$RUNTIME" --spot || exit 1 ;;
      SUSPENDED/* | FAILED/* | */PREEMPTED | */TERMINATED)
        tpus queued-resources delete "$NAME" --force || exit 1 ;;
    esac
    sleep "${PAUSE:-30}"
  done
}

# If the connection broke, and not the TPU, the run may still be there: it saves, and ends.
alone='pkill -x vit-jax; while pgrep -x vit-jax > /dev/null; do sleep 1; done'
for _ in $(seq "${ATTEMPTS:-50}"); do
  claim
  on_all "$SETUP" && on_all "$alone; exec $VIT_JAX train ${*@Q}"
  status=$?
  echo "run: status $status"
  case "$status" in
    0)
      tpus queued-resources delete "$NAME" --force
      exit
      ;;
    2) exit 2 ;; # A mistake, which starting again does not mend. The TPU stays, and costs.
  esac
  sleep "${PAUSE:-30}"
done
exit "$status"
