#!/bin/sh
# Build a dataset on a Ray cluster that runs already. Change the five values, or set them outside:
#   HEAD=head.example LIST=/shared/list.txt OUT=/shared/data sh pipelines/ray-job.sh
#
# The driver runs on the head node, so this terminal may be closed. If the job ends early, submit it
# again: finished units are kept. docs/running-on-ray.md says what every node needs.
set -eu

HEAD=${HEAD:-head.example}              # the node that `ray start --head` ran on
LIST=${LIST:-/shared/list.txt}          # list of repositories, as the head node sees it
OUT=${OUT:-/shared/data}                # dataset folder, the same path on every node
RECIPE=${RECIPE:-/shared/midtrain-32k.toml}
TOKEN=${TOKEN:-$HOME/.ray/auth_token}   # the cluster's token: a copy of the head node's file

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN"

# No --working-dir and no pip: codeflow is installed on the nodes, in the same version on each.
exec ray job submit --address "http://$HEAD:8265" -- \
  codeflow build --repos "$LIST" --out "$OUT" --recipe "$RECIPE" --executor ray --address auto
