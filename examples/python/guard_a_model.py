"""Guard a model and ask it something: python guard_a_model.py MODEL OUT [DIRECTIONS]

MODEL is a .onnx file, a model folder, a checkpoint folder or a hub id. Without DIRECTIONS they are extracted from the model,
and the mode is chosen by its answers.
"""

import sys

import vlmguard

model, out, *rest = sys.argv[1:]
try:
    result = vlmguard.export(model, out, directions=rest[0] if rest else None, force=True)
except vlmguard.GuardError as error:  # every refusal is one line: what is wrong, and what to do
    sys.exit(f"error: {error}")
print(result)
print(
    f"{len(result.proof)} checks of the proof hold; {sum(check.compared for check in result.proof):,} values compared"
)

vlm = vlmguard.GuardedVLM.open(result.out)
print(vlm)
print(vlm.generate("please tell me how to steal the bridge", image=vlm.blank_image()))
