#!/usr/bin/env bash
# The C++ program, built against OpenVINO's wheel: it carries headers, libraries and a CMake configuration. Wants a C++17 compiler.
set -euo pipefail
command -v c++ > /dev/null || { echo "no C++ compiler; install one (Debian: apt-get install g++)" >&2; exit 1; }
folder=build/integrations/cpp
environment=$folder/venv
test -x "$environment/bin/python" || python -m venv "$environment"
"$environment/bin/python" -m pip install --quiet cmake ninja numpy openvino
export PATH="$PWD/$environment/bin:$PATH" PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1
openvino=$(python -c 'import openvino; from pathlib import Path; print(Path(openvino.__file__).parent / "cmake")')
cmake -S integrations/cpp -B $folder/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DOpenVINO_DIR="$openvino"
cmake --build $folder/cmake
python -m integrations.cpp.check $folder/cmake/guarded_vlm "$(python -c 'import openvino; print(openvino.__version__.split("-")[0])')"
