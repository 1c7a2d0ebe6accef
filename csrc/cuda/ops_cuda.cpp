// The layer ops on a GPU: what the driver asks a device for, and their registration.
//
// Stream and device guard come from c10/cuda and products from ATen, so that this compiles against
// a torch without CUDA too (scripts/compile_cuda.sh).
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/driver.h"

namespace fusedrnn {

CudaStream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Rows enough to keep a large GPU's products busy: 4096 of the gates of an LSTM of 1024 units.
int64_t part_bytes() { return int64_t{64} << 20; }

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor to = out;
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(to, a, b);
  } else {
    at::mm_out(to, a, b, out.scalar_type());
  }
}

namespace {

// lengths and reset where x is. Those that lie on the CPU are checked as there; the copy waits for
// the GPU. Those on the GPU are taken as they are.
class OnDevice {
 public:
  OnDevice(const LayerInputs& in)
      : lengths_(moved(in.lengths, in.x)),
        reset_(moved(in.reset, in.x)),
        inputs_{in.x, lengths_, in.batch_sizes, reset_, in.h0, in.c0, in.params} {}
  OnDevice(const OnDevice&) = delete;
  const LayerInputs& inputs() const { return inputs_; }

 private:
  static OptionalTensor moved(const OptionalTensor& t, const at::Tensor& x) {
    return t ? OptionalTensor(t->to(x.device())) : std::nullopt;
  }
  const OptionalTensor lengths_, reset_;
  const LayerInputs inputs_;
};

Layer checked(const std::string& mode, const LayerInputs& in, bool has_biases, bool bidirectional) {
  Layer layer(mode, in, has_biases, bidirectional);
  if (in.lengths && in.lengths->device().is_cpu()) check_lengths(layer, *in.lengths);
  return layer;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_forward(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList params, bool has_biases, bool bidirectional, bool save,
    bool recompute) {
  TORCH_CHECK_NOT_IMPLEMENTED(!recompute, "recompute: not on CUDA so far");
  const c10::cuda::CUDAGuard guard(x.device());
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer = checked(mode, in, has_biases, bidirectional);
  const OnDevice there(in);
  ForwardResult r = forward_on_device(layer, there.inputs(), save);
  return {std::move(r.y), std::move(r.h_n), std::move(r.c_n), std::move(r.gates),
          std::move(r.cells)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> layer_backward(
    const std::string& mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
    const OptionalTensor& dc_n, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList params, const at::Tensor& y, const at::Tensor& gates,
    const at::Tensor& cells, bool has_biases, bool bidirectional, c10::List<bool> output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer = checked(mode, in, has_biases, bidirectional);
  const OnDevice there(in);
  const BackwardInputs saved{there.inputs(), dy, dh_n, dc_n, y, gates, cells};
  check_backward(layer, saved, output_mask, /*may_recompute=*/false);
  BackwardResult r = backward_on_device(layer, saved, output_mask);
  return {std::move(r.dx), std::move(r.dh0), std::move(r.dc0), std::move(r.dparams)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("layer_backward", layer_backward);
}

}  // namespace fusedrnn
