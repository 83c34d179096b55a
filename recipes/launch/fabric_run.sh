#!/usr/bin/env bash
# The same as torchrun.sh by Lightning's `fabric run`. Leave `fabric run --strategy` out: the strategy is the recipe's,
# in data.launch.strategy, and Fabric refuses a second one. Without `--`, `fabric run` takes LitGPT's options for its own.
set -euo pipefail

: "${DEVICES:=1}"
: "${NUM_NODES:=1}"
: "${NODE_RANK:=0}"
: "${MASTER_ADDR:=127.0.0.1}"
: "${MASTER_PORT:=29400}"

exec fabric run --devices "$DEVICES" --num-nodes "$NUM_NODES" --node-rank "$NODE_RANK" \
  --main-address "$MASTER_ADDR" --main-port "$MASTER_PORT" \
  -- "$(command -v litgpt)" pretrain "$@" --devices "$DEVICES" --num_nodes "$NUM_NODES"
