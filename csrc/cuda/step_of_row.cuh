// What a step is to a row of the batch, for the kernels that walk through many.
#pragma once

#include "cuda/block.cuh"
#include "cuda/steps.h"

namespace fusedrnn {

enum class StepOfRow : uint8_t {
  kNone,     // it has no place for it
  kPadding,  // a place, but no step
  kValid,
  kCut,  // valid, but the state that leaves it does not reach the step after
};
FUSEDRNN_D bool is_valid(StepOfRow kind) { return kind >= StepOfRow::kValid; }
FUSEDRNN_D StepOfRow kind_of(const Step& step, int64_t row) {
  if (row >= step.now.count) return StepOfRow::kNone;
  if (!step.has(row)) return StepOfRow::kPadding;
  return step.is_cut_after(row) ? StepOfRow::kCut : StepOfRow::kValid;
}

}  // namespace fusedrnn
