#!/usr/bin/env bash
# The quickstart: rendered people, pretraining, two pose models on few labels, their scores and pictures, in runs/demo.
# Started again, it goes on where it stopped; the README explains each command.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/.venv/bin:$PATH"

python -m poserelay synthesize --out runs/demo/train --images 1500 --seed 0 --size 160
python -m poserelay synthesize --out runs/demo/test --images 200 --seed 1 --size 160
python -m pretrain --config pretrain/configs/demo.yaml
python -m finetune --config finetune/configs/demo.yaml --run_dir runs/demo/scratch
python -m finetune --config finetune/configs/demo.yaml --run_dir runs/demo/mscl --init_from runs/demo/pretrain/export/model.safetensors
python -m evaluation test --checkpoint runs/demo/scratch/export/model.safetensors --annotations runs/demo/test/annotations.json --images runs/demo/test/images --baseline_annotations runs/demo/train/annotations.json --out runs/demo/scratch/evaluation
python -m evaluation test --checkpoint runs/demo/mscl/export/model.safetensors --annotations runs/demo/test/annotations.json --images runs/demo/test/images --baseline_annotations runs/demo/train/annotations.json --out runs/demo/mscl/evaluation
python -m evaluation predict --checkpoint runs/demo/mscl/export/model.safetensors --images runs/demo/test/images --boxes runs/demo/test/annotations.json --out runs/demo/predictions
python -m evaluation report --runs '[runs/demo/pretrain, runs/demo/scratch, runs/demo/mscl]' --out runs/demo/report
