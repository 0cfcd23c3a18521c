#!/bin/sh
# Training on a TPU slice through its VMs. UNTESTED: no TPU was at hand. What is tested is compiling the same step for such
# slices (sora-jax plan), and several processes on one machine (tools/launch_local).
#
#   tools/launch/tpu_vm.sh NAME ZONE v5litepod-8 HOST:/SHARE experiments/dit.py:0.7b dit --config.vae_checkpoint=/mnt/runs/vae
#
# HOST:/SHARE is an NFS share, such as one of Filestore, that all workers mount as /mnt/runs; the work dir, its encoded clips and the
# VAE, which is trained before (experiments/vae.py:video), are there.
set -eu
name=$1 zone=$2 kind=$3 share=$4 config=$5 workdir=/mnt/runs/$6
shift 6
repository=$(git -C "$(dirname "$0")" remote get-url origin)

gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$kind" --version=v2-alpha-tpuv5-lite
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
on_all "sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/runs && sudo mount $share /mnt/runs"
on_all "git clone --depth=1 $repository sora_jax && cd sora_jax && tools/install tpu"
# Every worker runs the same command; they find each other by the TPU's own metadata. One that lost another (75) or was killed (137,
# 143) begins again; 1 and 2 are of the run itself.
on_all "cd sora_jax && until .venv/bin/sora-jax train --distributed --config=$config --workdir=$workdir $*; do
  [ \$? -ge 75 ] || exit 1; done"
