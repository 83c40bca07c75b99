#!/usr/bin/env bash
# Plain onnxruntime, in an environment that holds nothing of vlmguard. From the repository's root, or by
# `make integration NAME=onnxruntime`.
set -euo pipefail
environment=build/integrations/onnxruntime/venv
test -x "$environment/bin/python" || python -m venv "$environment"
"$environment/bin/python" -m pip install --quiet onnxruntime numpy pillow tokenizers
PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 "$environment/bin/python" -m integrations.onnxruntime.check
