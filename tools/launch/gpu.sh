#!/bin/sh
# Training on one machine with one or more GPUs. UNTESTED: no GPU was at hand. The same command runs, tested, on the CPU.
#
#   tools/launch/gpu.sh experiments/dit.py:B/2 runs/dit-b --config.vae_checkpoint=runs/vae --config.mesh.fsdp=8
set -eu
cd "$(dirname "$0")/../.."
config=$1 workdir=$2
shift 2
tools/install cuda12
# One process drives all GPUs of a machine.
exec .venv/bin/sora-jax train --config="$config" --workdir="$workdir" "$@"
