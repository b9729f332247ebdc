#!/usr/bin/env bash
# Pretrain on a GPU machine that has torch, transformers and accelerate alone, no network, and ten minutes a command.
#
#   benchmarks/gpu_pretrain.sh pack DATA... --output corpus.safetensors   # where the scans are
#   benchmarks/gpu_pretrain.sh train corpus.safetensors RUN EXPORT        # on the GPU; repeat until "finished"
#   benchmarks/gpu_pretrain.sh join EXPORT CHECKPOINT                     # anywhere, with the files of EXPORT
#
# Corpus and code together are at most 60 MiB. RUN must survive between pieces; EXPORT holds at most seven files of less
# than 16 MiB each. Further arguments go to gpu_pretrain.py. OPTIONS (JSON) replaces options of the recipe below.
set -euo pipefail
here=$(dirname "$0")
# SimDINO, ViT-S: the published learning rate of 5e-4 for 256 scans, a teacher that averages over a hundred steps, and
# the pooling that was best with a ViT-T (docs/results.md). Not tried at this size. Choose the steps by the scans per
# second of a first piece, in another RUN.
recipe='{"objective": "simdino", "preset": "vits", "size": 160, "num_frames": 16, "local_size": 96, "local_views": 6,
  "batch_size": 256, "steps": 8000, "learning_rate": 5e-4, "teacher_momentum": 0.99, "mixture_alpha": 0.5,
  "precision": "bf16", "model": {"pooling": "statistics"}}'
command=${1:?expected pack, train or join}
shift
if [ "$command" = train ]; then
    options=$(python3 -c 'import json, sys; print(json.dumps(json.loads(sys.argv[1]) | json.loads(sys.argv[2])))' \
        "$recipe" "${OPTIONS:-{\}}")
    set -- "$@" --options "$options"
fi
exec python3 "$here/gpu_pretrain.py" "$command" "$@"
