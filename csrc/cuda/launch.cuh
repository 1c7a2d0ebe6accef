// How a kernel is put on a stream of a GPU, or run on the host in its place.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace fusedrnn {

// f<cell>(), for a cell that is known at run time only.
template <class F>
auto with_cell(Cell cell, const F& f) {
  switch (cell) {
    case Cell::kLstm:
      return f.template operator()<Cell::kLstm>();
    case Cell::kGru:
      return f.template operator()<Cell::kGru>();
    case Cell::kRnnTanh:
      return f.template operator()<Cell::kRnnTanh>();
    case Cell::kRnnRelu:
      return f.template operator()<Cell::kRnnRelu>();
  }
  throw std::logic_error("no cell");
}

// Blocks of 128 threads: 32 units of 4 rows each, or more units where there are fewer rows. Blocks
// of rows lie along x, which may have 2^31 of them.
struct Grid {
  unsigned blocks_x, blocks_y, threads_x, threads_y;
};

inline Grid grid_of(int64_t rows, int64_t units) {
  constexpr unsigned threads = 128;
  const unsigned y = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  const unsigned x = threads / y;
  return {static_cast<unsigned>((rows + y - 1) / y), static_cast<unsigned>((units + x - 1) / x), x,
          y};
}

#ifdef __CUDACC__

inline void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next would be told of it too
  throw std::runtime_error(std::string("fusedrnn: a CUDA kernel could not be launched: ") +
                           cudaGetErrorString(error));
}

template <class Body>
__global__ void over_rows(Body body, int64_t rows, int64_t units) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t unit = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (row < rows && unit < units) body(row, unit);
}

// A thread for each row and unit; no two of them meet.
template <class Body>
void launch(const Body& body, int64_t rows, int64_t units, CudaStream stream) {
  if (rows == 0 || units == 0) return;
  const Grid grid = grid_of(rows, units);
  over_rows<<<dim3(grid.blocks_x, grid.blocks_y), dim3(grid.threads_x, grid.threads_y), 0,
              stream>>>(body, rows, units);
  check_launch(cudaGetLastError());
}

// A grid constant: parameters that are indexed stay where they are.
template <class Body>
__global__ void __launch_bounds__(Body::kThreads, 1) in_blocks(const __grid_constant__ Body body) {
  body(Block());
}

// So many blocks, whose threads work together.
template <class Body>
void launch_blocks(const Body& body, int64_t blocks, CudaStream stream) {
  if (blocks == 0) return;
  if constexpr (Body::kSharedBytes > (48 << 10)) {
    check_launch(cudaFuncSetAttribute(in_blocks<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Body::kSharedBytes));
  }
  in_blocks<<<static_cast<unsigned>(blocks), Body::kThreads, Body::kSharedBytes, stream>>>(body);
  check_launch(cudaGetLastError());
}

// How many CTAs of the kernel the current device can have at a time, where nothing else runs.
template <class Body>
int64_t resident_blocks() {
  const auto ask = [](int device) {
    int each = 0, processors = 0, shared = 0;
    check_launch(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (shared < Body::kSharedBytes) return 0;
    check_launch(cudaFuncSetAttribute(in_blocks<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Body::kSharedBytes));
    check_launch(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, in_blocks<Body>,
                                                               Body::kThreads, Body::kSharedBytes));
    check_launch(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    return each * processors;
  };
  static std::atomic<int> known[64];  // by device, one more; 0: not asked yet
  int device = 0;
  check_launch(cudaGetDevice(&device));
  if (device >= 64) return ask(device);
  int found = known[device].load(std::memory_order_relaxed);
  if (found == 0) known[device].store(found = ask(device) + 1, std::memory_order_relaxed);
  return found - 1;
}

// So many blocks, which wait for each other: all of them are resident, or the launch fails.
// resident_blocks() comes first.
template <class Body>
void launch_together(const Body& body, int64_t blocks, CudaStream stream) {
  if (blocks == 0) return;
  void* arguments[] = {const_cast<Body*>(&body)};
  check_launch(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(in_blocks<Body>), dim3(static_cast<unsigned>(blocks)),
      dim3(Body::kThreads), arguments, Body::kSharedBytes, stream));
}

#else

// Runs every thread of every block in turn, which is right as they do not wait for each other.
template <class Body>
void launch(const Body& body, int64_t rows, int64_t units, CudaStream) {
  if (rows == 0 || units == 0) return;
  const Grid grid = grid_of(rows, units);
  for (unsigned by = 0; by < grid.blocks_y; ++by) {
    for (unsigned bx = 0; bx < grid.blocks_x; ++bx) {
      for (unsigned y = 0; y < grid.threads_y; ++y) {
        for (unsigned x = 0; x < grid.threads_x; ++x) {
          const int64_t row = int64_t{bx} * grid.threads_y + y;
          const int64_t unit = int64_t{by} * grid.threads_x + x;
          if (row < rows && unit < units) body(row, unit);
        }
      }
    }
  }
}

template <class Body>
void launch_blocks(const Body& body, int64_t blocks, CudaStream) {
  for (int64_t index = 0; index < blocks; ++index) {
    EmulatedBlock block(index, Body::kThreads, Body::kSharedBytes);
    block.run([&](int thread) { body(Block(block, thread)); });
  }
}

template <class Body>
int64_t resident_blocks() {
  return EmulatedBlock::most_together;
}

template <class Body>
void launch_together(const Body& body, int64_t blocks, CudaStream) {
  EmulatedBlock::run_together(
      blocks, Body::kThreads, Body::kSharedBytes,
      [&](EmulatedBlock& block, int thread) { body(Block(block, thread)); });
}

#endif

}  // namespace fusedrnn
