// What the kernels that keep W_hh need of the driver: weights with whole tiles, a form, an
// exchange.
#include "cuda/driver.h"
#include "cuda/fragment_map.h"

namespace fusedrnn {

Recurrence persistent_recurrence(const Layer& layer,
                                 const std::function<int64_t(const PersistentForm&)>& resident) {
  const bool half = layer.dtype != at::kFloat;
  const int64_t units = persistent_units(layer.sizes.hidden), batch = layer.batch;
  const Precision precision = recurrence_uses_tf32(layer) ? Precision::kTf32 : Precision::kExact;
  Recurrence found{Strategy::kPerStep};
  for (const auto& is : kPersistentForms) {
    const int64_t bytes = int64_t{is.depths} * (kPersistentThreads / kWarp) * kDepthBytes;
    const bool fits = units * (half ? 2 : 4) <= bytes;
    if (is.half > half || !fits) continue;
    const PersistentForm form = {is.units, is.depths, is.rows, precision};
    const int64_t groups = resident(form) / (units / form.units);
    if (groups == 0) continue;
    const int rows =
        static_cast<int>(std::min(groups, (batch + form.rows - 1) / form.rows)) * form.rows;
    // The whole batch at once, or more of it; then the least work for a CTA. Of two alike the
    // first, with more units: fewer CTAs read each row's state.
    const PersistentForm& best = found.form;
    const bool none = found.strategy == Strategy::kPerStep;
    const bool more = rows > found.rows && found.rows < batch;
    const bool less = rows >= std::min<int64_t>(found.rows, batch) &&
                      form.units * form.rows < best.units * best.rows;
    if (none || more || less) found = {Strategy::kPersistent, form, rows};
  }
  return found;
}

at::Tensor kept_weight(Strategy strategy, const at::Tensor& w) {
  const int64_t hidden = w.size(1);
  const int64_t units =
      strategy == Strategy::kOneCta ? one_cta_units(hidden) : persistent_units(hidden);
  const bool aligned = reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16 == 0;
  if (hidden == units && aligned && w.is_contiguous()) return w;
  const std::vector<int64_t> shape = {w.size(0), units, w.size(2), units};
  const at::Tensor padded =
      hidden == units ? at::empty(shape, w.options()) : at::zeros(shape, w.options());
  padded.narrow(1, 0, hidden).narrow(3, 0, hidden).copy_(w);
  return padded;
}

at::Tensor exchange_memory(const Layer& layer, const at::Tensor& x, const std::vector<Steps>& parts,
                           int64_t blocks) {
  int64_t steps = 0;
  for (const Steps part : parts) steps = std::max(steps, part.end - part.begin);
  const int64_t words = blocks * persistent_units(layer.sizes.hidden) * x.element_size() / 4;
  return at::empty({steps, layer.batch, words}, x.options().dtype(at::kInt));
}

}  // namespace fusedrnn
