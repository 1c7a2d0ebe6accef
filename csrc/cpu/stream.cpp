#include "cpu/stream.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/call_scratch.h"
#include "cpu/distance.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/run_team.h"
#include "cpu/scratch.h"

namespace fusedrnn {
namespace {

// ---- weights in words ---------------------------------------------------------------------------

// A weight (blocks * units, columns) in words, and the scale of each row, (blocks, units padded).
template <class W>
struct FrozenRows {
  std::vector<W> words;
  std::vector<float> factor;
  std::vector<int32_t> offset;
  ColumnScale scale() const { return {factor.data(), offset.data()}; }
};

// Rows of values, as write(row, to) writes them, in words one after another; the last word of a row
// is filled up with zeros.
template <class Value, class Write>
std::vector<uint32_t> words_of_rows(int64_t rows, int64_t columns, Write write) {
  constexpr int64_t each = sizeof(uint32_t) / sizeof(Value);
  const int64_t stride = (columns + each - 1) / each;
  std::vector<uint32_t> words(rows * stride, 0);
  std::vector<Value> values(columns);
  for (int64_t row = 0; row < rows; ++row) {
    write(row, values.data());
    std::memcpy(words.data() + row * stride, values.data(), columns * sizeof(Value));
  }
  return words;
}

// Each row of int8 weights has its own factor, its largest size / 127.
FrozenRows<uint32_t> int8_rows(const float* w, int64_t blocks, int64_t units, int64_t columns) {
  FrozenRows<uint32_t> rows;
  rows.factor.assign(blocks * padded(units), 0.0f);
  rows.offset.assign(blocks * padded(units), 0);
  std::vector<float> inverse(blocks * units);
  const auto at = [&](int64_t row) { return row / units * padded(units) + row % units; };
  for (int64_t row = 0; row < blocks * units; ++row) {
    float most = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < columns; ++i) {
      const float value = w[row * columns + i];
      finite = finite && std::isfinite(value);
      most = std::max(most, std::fabs(value));
    }
    const bool usable = finite && most > 1e-36f;
    inverse[row] = usable ? 127.0f / most : 0.0f;
    rows.factor[at(row)] = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
  }
  rows.words = words_of_rows<int8_t>(blocks * units, columns, [&](int64_t row, int8_t* to) {
    uint32_t offset = 0;  // modulo 2^32, as the kernels' sums are: what is left without it fits
    for (int64_t i = 0; i < columns; ++i) {
      const float scaled = inverse[row] == 0.0f ? 0.0f : w[row * columns + i] * inverse[row];
      to[i] = static_cast<int8_t>(std::lrint(scaled));
      offset += 128u * static_cast<uint32_t>(to[i]);
    }
    rows.offset[at(row)] = static_cast<int32_t>(offset);
  });
  return rows;
}

template <class W>
FrozenRows<W> rows_in(WeightFormat format, const float* w, int64_t blocks, int64_t units,
                      int64_t columns) {
  if (w == nullptr) return {};
  if constexpr (std::is_same_v<W, float>) {
    return {std::vector<float>(w, w + blocks * units * columns), {}, {}};
  } else {
    if (format == WeightFormat::kInt8) return int8_rows(w, blocks, units, columns);
    const auto round = current_isa().bf16.round;
    return {words_of_rows<uint16_t>(
                blocks * units, columns,
                [&](int64_t row, uint16_t* to) { round(w + row * columns, to, columns); }),
            {},
            {}};
  }
}

// ---- one layer ----------------------------------------------------------------------------------

template <class W>
using Kernel = void (*)(const ForwardArgs<float, W>&, const Slot&);

template <class W>
struct Kernels {
  Kernel<W> pack, forward;
};

template <class W>
Kernels<W> kernels_of(WeightFormat format, Cell cell) {
  const Isa& isa = current_isa();
  const int i = static_cast<int>(cell);
  if constexpr (std::is_same_v<W, float>) {
    return {isa.f32.pack[i], isa.f32.forward[i]};
  } else {
    const NarrowTable& table = format == WeightFormat::kInt8 ? isa.int8 : isa.bf16;
    return {table.pack[i], table.forward[i]};
  }
}

// What all forks of a layer share.
template <class W>
struct Frozen {
  Kernels<W> kernels;
  int64_t weight_size;  // bytes of a weight
  PackedWeights<float, W> packed{};
  FrozenRows<W> input, recurrent, projection;  // their scales; the words are gone once packed
  Scratch memory;

  int64_t values_per_word() const { return sizeof(W) / weight_size; }

  Frozen(const StreamLayer& layer, WeightFormat format)
      : kernels(kernels_of<W>(format, layer.cell)),
        weight_size(format == WeightFormat::kFloat32    ? 4
                    : format == WeightFormat::kBfloat16 ? 2
                                                        : 1) {
    const Sizes& s = layer.sizes;
    const int gates = gate_blocks(layer.cell);
    input = rows_in<W>(format, layer.weights.w_ih, gates, s.hidden, s.input);
    recurrent = rows_in<W>(format, layer.weights.w_hh, gates, s.hidden, s.output);
    projection = rows_in<W>(format, layer.weights.w_hr, 1, s.output, s.hidden);
    want_packed(memory, layer.cell, s, values_per_word(), /*joins=*/false, packed);
    want_biases(memory, layer.cell, s, packed);
    memory.allocate();
    packed.input_scale = input.scale();
    packed.recurrent_scale = recurrent.scale();
    packed.projection_scale = projection.scale();

    ForwardArgs<float, W> args{};
    args.sizes = s;
    const int64_t row0[2] = {0, 0}, rows[1] = {0};
    args.schedule = {1, 0, rows, row0, nullptr, nullptr, nullptr};
    args.directions = 1;
    auto& d = args.direction[0];
    d.chunk = {0, 1, true, false};  // not the last: what is packed stays
    d.weights = {input.words.data(), recurrent.words.data(), layer.weights.b_ih, layer.weights.b_hh,
                 projection.words.data()};
    d.packed = packed;
    Barriers barriers(1);
    kernels.pack(args, slot_of(Plan{}, 0, 1, barriers));
    for (FrozenRows<W>* rows_of : {&input, &recurrent, &projection}) {
      std::vector<W>().swap(rows_of->words);
    }
  }
};

// From so many multiplications on, a call is worth waking OpenMP's threads.
constexpr double kWorthWaking = 4 << 20;

template <class W>
class PackedLayer final : public FrozenLayer {
 public:
  PackedLayer(Cell cell, const Sizes& sizes, std::shared_ptr<const Frozen<W>> frozen, int64_t batch)
      : FrozenLayer(cell, sizes), frozen_(std::move(frozen)), batch_(batch) {
    const int64_t hidden = sizes.hidden_padded(), output = sizes.output_padded();
    const int64_t gates = saved_blocks(cell) * hidden;
    most_steps_ = std::max<int64_t>(1, chunk_target(cell, sizes, sizeof(float)) / batch);
    rows_.assign(most_steps_, batch);
    for (int64_t t = 0; t <= most_steps_; ++t) row0_.push_back(t * batch);

    args_.sizes = sizes;
    args_.directions = 1;
    auto& d = args_.direction[0];
    d.packed = frozen_->packed;
    d.gates_stride = gates;
    d.y_stride = sizes.output;
    scratch_.want_zeros(&args_.zeros, sizes.zero_count());
    scratch_.want(&d.gates, most_steps_ * batch * gates);
    scratch_.want(&d.h[0], batch * output);
    scratch_.want(&d.h[1], batch * output);
    scratch_.want(&d.h_n, batch * sizes.output);
    if (has_cell_state(cell)) scratch_.want(&d.c, batch * hidden);
    if (sizes.projected) scratch_.want(&d.h_tilde, batch * hidden);
    scratch_.allocate();
    set_state(nullptr, nullptr);
  }

  void run(const float* x, float* y, int64_t steps, int threads) override {
    auto& d = args_.direction[0];
    d.x = x;
    d.y = y;
    d.chunk = {0, steps, false, true};
    args_.schedule = {steps, batch_, rows_.data(), row0_.data(), nullptr, nullptr, nullptr};
    const Workload work = {
        cell, sizes, 1, batch_, steps * batch_, sizeof(float), frozen_->weight_size, 1};
    args_.by_panel = batch_ < kLeastAcross && goes_back_and_forth(args_.schedule, work);
    const auto plan = [&](int given) { return plan_team(work, given); };
    int wanted = plan(threads).threads();
    if (wanted > 1 && multiplications(work) < kWorthWaking &&
        !pace_.note_call(Pace::Clock::now())) {
      threads = wanted = 1;
    }
    make_room(wanted);
    run_team(threads, 1, plan, [&](const Slot& slot) { frozen_->kernels.forward(args_, slot); });
    d.turn ^= steps & 1;
  }

  int64_t most_steps() const override { return most_steps_; }

  void get_state(float* h, float* c) const override {
    const auto& d = args_.direction[0];
    copy_rows(h, sizes.output, d.h[d.turn], sizes.output_padded(), sizes.output);
    if (has_cell_state(cell)) {
      copy_rows(c, sizes.hidden, d.c, sizes.hidden_padded(), sizes.hidden);
    }
  }

  void set_state(const float* h, const float* c) override {
    auto& d = args_.direction[0];
    const int64_t hidden = sizes.hidden_padded(), output = sizes.output_padded();
    d.turn = 0;  // what follows has the same bits, however many steps came before
    for (float* to : d.h) {
      std::fill(to, to + batch_ * output, 0.0f);
      if (h != nullptr) copy_rows(to, output, h, sizes.output, sizes.output);
    }
    if (!has_cell_state(cell)) return;
    std::fill(d.c, d.c + batch_ * hidden, 0.0f);
    if (c != nullptr) copy_rows(d.c, hidden, c, sizes.hidden, sizes.hidden);
  }

  std::unique_ptr<FrozenLayer> fork() const override {
    return std::make_unique<PackedLayer>(cell, sizes, frozen_, batch_);
  }

 private:
  void copy_rows(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                 int64_t columns) const {
    for (int64_t b = 0; b < batch_; ++b) {
      std::copy(from + b * from_stride, from + b * from_stride + columns, to + b * to_stride);
    }
  }

  // Scratch for each of `threads`.
  void make_room(int threads) {
    if (threads <= threads_) return;
    threads_ = 0;  // should the allocation fail
    const int64_t most_rows = most_steps_ * batch_;
    Scratch& scratch = of_threads_.emplace();
    want_rows(scratch, threads, batch_, args_);
    want_group_rows(scratch, threads, most_rows, args_);
    if constexpr (!std::is_same_v<W, float>) {
      want_words(scratch, threads, most_rows, frozen_->values_per_word(), args_);
    }
    scratch.allocate();
    threads_ = threads;
  }

  const std::shared_ptr<const Frozen<W>> frozen_;
  const int64_t batch_;
  int64_t most_steps_;
  std::vector<int64_t> rows_, row0_;
  ForwardArgs<float, W> args_{};
  Scratch scratch_;
  Pace pace_;
  std::optional<Scratch> of_threads_;
  int threads_ = 0;
};

template <class W>
std::unique_ptr<FrozenLayer> frozen_layer(const StreamLayer& layer, WeightFormat format,
                                          int64_t batch) {
  auto frozen = std::make_shared<const Frozen<W>>(layer, format);
  return std::make_unique<PackedLayer<W>>(layer.cell, layer.sizes, std::move(frozen), batch);
}

}  // namespace

// ---- the stack ----------------------------------------------------------------------------------

Stream::Stream(const std::vector<StreamLayer>& layers, WeightFormat format, int64_t batch)
    : batch_(batch) {
  for (const StreamLayer& layer : layers) {
    layers_.push_back(format == WeightFormat::kFloat32
                          ? frozen_layer<float>(layer, format, batch)
                          : frozen_layer<uint32_t>(layer, format, batch));
  }
  make_room();
}

void Stream::make_room() {
  most_steps_ = std::numeric_limits<int64_t>::max();
  int64_t widest = 0;
  for (size_t l = 0; l < layers_.size(); ++l) {
    most_steps_ = std::min(most_steps_, layers_[l]->most_steps());
    if (l + 1 < layers_.size()) widest = std::max(widest, layers_[l]->sizes.output);
  }
  for (std::vector<float>& values : between_) values.resize(most_steps_ * batch_ * widest);
}

bool Stream::run(const float* x, float* y, int64_t steps, int threads) {
  if (busy_.test_and_set(std::memory_order_acquire)) return false;
  const struct Release {
    std::atomic_flag& flag;
    ~Release() { flag.clear(std::memory_order_release); }
  } release{busy_};
  const int64_t last = layers() - 1;
  for (int64_t t = 0; t < steps; t += most_steps_) {
    const int64_t count = std::min(most_steps_, steps - t);
    const float* from = x + t * batch_ * input_size();
    for (int64_t l = 0; l <= last; ++l) {
      float* to = l == last ? y + t * batch_ * output_size() : between_[l % 2].data();
      layers_[l]->run(from, to, count, threads);
      from = to;
    }
  }
  return true;
}

std::unique_ptr<Stream> Stream::fork() const {
  std::unique_ptr<Stream> other(new Stream);
  other->batch_ = batch_;
  for (const auto& layer : layers_) other->layers_.push_back(layer->fork());
  other->make_room();
  return other;
}

}  // namespace fusedrnn
