// The choice between the ways in which a CUDA device can run a layer.
#include "strategy.h"

#include <cstdlib>
#include <string>

namespace fusedrnn {
namespace {

constexpr char kVariable[] = "FUSEDRNN_CUDA_STRATEGY";

// Why a strategy cannot run the layer; empty where it can.
std::string refusal(Strategy strategy, const Sizes& sizes, at::ScalarType dtype) {
  if (strategy == Strategy::kPerStep) return "";
  const int64_t most = strategy == Strategy::kOneCta ? kOneCtaUnits : most_persistent_units(dtype);
  if (sizes.hidden <= most && !sizes.projected && dtype != at::kDouble) return "";
  return c10::str(name_of(strategy), " needs hidden_size <= ", most,
                  ", no proj_size and a dtype other than float64, got hidden_size ", sizes.hidden,
                  sizes.projected ? " with proj_size, " : ", ", dtype);
}

}  // namespace

const char* name_of(Strategy strategy) {
  switch (strategy) {
    case Strategy::kOneCta:
      return "one_cta";
    case Strategy::kPersistent:
      return "persistent";
    default:
      return "per_step";
  }
}

Strategy strategy_of(const Sizes& sizes, at::ScalarType dtype) {
  const char* variable = std::getenv(kVariable);
  const std::string wanted = variable == nullptr ? "" : variable;
  // one_cta and persistent wait for a GPU that has timed them.
  if (wanted.empty() || wanted == "auto") return Strategy::kPerStep;
  for (const Strategy strategy : {Strategy::kPerStep, Strategy::kOneCta, Strategy::kPersistent}) {
    if (wanted != name_of(strategy)) continue;
    const std::string why = refusal(strategy, sizes, dtype);
    TORCH_CHECK_VALUE(why.empty(), kVariable, ": ", why);
    return strategy;
  }
  TORCH_CHECK_VALUE(false, kVariable, ": expected auto, per_step, one_cta or persistent, got ",
                    wanted);
}

}  // namespace fusedrnn
