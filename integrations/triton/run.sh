#!/usr/bin/env bash
# Triton's own server (NVIDIA's wheel nvidia-pytriton carries the binary and its Python backend; x86-64 Linux, glibc 2.35 or
# later) serves what `vlmguard package --triton` writes, each mode in turn. Its ONNX Runtime backend is in no registry package:
# backends/onnxruntime is in its place.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=build/integrations/triton
mkdir -p "$home"
test -d "$home/venv" || python3 -m venv "$home/venv"
# Without its dependencies, which are for its own Python interface. Its Python processes are built for numpy 1.
"$home/venv/bin/pip" install --quiet --no-deps "nvidia-pytriton==0.7.0"
"$home/venv/bin/pip" install --quiet "numpy<2" "tritonclient[grpc]>=2.50" -e ".[cpu]"
exec "$home/venv/bin/python" -m integrations.triton.check
