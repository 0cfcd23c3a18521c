#!/bin/sh
# Training on a TPU slice through its VMs. UNTESTED: no TPU was at hand. What is tested is compiling the same step for such
# slices (sora-jax plan), several processes on one machine (tools/launch_local), and this script with commands that only note what
# they are told (tests/test_launch.py).
#
#   tools/launch/tpu_vm.sh NAME ZONE v5litepod-8 HOST:/SHARE experiments/dit.py:0.7b dit --config.vae_checkpoint=/mnt/runs/vae
#
# HOST:/SHARE is an NFS share, such as one of Filestore, that all workers mount as /mnt/runs; the work dir, its encoded clips and the
# VAE, which is trained before (experiments/vae.py:video), are there.
set -eu
name=$1 zone=$2 kind=$3 share=$4 config=$5 workdir=/mnt/runs/$6
shift 6
# A remote shell reads what it is given once more.
quoted() { for each; do printf " '%s'" "$(printf %s "$each" | sed "s/'/'\\\\''/g")"; done; }
more=$(quoted "$@")
most_restarts=10
repository=$(git -C "$(dirname "$0")" remote get-url origin)
case $kind in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) echo "tpu_vm.sh: no runtime is known for $kind; give v4-N, v5litepod-N, v5p-N or v6e-N" >&2; exit 2 ;;
esac

gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$kind" --version="$runtime"
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
on_all "sudo apt-get update && sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/runs && sudo mount $share /mnt/runs"
# These runtimes are Ubuntu 22.04, whose own Python is 3.10.
on_all "python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' || {
  sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt-get install -y python3.12 python3.12-venv; }"
on_all "git clone --depth=1 $repository sora_jax && cd sora_jax && tools/install tpu"
# Every worker runs the same command; they find each other by the TPU's own metadata. One that lost another (75) or was killed (137,
# 143) begins again from the newest checkpoint; 1 and 2 are of the run itself, 126 and 127 of a program that is
# not there, 130 of a Ctrl-C.
on_all "cd sora_jax && restarts=0
until .venv/bin/sora-jax train --distributed --config=$config --workdir=$workdir$more; do
  code=\$? restarts=\$((restarts + 1))
  { { [ \$code -eq 75 ] || [ \$code -ge 128 ]; } && [ \$code -ne 130 ]; } || exit \$code
  [ \$restarts -le $most_restarts ] || { echo restarted $most_restarts times, ended with code \$code: not again >&2; exit \$code; }
done"
