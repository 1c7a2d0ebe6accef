// What the kernels that keep W_hh need of the driver: weights with whole tiles, a form, an
// exchange.
#include "cuda/driver.h"

namespace fusedrnn {

Recurrence persistent_recurrence(int64_t hidden, int64_t batch,
                                 const std::function<int64_t(const PersistentForm&)>& resident) {
  // As many units as fit a CTA's registers: the more, the fewer CTAs read each row's state.
  const int units = hidden <= 512 ? 32 : 16;
  const int64_t ctas = persistent_units(hidden) / units;
  Recurrence found{Strategy::kPerStep};
  for (const int rows : {8, 16, 32}) {
    if (rows == 32 && units == 32) break;  // its sums would not fit shared memory
    const PersistentForm form = {units, rows};
    const int64_t groups = resident(form) / ctas;
    if (groups == 0) break;
    const int64_t most = std::min(groups, (batch + rows - 1) / rows) * rows;
    found = {Strategy::kPersistent, form, static_cast<int>(most)};
    if (most >= batch) break;
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
  const int64_t words = blocks * persistent_units(layer.sizes.hidden) / 2;
  return at::empty({steps, layer.batch, words}, x.options().dtype(at::kInt));
}

}  // namespace fusedrnn
