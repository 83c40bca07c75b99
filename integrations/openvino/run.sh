#!/usr/bin/env bash
# OpenVINO, in an environment of its own (about 180 MB).
set -euo pipefail
environment=build/integrations/openvino/venv
test -x "$environment/bin/python" || python -m venv "$environment"
"$environment/bin/python" -m pip install --quiet openvino numpy
PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 "$environment/bin/python" -m integrations.openvino.check
