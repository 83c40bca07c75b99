#!/usr/bin/env bash
# onnxruntime-node and transformers.js on the guarded tiny VLM. Needs Node.js 20 and npm; run by `make integration NAME=node`.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
work="$root/build/integrations/node"
command -v npm >/dev/null || { echo "npm is not there: install Node.js 20 or later" >&2; exit 1; }
(cd "$root" && PYTHONPATH=tests python -m integrations.tiny_smolvlm)
mkdir -p "$work"
cp "$here"/*.mjs "$here/package.json" "$work/"
# The CPU library comes with the package; its install script would fetch CUDA's from elsewhere, so no scripts run.
(cd "$work" && npm install --ignore-scripts --no-audit --no-fund --loglevel=error)
cd "$work" && node check.mjs "$root"
