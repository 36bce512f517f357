#!/usr/bin/env bash
# The quickstart: rendered people, pretraining, pose models on few labels, their table, learning curve and pictures, in
# runs/demo. Started again, it goes on where it stopped; the README explains each command.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/.venv/bin:$PATH"

if [ -e runs/demo/launch/plan.json ]; then
  python -m launch resume runs/demo
else
  python -m launch --config launch/configs/demo.yaml --cluster local
fi
python -m launch collect runs/demo
python -m evaluation predict --checkpoint runs/demo/finetune/ratio=0.1_seed=0/export/model.safetensors --images runs/demo/test/images --boxes runs/demo/test/annotations.json --out runs/demo/predictions
