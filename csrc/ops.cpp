// The dispatcher ops' schemas, and what is no tensor op (pybind11).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "calls_py.h"
#include "cpu/distance.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "layer.h"
#include "strategy.h"
#include "stream_py.h"

// setup.py defines FUSEDRNN_CUDA as the version of CUDA where the CUDA half is built.
#define FUSEDRNN_TEXT_OF(x) #x
#define FUSEDRNN_TEXT(x) FUSEDRNN_TEXT_OF(x)

namespace fusedrnn {
namespace {

pybind11::list isa_names() {
  pybind11::list names;
  for (const Isa* isa : usable_isas()) names.append(isa->name);
  return names;
}

std::string cuda_strategy(int64_t hidden_size, int64_t proj_size, at::ScalarType dtype) {
  const bool projected = proj_size > 0;
  return name_of(
      strategy_of({0, hidden_size, projected ? proj_size : hidden_size, projected}, dtype));
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["openmp"] = std::to_string(_OPENMP);
#ifdef FUSEDRNN_CUDA
  info["cuda"] = FUSEDRNN_TEXT(FUSEDRNN_CUDA);
#else
  info["cuda"] = "no";
#endif
  return info;
}

#ifndef FUSEDRNN_CUDA
void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      ": got CUDA tensors, but this fusedrnn was built without its CUDA "
      "half: use CPU tensors, or build it where nvcc is with FUSEDRNN_CUDA=1");
}
#endif

}  // namespace

// One whole layer, all its directions.
//
//   x       (T, B, I), or (N, I) with batch_sizes; contiguous memory is made where needed. (B, I)
//           is a single step of one direction, whose states and their gradients are (B, .) too;
//           y is then (0), and backward takes h_n in its place
//   lengths (B) int64; batch_sizes (T) int64 on the CPU; reset (T, B) bool
//   h0      (D, B, P); c0 (D, B, H), LSTM; absent: zeros
//   params  per direction w_ih, w_hh, [b_ih, b_hh], [w_hr]
//   save    keep what backward needs
//   y (T, B, D*P) or (N, D*P); h_n like h0; c_n like c0, LSTM, else (0)
//   gates (rows of x, D, row_stride(4*Hp)), LSTM and GRU; cells (rows of x, D, Hp), LSTM: valid in
//     packed rows, Hp = H rounded up to 16; (0) where not saved
//
// Backward: output_mask over [x, h0, c0, *params]; what is not wanted comes back as (0).
//
// Tangents, of float32 and float64 layers: the derivatives of y, h_n, c_n along the tangents of x,
// h0, c0, *params, and those of backward's results along them and along the tangents of dy, dh_n,
// dc_n (gradient_tangents). Absent: zeros. By the symmetry of second derivatives these are double
// backward's results too, with the incoming gradients in place of tangents.
TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "layer_forward(str mode, Tensor x, Tensor? lengths, Tensor? batch_sizes, Tensor? reset, "
      "Tensor? h0, Tensor? c0, Tensor[] params, bool has_biases, bool bidirectional, bool save, "
      "bool recompute=False) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "layer_backward(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? lengths, "
      "Tensor? batch_sizes, Tensor? reset, Tensor? h0, Tensor? c0, Tensor[] params, Tensor y, "
      "Tensor gates, Tensor cells, bool has_biases, bool bidirectional, bool[] output_mask) -> "
      "(Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
  m.def(
      "layer_tangents(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? lengths, "
      "Tensor? batch_sizes, Tensor? reset, Tensor? h0, Tensor? c0, Tensor[] params, Tensor y, "
      "Tensor gates, Tensor cells, Tensor?[] tangents, Tensor?[] gradient_tangents, "
      "bool has_biases, bool bidirectional, bool[] output_mask) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
  // sigmoid or tanh exactly as the cells of instruction set `isa` apply them: for tests.
  m.def("activation(str name, str isa, Tensor x) -> Tensor");
}

// Gradients come from the node of autograd.cpp and from fusedrnn._layer alone; calling the ops
// directly with inputs that require grad raises in backward instead of giving none.
TORCH_LIBRARY_IMPL(fusedrnn, Autograd, m) {
  for (const char* op : {"layer_forward", "layer_backward", "layer_tangents", "activation"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

#ifndef FUSEDRNN_CUDA
TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  for (const char* op : {"layer_forward", "layer_backward"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}
#endif

}  // namespace fusedrnn

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled half of fusedrnn.";
  m.def("cpu_isas", &fusedrnn::isa_names,
        "Names of the instruction sets compiled in and usable here, the plainest first.");
  m.def(
      "get_cpu_isa", [] { return fusedrnn::current_isa().name; },
      "Name of the instruction set in use.");
  m.def("set_cpu_isa", &fusedrnn::set_isa, pybind11::arg("name"),
        "Uses instruction set `name` from the next call on; ValueError where it is not usable.");
  m.def("cuda_strategy", torch::wrap_pybind_function_no_gil(fusedrnn::cuda_strategy),
        "Name of the way in which a CUDA device runs the recurrence of such a layer.");
  m.def("assume_threads", &fusedrnn::assume_threads, pybind11::arg("distance"),
        "Takes threads for 'near' or 'far' from now on; 'measured': as they are. For tests.");
  fusedrnn::define_calls(m);
  m.def("empty_cache", &fusedrnn::empty_cache,
        "Gives the memory kept for the next calls back to the system.");
  fusedrnn::define_stream(m);
  m.attr("unit_alignment") = fusedrnn::kUnitAlignment;
  m.attr("segment_rows") = fusedrnn::kSegmentRows;
  m.def("build_info", &fusedrnn::build_info, "Compiler, OpenMP version and whether CUDA is in.");
}
