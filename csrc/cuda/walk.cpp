// The order of steps, and the precision of their products.
#include "cuda/driver.h"

#include <algorithm>
#include <limits>

namespace fusedrnn {

Walk::Walk(const Layer& layer, const LayerInputs& in, int64_t most_steps)
    : steps_(layer.steps),
      batch_(layer.batch),
      most_steps_(most_steps),
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

Order Walk::order(bool reverse) const {
  return {steps_, batch_, reverse, lengths(), const_values_of<bool>(reset_)};
}

Step Walk::step(int64_t t, bool reverse) const {
  const Order o = order(reverse);
  const int64_t before = o.before(t);
  return o.step(t, rows_at(t), o.has(before) ? rows_at(before) : Rows{});
}

PartOfWalk Walk::part(Steps steps, bool reverse) const {
  PartOfWalk part{};
  part.order = order(reverse);
  part.begin = steps.begin;
  part.end = steps.end;
  if (steps.begin > 0) part.earlier = rows_at(steps.begin - 1);
  if (steps.end < steps_) part.rows_later = rows(steps.end);
  part.first = row_[steps.begin];
  TORCH_CHECK(row_[steps.end] - part.first <= std::numeric_limits<uint32_t>::max(),
              "fusedrnn: a step with 2^32 rows or more");
  for (int64_t t = steps.begin; t <= steps.end; ++t) {
    part.offset[t - steps.begin] = static_cast<uint32_t>(row_[t] - part.first);
  }
  return part;
}

std::vector<Steps> Walk::cut(int64_t most_rows, bool backwards) const {
  std::vector<Steps> parts;
  for (Steps left = {0, steps_}; left.count() > 0;) {
    const auto first = [&](int64_t steps) {
      return backwards ? Steps{left.end - steps, left.end} : Steps{left.begin, left.begin + steps};
    };
    int64_t steps = 1;
    while (steps < std::min(left.count(), most_steps_) && rows(first(steps + 1)) <= most_rows) {
      ++steps;
    }
    parts.push_back(first(steps));
    backwards ? left.end -= steps : left.begin += steps;
  }
  return parts;
}

Parts Walk::parts(int64_t most_rows, int directions, bool back) const {
  Parts found;
  for (int d = 0; d < directions; ++d) {
    found.of[d] = cut(most_rows, (d == 1) != back);
    for (const Steps part : found.of[d]) {
      found.rows = std::max(found.rows, rows(part));
      found.steps = std::max(found.steps, part.count());
    }
  }
  return found;
}

namespace {

at::Float32Precision precision_of(at::Float32Op op) {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, op);
}

}  // namespace

bool recurrence_uses_tf32(const Layer& layer) {
  return layer.dtype == at::kFloat &&
         precision_of(at::Float32Op::RNN) == at::Float32Precision::TF32;
}

RecurrentPrecision::RecurrentPrecision(const Layer& layer) {
  if (layer.dtype != at::kFloat) return;
  at::Context& context = at::globalContext();
  const at::Float32Precision products = precision_of(at::Float32Op::MATMUL);
  const bool wanted = recurrence_uses_tf32(layer);
  if (wanted == (products == at::Float32Precision::TF32)) return;
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
  const auto set = [&](at::Float32Precision precision) {
    context.setFloat32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL, precision);
  };
  // It may have been torch's general one: then none of its own, so that it goes on following that.
  set(at::Float32Precision::NONE);
  if (precision_of(at::Float32Op::MATMUL) != *before_) set(*before_);
}

}  // namespace fusedrnn
