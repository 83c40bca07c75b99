#!/usr/bin/env bash
# onnxruntime-genai, which the `test` extra brings along (and torch, for its builder).
set -euo pipefail
PYTHONDONTWRITEBYTECODE=1 python -m integrations.genai.check
