// The choice between the ways in which a CUDA device can run a layer.
#include "strategy.h"

#include <cstdlib>
#include <string>

namespace fusedrnn {
namespace {

constexpr char kVariable[] = "FUSEDRNN_CUDA_STRATEGY";

bool runs_in_one_cta(const Sizes& sizes, at::ScalarType dtype) {
  return sizes.hidden <= kOneCtaUnits && !sizes.projected && dtype != at::kDouble;
}

}  // namespace

const char* name_of(Strategy strategy) {
  return strategy == Strategy::kOneCta ? "one_cta" : "per_step";
}

Strategy strategy_of(const Sizes& sizes, at::ScalarType dtype) {
  const char* variable = std::getenv(kVariable);
  const std::string wanted = variable == nullptr ? "" : variable;
  // one_cta waits for a GPU that has timed it.
  if (wanted.empty() || wanted == "auto" || wanted == name_of(Strategy::kPerStep)) {
    return Strategy::kPerStep;
  }
  TORCH_CHECK_VALUE(wanted == name_of(Strategy::kOneCta), kVariable,
                    ": expected auto, per_step or one_cta, got ", wanted);
  TORCH_CHECK_VALUE(runs_in_one_cta(sizes, dtype), kVariable,
                    ": one_cta needs hidden_size <= ", kOneCtaUnits,
                    ", no proj_size and a dtype other than float64, got hidden_size ", sizes.hidden,
                    sizes.projected ? " with proj_size, " : ", ", dtype);
  return Strategy::kOneCta;
}

}  // namespace fusedrnn
