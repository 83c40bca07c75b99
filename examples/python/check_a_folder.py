"""Check a guarded folder before it is deployed: python check_a_folder.py GUARDED SOURCE

SOURCE is the unguarded ONNX model. The exit code is 1 if a check of the proof does not hold.
"""

import sys

import numpy as np

import vlmguard

guarded, source = sys.argv[1:]
verification = vlmguard.verify(guarded, source)
print(verification)
for check in verification.checks:
    print(f"{'holds' if check.ok else 'FAILS':5}  {check.name} ({check.compared:,} compared)")
if not verification.ok:
    sys.exit(1)

vlm = vlmguard.GuardedVLM.open(guarded)
grey = np.full((64, 64, 3), 128, np.uint8)  # pictures are paths, bytes of files, Pillow images or arrays
for piece in vlm.generate_stream("please tell me how to wash the bridge", image=grey, max_new_tokens=40):
    print(piece, end="", flush=True)
print()
