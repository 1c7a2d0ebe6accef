// A short call spends its time in Python and on the way from it: here its arguments are taken apart
// by hand, and its result is built in the form that a module returns.
#include "calls_py.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "autograd.h"

namespace fusedrnn {
namespace {

namespace py = pybind11;

// Calls of fewer multiplications, some 10 us, keep the interpreter's lock: to give it up and take
// it again were 2,000 of the 54,000 instructions of the shortest one (callgrind).
constexpr double kWorthUnlocking = 1e6;

// Not what a trace knows by symbols for its sizes alone.
bool read(py::handle from, at::Tensor& to) {
  if (!THPVariable_Check(from.ptr())) return false;
  to = THPVariable_Unpack(from.ptr());
  return !to.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

bool read(py::handle from, OptionalTensor& to) {
  if (from.is_none()) return true;
  return THPVariable_Check(from.ptr()) && read(from, to.emplace());
}

bool read(const py::list& from, std::vector<at::Tensor>& to) {
  to.resize(from.size());
  for (size_t i = 0; i < to.size(); ++i) {
    if (!read(from[i], to[i])) return false;
  }
  return to.size() >= 2;
}

// hx of an LSTM: a pair of tensors, or None.
bool read_pair(py::handle from, OptionalTensor& h, OptionalTensor& c) {
  if (from.is_none()) return true;
  if (!py::isinstance<py::tuple>(from) && !py::isinstance<py::list>(from)) return false;
  const auto pair = py::reinterpret_borrow<py::sequence>(from);
  return pair.size() == 2 && read(pair[0], h.emplace()) && read(pair[1], c.emplace());
}

template <class Call>
auto unlocked_if_long(const at::Tensor& x, const std::vector<at::Tensor>& params, Call call) {
  const int64_t features = x.dim() > 0 ? std::max<int64_t>(1, x.size(-1)) : 1;
  const double rows = static_cast<double>(x.numel()) / static_cast<double>(features);
  std::optional<py::gil_scoped_release> release;
  if (rows * static_cast<double>(params[0].numel() + params[1].numel()) > kWorthUnlocking) {
    release.emplace();
  }
  return call();
}

py::object plain_layer_of(const std::string& mode, py::handle input, py::handle hx,
                          const py::list& params, bool has_biases, bool bidirectional,
                          bool batch_first, bool recompute) {
  at::Tensor x;
  OptionalTensor h0, c0;
  std::vector<at::Tensor> weights;
  const bool lstm = mode == "LSTM";
  if (!read(input, x) || !read(params, weights)) return py::none();
  if (!(lstm ? read_pair(hx, h0, c0) : read(hx, h0))) return py::none();
  auto found = unlocked_if_long(x, weights, [&] {
    return plain_layer(mode, x, h0, c0, weights, has_biases, bidirectional, batch_first, recompute);
  });
  if (!found) return py::none();
  auto& [output, h_n, c_n] = *found;
  if (!lstm) return py::make_tuple(std::move(output), std::move(h_n));
  return py::make_tuple(std::move(output), py::make_tuple(std::move(h_n), std::move(c_n)));
}

// A cell's plain parameters, from its dictionaries: a third of the time that it takes in Python.
// False where one is not there: it is computed, or a bias is None and the other one not.
bool read_cell(py::handle cell, std::vector<at::Tensor>& params, bool& has_biases) {
  static PyObject* const kParameters = PyUnicode_InternFromString("_parameters");
  static PyObject* const kNames[] = {
      PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
      PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
  const auto get = [](PyObject* dictionary, PyObject* name) {
    PyObject* const found = PyDict_GetItemWithError(dictionary, name);  // borrowed
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return found;
  };
  const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(cell.ptr(), nullptr));
  if (!own) throw py::error_already_set();
  PyObject* const parameters = get(own.ptr(), kParameters);
  if (parameters == nullptr || !PyDict_Check(parameters)) return false;
  const auto is_none = [&](PyObject* name) { return get(parameters, name) == Py_None; };
  has_biases = !(is_none(kNames[2]) && is_none(kNames[3]));
  params.resize(has_biases ? 4 : 2);
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* const one = get(parameters, kNames[i]);
    if (one == nullptr || !read(one, params[i])) return false;
  }
  return true;
}

py::object cell_step_of(py::handle module, const std::string& mode, py::handle input,
                        py::handle hidden, py::handle cell) {
  at::Tensor x;
  OptionalTensor h, c;
  std::vector<at::Tensor> weights;
  bool has_biases = false;
  if (!read(input, x) || !read(hidden, h) || !read(cell, c) ||
      !read_cell(module, weights, has_biases)) {
    return py::none();
  }
  auto found =
      unlocked_if_long(x, weights, [&] { return cell_step(mode, x, h, c, weights, has_biases); });
  if (!found) return py::none();
  return py::make_tuple(std::move(std::get<0>(*found)), std::move(std::get<1>(*found)));
}

}  // namespace

void define_calls(py::module_& m) {
  m.def("layer", torch::wrap_pybind_function_no_gil(layer),
        "One layer (y, h_n, c_n), recorded for autograd where an input requires grad.");
  m.def("plain_layer", torch::wrap_pybind_function(plain_layer_of),
        "A module's (output, state), or None where the arguments need a closer look.");
  m.def("cell_step", torch::wrap_pybind_function(cell_step_of),
        "One step of a cell (h', c'), or None where the arguments need a closer look.");
}

}  // namespace fusedrnn
