// Exchanges inside clusters, through distributed shared memory; and how many clusters fit. sm_90.
//
// The hardware starts all CTAs of a cluster together or none, so these launches need no
// cooperative attribute: a CTA waits for its own cluster alone.
#include <algorithm>
#include <bit>
#include <stdexcept>

#include "exchange.cuh"

namespace fusedrnn::probe {
namespace {

extern __shared__ Piece buffers[];  // two of a step's pieces

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

class InCluster {
 public:
  __device__ InCluster(const Task&, uint32_t group, const Place& at)
      : at_(at), group_(group), base_(shared_address(buffers)) {}

  // Nobody's shared memory goes while another may still read it or write to it.
  __device__ void end() { cluster_barrier(); }

 protected:
  __device__ uint32_t address(uint32_t buffer, uint32_t piece) const {
    return base_ + (buffer * at_.pieces + piece) * static_cast<uint32_t>(sizeof(Piece));
  }
  __device__ Piece piece_of(uint32_t step, uint32_t piece, uint32_t stain) const {
    Piece made;
    for (uint32_t i = 0; i < 4; ++i) made.word[i] = word_of(group_, step, piece * 4 + i) | stain;
    return made;
  }
  __device__ uint32_t own() const { return 1u << at_.own_bits; }

  Place at_;
  uint32_t group_, base_;
};

// Each CTA keeps its share; all read it there.
struct ClusterPull : InCluster {
  using InCluster::InCluster;
  static constexpr bool kMayLeave = false;  // the others read its memory
  template <int N>
  __device__ bool step(uint32_t step, uint32_t stain, Piece (&out)[N]) {
    const uint32_t buffer = step % 2;
    for (uint32_t i = at_.thread; i < own(); i += at_.threads) {
      const uint32_t piece = at_.cta * own() + i;
      store_shared(address(buffer, piece), piece_of(step, piece, stain));
    }
    cluster_barrier();
  #pragma unroll
    for (int k = 0; k < N; ++k) {
      const uint32_t piece = at_.piece(k);
      out[k] = at_.has(k) ? load_peer(peer_address(address(buffer, piece), piece >> at_.own_bits))
                          : Piece{};
    }
    return true;
  }
};

// Each CTA writes its share to all; each reads its own memory.
struct ClusterWrite : InCluster {
  using InCluster::InCluster;
  static constexpr bool kMayLeave = false;
  template <int N>
  __device__ bool step(uint32_t step, uint32_t stain, Piece (&out)[N]) {
    const uint32_t buffer = step % 2;
  #pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!at_.has(k)) continue;
      const uint32_t to = ((at_.piece(k) >> at_.own_bits) + at_.cta) & (at_.ctas - 1);
      const uint32_t piece = at_.cta * own() + (at_.piece(k) & (own() - 1));
      store_peer(peer_address(address(buffer, piece), to), piece_of(step, piece, stain));
    }
    cluster_barrier();
  #pragma unroll
    for (int k = 0; k < N; ++k) {
      out[k] = at_.has(k) ? load_shared(address(buffer, at_.piece(k))) : Piece{};
    }
    return true;
  }
};

// st.async to all; each waits for its own mbarriers alone.
template <Scope kAcquire>
class StAsync : public InCluster {
 public:
  static constexpr bool kMayLeave = true;

  __device__ StAsync(const Task& task, uint32_t group, const Place& at)
      : InCluster(task, group, at) {
    __shared__ alignas(8) uint64_t mbarriers[kPushBuffers];
    mbarriers_ = shared_address(mbarriers);
    if (at.thread == 0) {
      for (uint32_t i = 0; i < kPushBuffers; ++i) {
        mbarrier_init(mbarriers_ + 8 * i, 1);
        arm(i);
      }
    }
    cluster_barrier();
  }

  template <int N>
  __device__ bool step(uint32_t step, uint32_t stain, Piece (&out)[N]) {
    const auto made = [&](uint32_t t, uint32_t piece) { return piece_of(t, piece, stain); };
    return push_step(*this, at_, step, made, out);
  }

  // The protocol's port.
  __device__ void send(uint32_t to, uint32_t buffer, uint32_t piece, const Piece& made) {
    store_async(peer_address(address(buffer, piece), to), made,
                peer_address(mbarriers_ + 8 * buffer, to));
  }
  __device__ void arm(uint32_t buffer) {
    mbarrier_arm(mbarriers_ + 8 * buffer, at_.pieces * static_cast<uint32_t>(sizeof(Piece)));
  }
  __device__ bool ended(uint32_t buffer, uint32_t parity) {
    return mbarrier_ended<kAcquire>(mbarriers_ + 8 * buffer, parity);
  }
  __device__ Piece read(uint32_t buffer, uint32_t piece) {
    return load_shared(address(buffer, piece));
  }
  __device__ void barrier() { __syncthreads(); }
  __device__ bool expired() { return deadline_.expired(); }

 private:
  uint32_t mbarriers_;
  Deadline deadline_;
};

#else  // before sm_90: names to instantiate the kernel with, which has no body then
struct ClusterPull;
struct ClusterWrite;
template <Scope>
class StAsync;
#endif

template <class Exchange, int N>
__global__ __launch_bounds__(kThreads, 1) void in_cluster(Task task) {
#if __CUDA_ARCH__ >= 900
  exchange_steps<Exchange, N>(task);
#endif
}

template <class Exchange>
struct Instances {
  template <int N>
  static const void* kernel() {
    return reinterpret_cast<const void*>(in_cluster<Exchange, N>);
  }
};

// A launch's configuration; `attribute` must live as long as it.
cudaLaunchConfig_t configured(cudaLaunchAttribute& attribute, uint32_t cluster, uint32_t clusters,
                              int shared_bytes) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster * clusters);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// Clusters of 8 and less are portable; larger ones must be asked for.
void allow_large(const void* kernel, int shared_bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cudaFuncAttributeNonPortableClusterSizeAllowed");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncAttributeMaxDynamicSharedMemorySize");
}

uint32_t resident(const void* kernel, uint32_t cluster, int shared_bytes) {
  allow_large(kernel, shared_bytes);
  cudaLaunchAttribute attribute{};
  const uint32_t grid = static_cast<uint32_t>(properties().multiProcessorCount) / cluster;
  const cudaLaunchConfig_t config =
      configured(attribute, cluster, std::max(1u, grid), shared_bytes);
  int found = 0;
  check(cudaOccupancyMaxActiveClusters(&found, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return static_cast<uint32_t>(found);
}

void fit(const void* kernel, const Task& task, int shared_bytes) {
  if (resident(kernel, task.ctas, shared_bytes) < task.groups) {
    throw std::runtime_error("the clusters do not fit the GPU at once");
  }
}

void launch_clusters(const void* kernel, const Task& task, int shared_bytes) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configured(attribute, task.ctas, task.groups, shared_bytes);
  Task copy = task;
  void* arguments[] = {&copy};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
}

struct Protocol {
  const char* name;
  const void* (*kernel)(uint32_t payload_words);
  const char* how;
};
constexpr Protocol kProtocols[] = {
    {"cluster_pull", for_payload<Instances<ClusterPull>>,
     "16-byte stores to own shared memory, barrier.cluster, 16-byte loads from the peers'"},
    {"cluster_write", for_payload<Instances<ClusterWrite>>,
     "16-byte st.shared::cluster to all peers, barrier.cluster, loads from own"},
    {"st_async", for_payload<Instances<StAsync<Scope::kCta>>>,
     "16-byte st.async to all peers, two buffers and mbarriers, try_wait.acquire.cta, own loads"},
    {"st_async_acquire_cluster", for_payload<Instances<StAsync<Scope::kCluster>>>,
     "the same with try_wait.acquire.cluster"},
};

// Two buffers of a step, and so much that an SM holds one CTA.
int shared_bytes_of(uint32_t bytes) {
  return std::max(one_cta_bytes(), static_cast<int>(2 * bytes));
}

void exchange(const Protocol& protocol, uint32_t ctas, uint32_t groups, uint32_t bytes) {
  guarded(Figure("exchange").text("protocol", protocol.name), [&](Figure& figure) {
    Task task{};
    task.ctas = ctas;
    task.groups = groups;
    task.payload_words = bytes / 4;
    task.steps = 512;
    task.own_bits = static_cast<uint32_t>(std::countr_zero(bytes / 16 / ctas));
    measure_exchange(figure, protocol.kernel(task.payload_words), {fit, launch_clusters}, task,
                     shared_bytes_of(bytes), protocol.how);
  });
}

void residents() {
  const void* kernel = for_payload<Instances<ClusterPull>>(128);
  const int most = static_cast<int>(properties().sharedMemPerBlockOptin) - 1024;
  for (int shared_bytes : {0, one_cta_bytes(), most}) {
    for (uint32_t size = 2; size <= 16; ++size) {
      Figure figure("resident_clusters");
      figure.number("cluster_size", size).number("shared_bytes", shared_bytes);
      try {
        figure.value(resident(kernel, size, shared_bytes), "clusters",
                     "cudaOccupancyMaxActiveClusters, CTAs of 256 threads");
      } catch (const std::runtime_error& error) {
        figure.skipped(error.what());  // not every size is one that the hardware takes
      }
    }
  }
}

// Groups of `ctas` that are resident together; 1 where that cannot be asked.
uint32_t most_groups(const Protocol& protocol, uint32_t ctas, uint32_t bytes) {
  try {
    return std::min(resident(protocol.kernel(bytes / 4), ctas, shared_bytes_of(bytes)),
                    static_cast<uint32_t>(kMaxGroups));
  } catch (const std::runtime_error&) {
    return 1;  // the exchange says why
  }
}

}  // namespace

void clusters() {
  if (properties().major < 9) {
    return Figure("exchange").text("protocol", "cluster").skipped("no clusters before sm_90");
  }
  warm_up();
  residents();
  for (uint32_t ctas : {16u, 8u}) {
    for (uint32_t bytes = 512; bytes <= 65536; bytes *= 2) {
      for (const Protocol& protocol : kProtocols) exchange(protocol, ctas, 1, bytes);
    }
  }
  for (uint32_t ctas : {16u, 8u}) {  // all that fit, none waiting for another
    for (uint32_t bytes = 512; bytes <= 65536; bytes *= 4) {
      for (const Protocol& protocol : kProtocols) {
        exchange(protocol, ctas, most_groups(protocol, ctas, bytes), bytes);
      }
    }
  }
}

}  // namespace fusedrnn::probe
