"""Guard a model along directions of your own: python own_directions.py MODEL ARRAYS.npz DIRECTIONS.safetensors

ARRAYS.npz has one array per decoder layer, named by the layer's number: a direction of the decoder's width that points from
harmless to harmful, for example a probe's weights, or rows of them that are orthonormal.
"""

import sys

import numpy as np

import vlmguard

model, arrays, output = sys.argv[1:]
print(vlmguard.inspect(model))
with np.load(arrays) as file:
    directions = vlmguard.Directions.from_arrays({int(name): file[name] for name in file.files})
print(directions)
path = directions.save(output, force=True)

# A plan only; without dry_run the guarded folder is written. `restore` and `steer` need thresholds: calibrate with anchors=...
result = vlmguard.export(model, mode="project", layers=list(directions.layers), directions=path, dry_run=True)
for site in result.plan.sites:
    print(f"layer {site.layer_index}: rank {site.guard.rank} at {site.site.anchor}")
