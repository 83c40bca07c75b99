"""Where the residual stream is in a graph, by brute force: run it with every value as an output and compare with torch.

Slow, and only possible where there is a torch truth: an answer key for whatever finds the stream by its structure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from zoo.model import ZooModel

# A hidden state is not normalised as the logits are: it grows to 8 here, and its rounding errors with it. The nearest
# other value is 1.4 away.
SLACK = 2


def stream_values(model: ZooModel, scratch: Path) -> list[dict[str, str]]:
    """For every decoder layer, the graph's values that hold its output, in the order of the nodes: name -> dtype.

    None: the sum is made inside a fused node and is not a value. Several: a Cast changed nothing but the dtype.
    """
    feeds = model.make_feeds(batch=2, sequence=7, pad=2)
    counted = model.counted(feeds)
    values = state_shaped_values(model, feeds, scratch)
    if not values or not counted.any():
        raise AssertionError(f"{model.name}: nothing to compare; no value of the graph is shaped like a hidden state")
    return [
        {
            name: value.dtype.name
            for name, value in values.items()
            if np.abs(value.astype(np.float32) - state)[counted].max() < SLACK * model.tolerance
        }
        for state in model.hidden_states(feeds)
    ]


def state_shaped_values(model: ZooModel, feeds: dict[str, np.ndarray], scratch: Path) -> dict[str, np.ndarray]:
    """Every float value of the graph with the shape of a hidden state, in the order of the nodes."""
    # With its weights inside: the copy stands in another folder than the weights.
    proto = onnx.load(model.path)
    known = {value.name for value in proto.graph.output}
    made = [name for node in proto.graph.node for name in node.output if name and name not in known]
    # No types: onnxruntime infers them, and TorchScript's files have none to copy.
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    bared = scratch / f"{model.name}-bared.onnx"
    onnx.save(proto, bared)
    outputs = run_graph(bared, feeds, optimized=False)
    shape = (*model.counted(feeds).shape, model.width)
    arrays = {name: outputs[name] for name in made if isinstance(outputs[name], np.ndarray)}  # not sequences of arrays
    return {name: array for name, array in arrays.items() if array.shape == shape and array.dtype.kind == "f"}


def run_graph(path: Path, feeds: dict[str, np.ndarray], optimized: bool = True) -> dict[str, np.ndarray]:
    """One run on the CPU; with `optimized=False` the graph runs as it is written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))
