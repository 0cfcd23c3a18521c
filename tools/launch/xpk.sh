#!/bin/sh
# Training on TPU slices of a GKE cluster with xpk. UNTESTED: no cluster was at hand (see tpu_vm.sh for what is tested).
#
#   tools/launch/xpk.sh CLUSTER v5p-256 experiments/dit.py:7b /mnt/runs/dit-7b --config.vae_checkpoint=/mnt/runs/vae
#
# v5p-256 counts cores: 128 chips. /mnt/runs is a volume of the cluster that all its machines mount (xpk storage attach), with the VAE,
# which is trained before (experiments/vae.py:video), on it.
set -eu
cluster=$1 kind=$2 config=$3 workdir=$4
shift 4
# A remote shell reads what it is given once more.
quoted() { for each; do printf " '%s'" "$(printf %s "$each" | sed "s/'/'\\\\''/g")"; done; }
more=$(quoted "$@")
# xpk packs this folder into the image; restarts resume from the newest checkpoint.
xpk workload create --cluster="$cluster" --workload="sora-jax-$(date +%m%d-%H%M)" --tpu-type="$kind" --num-slices=1 \
  --base-docker-image=python:3.12 --script-dir="$(dirname "$0")/../.." --max-restarts=10 \
  --command="tools/install tpu && .venv/bin/sora-jax train --distributed --config=$config --workdir=$workdir$more"
