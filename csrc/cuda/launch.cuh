// A kernel over (rows, units), a thread for each pair: on a GPU, or emulated on the host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace fusedrnn {

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

template <class Body>
__global__ void over_rows(Body body, int64_t rows, int64_t units) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t unit = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (row < rows && unit < units) body(row, unit);
}

template <class Body>
void launch(const Body& body, int64_t rows, int64_t units, Stream stream) {
  if (rows == 0 || units == 0) return;
  const Grid grid = grid_of(rows, units);
  over_rows<<<dim3(grid.blocks_x, grid.blocks_y), dim3(grid.threads_x, grid.threads_y), 0,
              stream>>>(body, rows, units);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fusedrnn: a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(error));
  }
}

#else

// Runs every thread of every block in turn, which is right as long as threads of a block do not
// wait for each other. Kernels with barriers will need a fiber a thread here.
template <class Thread>
void emulate(const Grid& grid, const Thread& thread) {
  for (unsigned by = 0; by < grid.blocks_y; ++by) {
    for (unsigned bx = 0; bx < grid.blocks_x; ++bx) {
      for (unsigned y = 0; y < grid.threads_y; ++y) {
        for (unsigned x = 0; x < grid.threads_x; ++x) thread(bx, by, x, y);
      }
    }
  }
}

template <class Body>
void launch(const Body& body, int64_t rows, int64_t units, Stream) {
  if (rows == 0 || units == 0) return;
  const Grid grid = grid_of(rows, units);
  emulate(grid, [&](unsigned bx, unsigned by, unsigned x, unsigned y) {
    const int64_t row = int64_t{bx} * grid.threads_y + y;
    const int64_t unit = int64_t{by} * grid.threads_x + x;
    if (row < rows && unit < units) body(row, unit);
  });
}

#endif

}  // namespace fusedrnn
