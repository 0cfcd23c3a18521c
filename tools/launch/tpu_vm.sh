#!/bin/sh
# Training on a TPU slice through its VMs. UNTESTED: no TPU was at hand. What is tested is compiling the same step for such
# slices (sora-jax plan), and several processes on one machine (tools/launch_local).
#
#   tools/launch/tpu_vm.sh NAME ZONE v5litepod-8 experiments/dit.py:0.7b gs://bucket/dit
set -eu
name=$1 zone=$2 kind=$3 config=$4 workdir=$5
repository=$(git -C "$(dirname "$0")" remote get-url origin)

gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$kind" --version=v2-alpha-tpuv5-lite
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
on_all "git clone --depth=1 $repository sora_jax && cd sora_jax && tools/install tpu"
# Every worker runs the same command; they find each other by the TPU's own metadata.
on_all "cd sora_jax && until .venv/bin/sora-jax train --distributed --config=$config --workdir=$workdir; do [ \$? -eq 75 ] || exit 1; done"
