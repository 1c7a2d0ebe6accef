// Tensors as the ops of the CPU make, convert and read them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "layer.h"

namespace fusedrnn {

// at::empty on the CPU, past the dispatcher: a short call makes five tensors.
inline at::Tensor plain_empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::detail::empty_cpu(shape, c10::typeMetaToScalarType(options.dtype()));
}

// bfloat16 is uint16_t to the kernels.
template <class T>
inline constexpr at::ScalarType kDtype = at::CppTypeToScalarType<T>::value;
template <>
inline constexpr at::ScalarType kDtype<uint16_t> = at::kBFloat16;

// at::empty, its memory from the pool where it is large; resizable like any other.
inline at::Tensor empty_tensor(at::IntArrayRef shape, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(shape) * options.dtype().itemsize();
  if (bytes < MemoryBlock::kLeastPooled) return plain_empty(shape, options);
  auto block = std::make_unique<MemoryBlock>(bytes);
  void* data = block->data();
  const auto give_back = [](void* context) { delete static_cast<MemoryBlock*>(context); };
  return at::for_blob(data, shape)
      .context(block.release(), give_back)
      .options(options)
      .resizeable_storage()
      .allocator(c10::GetCPUAllocator())
      .make_tensor();
}

// So many values are converted before a second thread pays.
inline constexpr int64_t kValuesToConvert = int64_t{64} << 10;

// t in another dtype. Short calls feel even a conversion that changes nothing, and the dispatcher's
// way to bfloat16 and back.
inline at::Tensor as_dtype(const at::Tensor& t, at::ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  const bool narrows = t.scalar_type() == at::kFloat && dtype == at::kBFloat16;
  const bool widens = t.scalar_type() == at::kBFloat16 && dtype == at::kFloat;
  if (!t.is_contiguous() || !(narrows || (widens && t.numel() <= 1024))) return t.to(dtype);
  at::Tensor result = empty_tensor(t.sizes(), t.options().dtype(dtype));
  if (widens) {
    const auto* from = static_cast<const c10::BFloat16*>(t.const_data_ptr());
    std::copy(from, from + t.numel(), static_cast<float*>(result.mutable_data_ptr()));
    return result;
  }
  const auto* from = static_cast<const float*>(t.const_data_ptr());
  auto* to = static_cast<uint16_t*>(result.mutable_data_ptr());
  at::parallel_for(0, t.numel(), kValuesToConvert, [&](int64_t begin, int64_t end) {
    current_isa().bf16.round(from + begin, to + begin, end - begin);
  });
  return result;
}

inline at::Tensor zero_tensor(at::IntArrayRef shape, const at::TensorOptions& options) {
  return empty_tensor(shape, options).zero_();
}

// So many bytes are zeroed before a second thread pays.
inline constexpr int64_t kPaddingBytes = int64_t{256} << 10;

// Writes zeros to the rows of t, (T, B, .) like x, that are padding.
inline void zero_padding(const at::Tensor& t, const Layer& layer, const Schedule& schedule) {
  const int64_t batch = layer.batch;
  const size_t bytes = t.numel() / layer.rows * t.element_size();
  char* data = static_cast<char*>(t.mutable_data_ptr());
  at::parallel_for(0, layer.steps, 1 + kPaddingBytes / std::max<size_t>(1, bytes * batch),
                   [&](int64_t from, int64_t to) {
                     for (int64_t step = from; step < to; ++step) {
                       for (int64_t b = step < schedule.steps ? schedule.rows[step] : 0; b < batch;
                            ++b) {
                         std::memset(data + (step * batch + schedule.order[b]) * bytes, 0, bytes);
                       }
                     }
                   });
}

template <class T>
T* data_of(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fusedrnn
