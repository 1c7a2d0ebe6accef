// How the recurrence of a layer runs on a CUDA device.
#pragma once

#include <cstdint>

#include "layer.h"

namespace fusedrnn {

enum class Strategy {
  kPerStep,  // a product and a kernel for each step: every layer
  kOneCta,   // one kernel for many steps, whose CTAs each hold all of W_hh: small layers
  // One kernel for many steps, whose CTAs hold W_hh together and exchange the state at each of
  // them. Where a device cannot have them all at a time, kPerStep takes its place.
  kPersistent,
};

// "per_step", "one_cta", "persistent".
const char* name_of(Strategy strategy);

// The largest hidden_size of one_cta.
inline constexpr int64_t kOneCtaUnits = 128;
// The same of persistent: 16 units' share of W_hh must fit a CTA.
inline int64_t most_persistent_units(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 ? 2048 : 1024;
}

// What the environment variable FUSEDRNN_CUDA_STRATEGY forces, else what suits the layer. Throws
// c10::ValueError where the variable is no strategy's name, or names one that cannot run the layer.
Strategy strategy_of(const Sizes& sizes, at::ScalarType dtype);
inline Strategy strategy_of(const Layer& layer) { return strategy_of(layer.sizes, layer.dtype); }

}  // namespace fusedrnn
