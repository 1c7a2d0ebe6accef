// The order of steps, and the precision of their products.
#include "cuda/driver.h"

#include <algorithm>

namespace fusedrnn {

Walk::Walk(const Layer& layer, const LayerInputs& in)
    : steps_(layer.steps),
      batch_(layer.batch),
      lengths_(dense(in.lengths)),
      reset_(dense(in.reset)) {
  row_.resize(steps_ + 1, 0);
  if (in.batch_sizes) {
    const at::Tensor sizes = in.batch_sizes->contiguous();
    const int64_t* rows = sizes.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < steps_; ++t) row_[t + 1] = row_[t] + rows[t];
    while (steps_ > 0 && rows[steps_ - 1] == 0) --steps_;
  } else {
    for (int64_t t = 0; t < steps_; ++t) row_[t + 1] = row_[t] + batch_;
    if (batch_ == 0) steps_ = 0;
  }
}

Step Walk::step(int64_t t, bool reverse) const {
  const int64_t before = reverse ? t + 1 : t - 1, after = reverse ? t - 1 : t + 1;
  const auto inside = [&](int64_t other) { return other >= 0 && other < steps_; };
  const auto reset_at = [&](int64_t boundary) {
    return const_values_of<bool>(reset_, boundary * batch_);
  };
  Step s{};
  s.time = t;
  s.rows = rows(t);
  s.lengths = lengths();
  s.time_before = before;
  s.rows_before = inside(before) ? rows(before) : 0;
  s.boundary_before = reverse ? t + 1 : t;
  s.boundary_after = reverse ? t : t + 1;
  if (reset_.defined()) {
    // Step 0 of the forward direction may start a segment; the last one of the reverse may not.
    if (inside(before) || !reverse) s.cut_before = reset_at(s.boundary_before);
    if (inside(after)) s.cut_after = reset_at(s.boundary_after);
  }
  return s;
}

std::vector<Steps> Walk::parts(int64_t most_rows, bool backwards) const {
  std::vector<Steps> parts;
  for (int64_t begin = 0; begin < steps_;) {
    int64_t end = begin + 1;
    while (end < steps_ && rows(Steps{begin, end + 1}) <= most_rows) ++end;
    parts.push_back({begin, end});
    begin = end;
  }
  if (backwards) std::reverse(parts.begin(), parts.end());
  return parts;
}

int64_t Walk::most_rows(const std::vector<Steps>& parts) const {
  int64_t most = 0;
  for (const Steps part : parts) most = std::max(most, rows(part));
  return most;
}

RecurrentPrecision::RecurrentPrecision(const Layer& layer) {
  using at::Float32Backend;
  using at::Float32Op;
  using at::Float32Precision;
  if (layer.dtype != at::kFloat) return;
  at::Context& context = at::globalContext();
  const auto precision = [&](Float32Op op) {
    return context.float32Precision(Float32Backend::CUDA, op);
  };
  const Float32Precision products = precision(Float32Op::MATMUL);
  const bool wanted = precision(Float32Op::RNN) == Float32Precision::TF32;
  if (wanted == (products == Float32Precision::TF32)) return;
  if (wanted) {
    before_ = products;
    context.setAllowTF32CuBLAS(true);  // the older switch too: torch wants both to agree
  } else {
    off_.emplace();
  }
}

RecurrentPrecision::~RecurrentPrecision() {
  if (!before_) return;
  at::Context& context = at::globalContext();
  context.setAllowTF32CuBLAS(false);
  context.setFloat32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL, *before_);
}

}  // namespace fusedrnn
