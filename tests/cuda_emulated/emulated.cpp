// The CUDA half on the host: its driver and its kernels as they stand, on CPU tensors, behind ops
// of their own. One file, as torch's headers are what takes time.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "layer.cpp"
#include "strategy.cpp"
#include "cuda/walk.cpp"
#include "cuda/persistent_driver.cpp"
#include "cuda/forward_driver.cpp"
#include "cuda/backward_driver.cpp"
#include "cuda/kernels_inl.cuh"
#include "cuda/one_cta_inl.cuh"
#include "cuda/persistent_inl.cuh"

template struct fusedrnn::Kernels<float>;
template struct fusedrnn::Kernels<double>;
template struct fusedrnn::Kernels<fusedrnn::BFloat16>;
template struct fusedrnn::Kernels<fusedrnn::Half>;
template struct fusedrnn::OneCtaKernels<float>;
template struct fusedrnn::OneCtaKernels<fusedrnn::BFloat16>;
template struct fusedrnn::OneCtaKernels<fusedrnn::Half>;
template struct fusedrnn::PersistentForward<float>;
template struct fusedrnn::PersistentForward<fusedrnn::BFloat16>;
template struct fusedrnn::PersistentForward<fusedrnn::Half>;
template struct fusedrnn::PersistentBackward<float>;
template struct fusedrnn::PersistentBackward<fusedrnn::BFloat16>;
template struct fusedrnn::PersistentBackward<fusedrnn::Half>;

namespace fusedrnn {

CudaStream current_stream() { return nullptr; }

namespace {

int64_t bytes_of_part = int64_t{64} << 20;

// For each product so far: whether cuBLAS would have used TF32.
std::vector<bool> products_with_tf32;
int64_t products_until_failure = -1;

bool uses_tf32() {
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 && !at::NoTF32Guard::should_disable_tf32();
}

}  // namespace

int64_t part_bytes() { return bytes_of_part; }

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1), "a product that does not fit");
  TORCH_CHECK(products_until_failure-- != 0, "a product failed");
  products_with_tf32.push_back(uses_tf32());
  const auto wide = [](const at::Tensor& t) {
    return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
  };
  out.copy_(at::mm(wide(a), wide(b)));
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_forward(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList params, bool has_biases, bool bidirectional,
    bool save) {
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  ForwardResult r = forward_on_device(Layer(mode, in, has_biases, bidirectional), in, save);
  return {r.y, r.h_n, r.c_n, r.gates, r.cells};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> layer_backward(
    const std::string& mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
    const OptionalTensor& dc_n, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList params, const at::Tensor& y, const at::Tensor& gates,
    const at::Tensor& cells, bool has_biases, bool bidirectional, c10::List<bool> output_mask) {
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer(mode, in, has_biases, bidirectional);
  const BackwardInputs saved{in, dy, dh_n, dc_n, y, gates, cells};
  check_backward(layer, saved, output_mask, /*may_recompute=*/false);
  BackwardResult r = backward_on_device(layer, saved, output_mask);
  return {r.dx, r.dh0, r.dc0, r.dparams};
}

// Values rounded to half precision and back as the kernels' loads and stores do on a host.
at::Tensor round_trip(const at::Tensor& x, at::ScalarType dtype) {
  at::Tensor to = x.to(dtype, /*non_blocking=*/false, /*copy=*/true);
  const auto run = [&]<class E>() {
    E* kept = static_cast<E*>(to.mutable_data_ptr());
    for (int64_t i = 0; i < x.numel(); ++i) store(kept + i, x.const_data_ptr<float>()[i]);
    at::Tensor back = at::empty_like(x);
    for (int64_t i = 0; i < x.numel(); ++i) back.mutable_data_ptr<float>()[i] = load(kept + i);
    return back;
  };
  return dtype == at::kHalf ? run.operator()<Half>() : run.operator()<BFloat16>();
}

// A block of 64 threads turns around 64 values, rightly or with a fault.
at::Tensor reversed_in_block(const std::string& fault) {
  at::Tensor to = at::empty({64}, at::kFloat);
  float* out = to.mutable_data_ptr<float>();
  EmulatedBlock emulated(0, 64, 64 * sizeof(float));
  emulated.run([&](int thread) {
    const Block block(emulated, thread);
    float* shared = reinterpret_cast<float*>(block.shared());
    shared[thread] = static_cast<float>(thread);
    float sums[4] = {};
    if (fault == "two reasons" && thread == 3) block.multiply_add(Half{}, sums, {0, 0, 0, 0}, 0, 0);
    if (fault == "two reasons" && thread != 3) block.of_lane_across(0, 1);
    if (fault != "no barrier" && (fault != "a barrier missed" || thread != 5)) block.sync();
    out[thread] = shared[63 - thread];
  });
  return to;
}

// The persistent kernels' form for a layer: units, depths, rows, and rows of the batch and
// directions a launch.
std::vector<int64_t> persistent_form(const std::string& mode, const at::Tensor& x,
                                     const OptionalTensor& lengths,
                                     const OptionalTensor& batch_sizes, const OptionalTensor& reset,
                                     const OptionalTensor& h0, const OptionalTensor& c0,
                                     at::TensorList params, bool has_biases, bool bidirectional) {
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer(mode, in, has_biases, bidirectional);
  Recurrence how{};
  with_storage(layer, [&]<class E>() { how = recurrence_of<PersistentForward, E>(layer); });
  return {how.form.units, how.form.depths, how.form.rows, how.rows, how.sides};
}

// What multiply() saw since the last call.
std::vector<int64_t> take_products() {
  const std::vector<bool> seen = std::exchange(products_with_tf32, {});
  return {seen.begin(), seen.end()};
}

}  // namespace

TORCH_LIBRARY(fusedrnn_emulated, m) {
  m.def(
      "layer_forward(str mode, Tensor x, Tensor? lengths, Tensor? batch_sizes, Tensor? reset, "
      "Tensor? h0, Tensor? c0, Tensor[] params, bool has_biases, bool bidirectional, bool save) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
      layer_forward);
  m.def(
      "layer_backward(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? lengths, "
      "Tensor? batch_sizes, Tensor? reset, Tensor? h0, Tensor? c0, Tensor[] params, Tensor y, "
      "Tensor gates, Tensor cells, bool has_biases, bool bidirectional, bool[] output_mask) -> "
      "(Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)",
      layer_backward);
  m.def("round_trip(Tensor x, ScalarType dtype) -> Tensor", round_trip);
  m.def("fail_after(int products) -> ()", [](int64_t n) { products_until_failure = n; });
  m.def("set_part_bytes(int bytes) -> ()", [](int64_t bytes) { bytes_of_part = bytes; });
  m.def("take_products() -> int[]", take_products);
  m.def(
      "persistent_form(str mode, Tensor x, Tensor? lengths, Tensor? batch_sizes, Tensor? reset, "
      "Tensor? h0, Tensor? c0, Tensor[] params, bool has_biases, bool bidirectional) -> int[]",
      persistent_form);
  m.def("reversed_in_block(str fault) -> Tensor", reversed_in_block);
  m.def("set_turns(int turns) -> ()", [](int64_t t) { turns = static_cast<Turns>(t); });
  m.def("set_device(int most_together, int clock_rate=1, int lost=-1) -> ()",
        [](int64_t most_together, int64_t clock_rate, int64_t lost) {
          EmulatedBlock::most_together = most_together;
          EmulatedBlock::clock_rate = clock_rate;
          EmulatedBlock::lost = lost;
        });
}

}  // namespace fusedrnn
