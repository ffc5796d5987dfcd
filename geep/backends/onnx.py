"""ONNX backend: linear layers, norms and activations in ONNX Runtime on packed tokens, in float32 or in 8 bits; CPU.

A layer is two ONNX Runtime sessions with attention between them:

    hidden → [query, key, value] → attention → [output, norm, up, activation, down, norm] → hidden

Both sessions treat each token by itself, so they run on tokens without padding, and any cut of the tokens gives the
same answer. Attention is PyTorch's, once for each run of texts of equal length, as in the packed backend: in ONNX
Runtime it would need padding, and full batches took longer there. Sessions read and write the memory of torch tensors;
nothing is copied between them. Embeddings and exits run in torch.

"int8" multiplies 8-bit whole numbers in the four linear layers; norms, activations, attention and exits stay float32.
A weight has one scale for each output; an activation has one scale for each token, taken from the largest value of
that token. (ONNX Runtime's own dynamic quantisation takes one scale for the whole batch: a text's answer would depend
on the texts beside it, and one outlier would cost all of them precision.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.backends.int8 import ActivationRanges, largest_weight
from geep.backends.packed import PackedBackend
from geep.backends.packed_layer import LengthRun, PackedLayer, attend_runs, packed_layers
from geep.backends.protocol import Integers
from geep.modeling import GeepForSequenceClassification

# Activations by the names of Hugging Face's configurations: operator and attributes of ONNX.
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
}

# Gelu came with 20, the form of the other operators is that of 21; IR 10 belongs to it.
_OPSET, _IR_VERSION = 21, 10
_CONTRIB = "com.microsoft"

# Tokens that go through a session at once. More do not run faster, and memory between operators grows with them.
_TILE = 256
# Below this many tokens, handing a tile to another thread takes longer than running it.
_SMALLEST_TILE = 64


@dataclass(frozen=True, slots=True)
class TokenSession:
    """An ONNX Runtime session that maps each token by itself to `width` numbers.

    It runs on one thread; the tokens are cut into tiles, and threads of `pool` take one tile each. Sessions with
    threads of their own would be twice as many pools as layers, each waiting for the others' cores.
    """

    session: Any
    inputs: tuple[str, ...]
    width: int
    pool: ThreadPoolExecutor | None
    num_threads: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Map contiguous float32 rows (num_tokens, …) to rows (num_tokens, width)."""
        num_tokens = inputs[0].shape[0]
        out = torch.empty(num_tokens, self.width)
        tile = min(max(-(-num_tokens // self.num_threads), _SMALLEST_TILE), _TILE)
        starts = range(0, num_tokens, tile)
        if self.pool is None or len(starts) < 2:
            for start in starts:
                self._run(inputs, out, start, tile)
        else:
            tasks = [self.pool.submit(self._run, inputs, out, start, tile) for start in starts]
            for task in tasks:
                task.result()
        return out

    def _run(self, inputs: Sequence[Tensor], out: Tensor, start: int, tile: int) -> None:
        # A binding for each call: calls may come from several threads.
        binding = self.session.io_binding()
        for name, tensor in zip(self.inputs, inputs, strict=True):
            rows = tensor[start : start + tile]
            binding.bind_input(name, "cpu", 0, np.float32, rows.shape, rows.data_ptr())
        rows = out[start : start + tile]
        binding.bind_output("out", "cpu", 0, np.float32, rows.shape, rows.data_ptr())
        self.session.run_with_iobinding(binding)


@dataclass(frozen=True, slots=True)
class OnnxLayer:
    """One post-norm encoder layer on packed tokens."""

    before: TokenSession
    after: TokenSession
    layer: PackedLayer

    def __call__(self, hidden: Tensor, runs: Sequence[LengthRun]) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden)."""
        return self.after(attend_runs(self.before(hidden), runs, self.layer.num_heads), hidden)

    def first_tokens(self, hidden: Tensor, runs: Sequence[LengthRun], lengths: Integers) -> Tensor:
        """Run the layer for the first token of each text; so few rows that the plain layer serves."""
        return self.layer.first_tokens(hidden, runs, lengths)


@dataclass(frozen=True, slots=True)
class OnnxBackend(PackedBackend):
    """The packed backend with its layers in ONNX Runtime; see the module's docstring and `Backend`."""

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes it runs on a kind of device, its default first; it runs on the CPU alone."""
        return ("float32", "int8") if device_type == "cpu" else ()

    @classmethod
    def build(cls, model: GeepForSequenceClassification, *, dtype: str, ranges: ActivationRanges | None = None) -> Self:
        """Write and load the sessions; nothing touches the disk. PyTorch's number of threads now is the backend's.

        Args:
            model: On the CPU, in float32, in eval mode.
            dtype: "float32" or "int8".
            ranges: Not used: scales are taken from each token.

        Raises:
            ValueError: If the family's layer or its activation is another one.
            ImportError: If the packages of the extra `onnx` are missing.
        """
        plain = packed_layers(model)
        activation = plain[0].activation_name
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"The onnx backend knows the activations {sorted(ACTIVATIONS)}, got {activation!r}; "
                "use backend='packed'."
            )
        onnx, runtime = _packages()
        largest = largest_weight() if dtype == "int8" else None
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="geep-onnx") if threads > 1 else None

        def load(graph: _Graph, inputs: dict[str, int], width: int) -> TokenSession:
            return TokenSession(_session(runtime, graph.model(inputs, width)), tuple(inputs), width, pool, threads)

        def layer(weights: PackedLayer) -> OnnxLayer:
            width = weights.out[0].shape[0]
            before, after = _Graph(onnx, largest), _Graph(onnx, largest)
            before.linear("hidden", weights.qkv)
            _write_after_attention(after, weights, activation)
            return OnnxLayer(
                load(before, {"hidden": width}, 3 * width),
                load(after, {"mixed": width, "hidden": width}, width),
                weights,
            )

        return cls(model, tuple(map(layer, plain)))


# --------------------------------------------------------------------------------------------------------------------
# Graphs
# --------------------------------------------------------------------------------------------------------------------


class _Graph:
    """An ONNX graph being written: each method adds nodes and returns the name of what they compute.

    Args:
        onnx: The package.
        largest: Largest 8-bit weight; None: weights stay float32.
    """

    def __init__(self, onnx: Any, largest: int | None) -> None:
        self.onnx, self.largest = onnx, largest
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def add(self, operator: str, *inputs: str | NDArray[Any] | np.generic, domain: str = "", **attributes: Any) -> str:
        """Add a node; inputs are names, or arrays that the graph then keeps."""
        names = [each if isinstance(each, str) else self._keep(np.asarray(each)) for each in inputs]
        out = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, names, [out], domain=domain, **attributes))
        return out

    def _keep(self, array: NDArray[Any]) -> str:
        name = f"tensor_{len(self.tensors)}"
        self.tensors.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def linear(self, x: str, linear: tuple[Tensor, Tensor]) -> str:
        """Apply a linear layer, given as weight (out, in) and bias (out,)."""
        weight, bias = linear[0].t().numpy(), linear[1].numpy()
        product = self.add("MatMul", x, weight) if self.largest is None else self._product_int8(x, weight, self.largest)
        return self.add("Add", product, bias)

    def _product_int8(self, x: str, weight: NDArray[np.float32], largest: int) -> str:
        # Zeros are stored as 128: unsigned times signed is the pairing that CPUs multiply fastest. Tokens or outputs
        # that are all zero get the smallest scale, by which they stay zero.
        zero, one, smallest = np.uint8(128), np.float32(1), np.finfo(np.float32).tiny
        weight_scale = np.maximum(np.abs(weight).max(axis=0) / np.float32(largest), smallest)
        whole_weight = np.rint(weight / weight_scale).astype(np.int8)
        top = self.add("ReduceMax", self.add("Abs", x), np.array([1]), keepdims=1)
        scale = self.add("Max", self.add("Mul", top, np.float32(1 / 127)), smallest)
        whole = self.add("QuantizeLinear", self.add("Div", x, scale), one, zero)
        product = self.add("MatMulIntegerToFloat", whole, whole_weight, one, weight_scale, zero, domain=_CONTRIB)
        return self.add("Mul", product, scale)

    def model(self, inputs: Mapping[str, int], width: int) -> bytes:
        """Return the model, serialised: one row a token, inputs of given widths; the last node computes the output."""
        helper, proto = self.onnx.helper, self.onnx.TensorProto

        def rows(name: str, columns: int) -> Any:
            return helper.make_tensor_value_info(name, proto.FLOAT, ["num_tokens", columns])

        self.nodes[-1].output[0] = "out"
        infos = [rows(name, columns) for name, columns in inputs.items()]
        graph = helper.make_graph(self.nodes, "tokens", infos, [rows("out", width)], self.tensors)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()


def _write_after_attention(graph: _Graph, layer: PackedLayer, activation: str) -> None:
    def norm(x: str, norm: Any) -> str:
        return graph.add("LayerNormalization", x, norm.weight.numpy(), norm.bias.numpy(), epsilon=norm.eps)

    operator, attributes = ACTIVATIONS[activation]
    hidden = norm(graph.add("Add", graph.linear("mixed", layer.out), "hidden"), layer.attention_norm)
    wide = graph.add(operator, graph.linear(hidden, layer.up), **attributes)
    norm(graph.add("Add", graph.linear(wide, layer.down), hidden), layer.output_norm)


# --------------------------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------------------------


def _packages() -> tuple[Any, Any]:
    """Import onnx and onnxruntime; only engines on this backend need them."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"backend='onnx' needs the package {error.name!r}, which is not installed; run: pip install 'geep[onnx]'"
        ) from error
    return onnx, onnxruntime


def _session(runtime: Any, model: bytes) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # An arena would keep the largest memory between operators for each session, dozens of times what one run needs.
    options.enable_cpu_mem_arena = False
    # Graphs run as written. ONNX Runtime would fuse residual and norm into one operator (SkipLayerNormalization) whose
    # CPU kernel takes several times as long as the parts.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
