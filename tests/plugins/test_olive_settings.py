"""The settings of Olive's pass are the exporter's: derived with a stand-in for Olive, which has an environment of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, types
from types import SimpleNamespace as Thing
for name in ("olive", "olive.model", "olive.package_config", "olive.passes", "olive.passes.pass_config"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["olive.model"].CompositeModelHandler = sys.modules["olive.model"].ONNXModelHandler = object
sys.modules["olive.package_config"].OlivePackageConfig = sys.modules["olive.passes"].Pass = object
sys.modules["olive.passes.pass_config"].ParamCategory = Thing(PATH="path", NONE="none")
sys.modules["olive.passes.pass_config"].PassConfigParam = lambda **parts: Thing(**parts)
from vlmguard.plugins.olive import VLMGuard
settings = VLMGuard._default_config(None)
assert all(setting.description for setting in settings.values())
assert settings["directions"].default_value is None and "path" == settings["directions"].category
assert settings["budget"].default_value > 0 and settings["data"].default_value == "link"
assert "proof" not in settings
print(*settings)
"""


def test_every_setting_has_its_type_default_and_description() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"mode", "layers", "rank", "directions", "calibration_images", "sign", "content"} <= set(done.stdout.split())
