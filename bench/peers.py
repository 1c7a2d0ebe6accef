"""The other runtimes: one layer of one cell as ONNX Runtime and OpenVINO run it.

Each becomes a call without arguments (cases.py). None is timed before its output has been compared
with torch.nn's in float64: a peer with swapped gates would be just as quick.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .shapes import Shape
from .timing import Call

# package -> label
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
TORCH, FUSED = "torch.nn", "fusedrnn"
# Seconds to wait after a runtime whose threads go on spinning: version 1.31 was seen to slow the
# next caller for 50 ms.
RESTS = {"ONNX Runtime": 0.15}

# Activations lie in (-1, 1). float32 with any reasonable tanh stays far below this over 500 steps;
# a swapped gate, a missing bias or bfloat16 arithmetic does not.
TOLERANCE = 1e-4

# torch keeps the gates as i f g o and r z n; ONNX wants i o f c and z r h.
ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


class WrongResult(Exception):
    """A contestant computes something else than torch.nn."""


def installed_peers() -> list[str]:
    """Peers that can run here: the runtime, and onnx to write its model with."""
    if importlib.util.find_spec("onnx") is None:
        return []
    return [name for name in PEERS if importlib.util.find_spec(name) is not None]


def make_input(shape: Shape, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.steps, shape.batch, shape.input_size, generator=generator)


def onnx_model(cell: str, module: nn.RNNBase, shape: Shape) -> bytes:
    """The layer as a one-node ONNX model with static shapes, zero initial state."""
    from onnx import TensorProto, helper, numpy_helper

    order = list(ONNX_GATES[cell])
    hidden = module.hidden_size

    def reorder(parameter: Tensor) -> np.ndarray:
        gates = parameter.detach().reshape(len(order), hidden, -1)[order]
        return gates.reshape(len(order) * hidden, -1).numpy()

    w, r = reorder(module.weight_ih_l0), reorder(module.weight_hh_l0)
    b = np.concatenate([reorder(module.bias_ih_l0), reorder(module.bias_hh_l0)])
    weights = [("W", w[None]), ("R", r[None]), ("B", b.reshape(1, -1))]
    states = ["Y_h", "Y_c"] if cell == "lstm" else ["Y_h"]
    attributes = {"linear_before_reset": 1} if cell == "gru" else {}
    node = helper.make_node(
        cell.upper(), ["X", "W", "R", "B"], ["Y", *states], hidden_size=hidden, **attributes
    )
    f32, t, n = TensorProto.FLOAT, shape.steps, shape.batch
    graph = helper.make_graph(
        [node],
        cell,
        [helper.make_tensor_value_info("X", f32, [t, n, shape.input_size])],
        [
            helper.make_tensor_value_info("Y", f32, [t, 1, n, hidden]),
            *(helper.make_tensor_value_info(s, f32, [1, n, hidden]) for s in states),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in weights],
    )
    # An old opset and IR version, which every runtime reads; the operators have not changed since.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


def onnxruntime_call(model: bytes, x: np.ndarray, threads: int) -> Callable[[], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"X": x}
    return lambda: session.run(None, feed)


def openvino_call(model: bytes, x: np.ndarray, threads: int) -> Callable[[], list[np.ndarray]]:
    # Without its telemetry, which would send what it counts from a process of its own, and take a
    # second of a core beside what is timed.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # where the machine has bfloat16, the default is to compute in it
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    request = compiled.create_infer_request()
    outputs = list(range(len(compiled.outputs)))

    def call() -> list[np.ndarray]:
        result = request.infer([x], share_inputs=True, share_outputs=True)
        return [result[i] for i in outputs]

    return call


def check(name: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Raise WrongResult unless all of `found` is within tolerance of `expected`."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        raise WrongResult(f"{name}: {len(found)} results, or sizes, that torch.nn does not give")
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        scale = max(1.0, e.abs().max().item())
        error = (f - e).abs().max().item()
        if not error <= tolerance * scale:  # a NaN is wrong too
            raise WrongResult(
                f"{name}: result {i} is {error:.2e} away from torch.nn in float64, "
                f"{tolerance * scale:.0e} allowed"
            )


def runtime_calls(
    cell: str, module: nn.RNNBase, x: Tensor, peers: Sequence[str], threads: int
) -> dict[str, Call]:
    """Each peer's call over x with the module's weights."""
    if not peers:
        return {}
    steps, batch, inputs = x.shape
    model = onnx_model(cell, module, Shape(batch, steps, inputs, module.hidden_size))
    makers = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}
    return {PEERS[peer]: makers[peer](model, x.numpy(), threads) for peer in peers}
