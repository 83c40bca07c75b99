#!/usr/bin/env bash
# The pass VLMGuard in Olive, on the tiny VLM and on a checkpoint; run by `make integration NAME=olive`.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
work="$root/build/integrations/olive"
venv="$work/venv"
export OLIVE_DISABLE_TELEMETRY=1
test -d "$venv" || python3 -m venv "$venv"
# torch first and pinned, as in the Makefile. Olive 0.13 converts checkpoints with transformers 4, and imports requests, which
# its packages do not all bring.
"$venv/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}"
"$venv/bin/python" -m pip install --quiet "olive-ai==0.13.0" "transformers>=4.57,<4.58" requests -e "$root[cpu]"
cd "$root"
rm -rf "$work"/guarded "$work"/cache "$work"/check
# What a user does: two commands. The second line guards the tiny VLM, anchors to proof.
"$venv/bin/python" -m vlmguard.plugins.olive > "$work/passes.json"
"$venv/bin/olive" run --config integrations/olive/workflow.json --package-config "$work/passes.json"
"$venv/bin/vlmguard" verify "$work/guarded" --source examples/tiny_vlm/onnx-community
PYTHONPATH="$root" "$venv/bin/python" integrations/olive/check.py
