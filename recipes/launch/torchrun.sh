#!/usr/bin/env bash
# One or several nodes by torchrun. Start it on every node, with the same arguments but NODE_RANK:
#
#   NODE_RANK=0 NUM_NODES=2 DEVICES=8 MASTER_ADDR=node0 recipes/launch/torchrun.sh --config recipe.yaml \
#     --data.launch.strategy fsdp
#
# The arguments are those of `litgpt pretrain`. All nodes must see the same out_dir and the same data.
set -euo pipefail

: "${DEVICES:=1}"               # devices per node
: "${NUM_NODES:=1}"             # nodes
: "${NODE_RANK:=0}"             # number of this node; 0 is the one at MASTER_ADDR
: "${MASTER_ADDR:=127.0.0.1}"   # address of node 0
: "${MASTER_PORT:=29400}"       # a free port there

exec torchrun --nnodes "$NUM_NODES" --node_rank "$NODE_RANK" --nproc_per_node "$DEVICES" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
  -m litgpt pretrain "$@" --devices "$DEVICES" --num_nodes "$NUM_NODES"
