// What the kernels that keep W_hh need of the driver: weights with whole tiles, a form, an
// exchange.
#include <algorithm>
#include <limits>

#include "cuda/driver.h"
#include "cuda/fragment_map.h"

namespace fusedrnn {

Recurrence persistent_recurrence(const Layer& layer,
                                 const std::function<int64_t(const PersistentForm&)>& resident) {
  const int size = layer.dtype == at::kFloat ? 4 : 2;  // of a value, in bytes
  const int64_t units = persistent_units(layer.sizes.hidden);
  const int64_t batch = std::max<int64_t>(layer.batch, 1);
  const Precision precision = recurrence_uses_tf32(layer) ? Precision::kTf32 : Precision::kExact;
  // The fewest launches for a part of time, one after the other; then the least work for a CTA. Of
  // two alike the first: one direction at a time takes less memory, and with more units fewer CTAs
  // read each row's state.
  Recurrence found{Strategy::kPerStep};
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int sides = 1; sides <= layer.directions; ++sides) {
    for (const auto& is : kPersistentForms) {
      const int64_t bytes = int64_t{is.depths} * (kPersistentThreads / kWarp) * kDepthBytes;
      if (!is.of(size, precision) || units * size > bytes) continue;
      const PersistentForm form = {is.units, is.depths, is.rows, precision};
      const int64_t groups = resident(form) / (units / form.units * sides);
      if (groups == 0) continue;
      const int64_t rows = std::min(groups, (batch + form.rows - 1) / form.rows) * form.rows;
      const int64_t launches = layer.directions / sides * ((batch + rows - 1) / rows);
      const bool less = form.units * form.rows < found.form.units * found.form.rows;
      if (launches > fewest || (launches == fewest && !less)) continue;
      fewest = launches;
      found = {Strategy::kPersistent, sides, form, static_cast<int>(rows)};
    }
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

at::Tensor exchange_memory(const Layer& layer, const at::Tensor& x, int64_t sides, int64_t steps,
                           int64_t blocks) {
  const int64_t words = blocks * persistent_units(layer.sizes.hidden) * x.element_size() / 4;
  return at::empty({sides, steps, layer.batch, words}, x.options().dtype(at::kInt));
}

}  // namespace fusedrnn
