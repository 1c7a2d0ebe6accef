// A trained stack of layers, frozen: its weights packed once, its state kept between calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "recurrence.h"

namespace fusedrnn {

enum class WeightFormat { kFloat32, kBfloat16, kInt8 };

// A layer's parameters, row-major float as torch.nn keeps them; read while a Stream is made.
struct StreamLayer {
  Cell cell;
  Sizes sizes;
  Weights<float> weights;
};

// One layer with its state, whatever the format of its weights.
class FrozenLayer {
 public:
  FrozenLayer(Cell cell, const Sizes& sizes) : cell(cell), sizes(sizes) {}
  virtual ~FrozenLayer() = default;
  // x (steps, B, I), y (steps, B, P); at most most_steps() at a time.
  virtual void run(const float* x, float* y, int64_t steps, int threads) = 0;
  virtual int64_t most_steps() const = 0;
  // h (B, P) and c (B, H); c is ignored but for an LSTM.
  virtual void get_state(float* h, float* c) const = 0;
  virtual void set_state(const float* h, const float* c) = 0;  // null: zeros
  // The same weights, a state of its own, zeros.
  virtual std::unique_ptr<FrozenLayer> fork() const = 0;

  const Cell cell;
  const Sizes sizes;
};

// The kernels are those of the instruction set in use when it is made.
class Stream {
 public:
  // Layer l + 1 takes what layer l gives.
  Stream(const std::vector<StreamLayer>& layers, WeightFormat format, int64_t batch);

  // x (steps, B, I) of the first layer, y (steps, B, P) of the last one. False, and nothing is
  // done, where another thread is running this very stream.
  [[nodiscard]] bool run(const float* x, float* y, int64_t steps, int threads);

  std::unique_ptr<Stream> fork() const;

  int64_t batch() const { return batch_; }
  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  FrozenLayer& layer(int64_t index) const { return *layers_[index]; }
  int64_t input_size() const { return layers_.front()->sizes.input; }
  int64_t output_size() const { return layers_.back()->sizes.output; }

 private:
  Stream() = default;
  void make_room();

  int64_t batch_ = 0, most_steps_ = 0;
  std::vector<std::unique_ptr<FrozenLayer>> layers_;
  std::vector<float> between_[2];  // (most_steps, B, P): from layer to layer
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

}  // namespace fusedrnn
