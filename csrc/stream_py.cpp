#include "stream_py.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/stream.h"
#include "layer.h"

namespace fusedrnn {
namespace {

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

WeightFormat format_of(const std::string& name) {
  if (name == "float32") return WeightFormat::kFloat32;
  if (name == "bfloat16") return WeightFormat::kBfloat16;
  if (name == "int8") return WeightFormat::kInt8;
  throw py::value_error("weights: expected 'float32', 'bfloat16' or 'int8', got '" + name + "'");
}

// (mode, [w_ih, w_hh, b_ih, b_hh, w_hr]) of each layer: contiguous float32 tensors, None where
// there is none. fusedrnn/stream.py made and checked them.
using LayerTensors = std::tuple<std::string, std::vector<OptionalTensor>>;

std::unique_ptr<Stream> make_stream(const std::vector<LayerTensors>& layers,
                                    const std::string& weights, int64_t batch) {
  std::vector<StreamLayer> found;
  for (const auto& [mode, tensors] : layers) {
    const auto data = [&, &params = tensors](int index) {
      return params.at(index) ? params[index]->const_data_ptr<float>() : nullptr;
    };
    const Cell cell = cell_of(mode);
    const int64_t input = tensors.at(0)->size(1), output = tensors.at(1)->size(1);
    const int64_t hidden = tensors.at(0)->size(0) / gate_blocks(cell);
    found.push_back({cell,
                     {input, hidden, output, tensors.at(4).has_value()},
                     {data(0), data(1), data(2), data(3), data(4)}});
  }
  return std::make_unique<Stream>(found, format_of(weights), batch);
}

// Sizes as Python writes them.
std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// How many steps a call takes, and the shape of what it returns.
struct Shape {
  int64_t steps;
  std::vector<int64_t> result;
};

// Input is (T) steps of a sequence, then (B) unless it is one row, then I.
Shape shape_of(const Stream& stream, const std::vector<int64_t>& given, bool sequence) {
  const size_t lead = sequence ? 1 : 0;
  const bool batched = given.size() == lead + 2;
  const bool single = given.size() == lead + 1 && stream.batch() == 1;
  if (!(batched || single) || given.back() != stream.input_size() ||
      (batched && given[lead] != stream.batch())) {
    const std::string steps = sequence ? "T, " : "", sizes = std::to_string(stream.input_size());
    std::string expected = "(" + steps + std::to_string(stream.batch()) + ", " + sizes + ")";
    if (stream.batch() == 1) expected += " or (" + steps + sizes + (sequence ? ")" : ",)");
    throw py::value_error("x: expected shape " + expected + ", got " + shape_text(given));
  }
  Shape shape{sequence ? given[0] : 1, given};
  shape.result.back() = stream.output_size();
  return shape;
}

void run(Stream& stream, const float* x, float* y, int64_t steps, bool release) {
  const int threads = at::get_num_threads();
  bool done;
  if (release) {
    const py::gil_scoped_release no_gil;
    done = stream.run(x, y, steps, threads);
  } else {
    done = stream.run(x, y, steps, threads);
  }
  if (!done) throw std::runtime_error("this Stream is running in another thread: fork() it");
}

py::object run_tensor(Stream& stream, const at::Tensor& x, bool sequence) {
  if (x.scalar_type() != at::kFloat || !x.device().is_cpu() || x.layout() != at::kStrided) {
    throw py::type_error("x: expected a float32 tensor on the CPU, got " +
                         std::string(c10::toString(x.scalar_type())) + " on " + x.device().str());
  }
  if (x.requires_grad() && at::GradMode::is_enabled()) {
    throw std::runtime_error("x requires grad, but a Stream has no gradients: x.detach() it");
  }
  const Shape shape = shape_of(stream, x.sizes().vec(), sequence);
  const at::Tensor dense = (x.is_neg() ? x.resolve_neg() : x).contiguous();
  at::Tensor y = at::detail::empty_cpu(shape.result, at::kFloat);
  run(stream, dense.const_data_ptr<float>(), y.mutable_data_ptr<float>(), shape.steps, sequence);
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
}

py::object run_array(Stream& stream, const py::array& x, bool sequence) {
  if (!py::isinstance<py::array_t<float>>(x)) {
    throw py::type_error("x: expected a float32 array, got " +
                         py::cast<std::string>(py::str(x.dtype())));
  }
  const FloatArray dense = FloatArray::ensure(x);
  if (!dense) throw py::error_already_set();
  const Shape shape = shape_of(stream, {x.shape(), x.shape() + x.ndim()}, sequence);
  py::array_t<float> y(shape.result);
  run(stream, dense.data(), y.mutable_data(), shape.steps, sequence);
  return y;
}

// In the kind that came in.
py::object run_any(Stream& stream, const py::object& x, bool sequence) {
  if (THPVariable_Check(x.ptr())) return run_tensor(stream, THPVariable_Unpack(x.ptr()), sequence);
  if (py::isinstance<py::array>(x)) return run_array(stream, py::array(x), sequence);
  throw py::type_error(std::string("x: expected a torch.Tensor or a numpy.ndarray, got ") +
                       Py_TYPE(x.ptr())->tp_name);
}

// (h, c) of a layer as tensors (B, P) and (B, H); c is empty but for an LSTM.
std::tuple<at::Tensor, at::Tensor> get_state(const Stream& stream, int64_t index) {
  const FrozenLayer& layer = stream.layer(index);
  const int64_t units = has_cell_state(layer.cell) ? layer.sizes.hidden : 0;
  at::Tensor h = at::empty({stream.batch(), layer.sizes.output}, at::kFloat);
  at::Tensor c = at::empty({stream.batch(), units}, at::kFloat);
  layer.get_state(h.mutable_data_ptr<float>(), c.mutable_data_ptr<float>());
  return {h, c};
}

void set_state(const Stream& stream, int64_t index, const OptionalTensor& h,
               const OptionalTensor& c) {
  const auto data = [](const OptionalTensor& t) {
    return t ? t->const_data_ptr<float>() : nullptr;
  };
  stream.layer(index).set_state(data(h), data(c));
}

}  // namespace

void define_stream(py::module_& m) {
  py::class_<Stream>(m, "Stream", "What fusedrnn.Stream wraps.")
      .def(py::init(&make_stream))
      .def("step", [](Stream& stream, const py::object& x) { return run_any(stream, x, false); })
      .def("run", [](Stream& stream, const py::object& x) { return run_any(stream, x, true); })
      .def("get_state", &get_state)
      .def("set_state", &set_state)
      .def("fork", &Stream::fork);
}

}  // namespace fusedrnn
