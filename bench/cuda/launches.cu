// What a launch costs: alone, cooperative, in a graph.
#include <chrono>
#include <vector>

#include "probe.cuh"

namespace fusedrnn::probe {
namespace {

__global__ void nothing() {}

void launch_cooperative(cudaStream_t stream) {
  check(cudaLaunchCooperativeKernel(nothing, dim3(properties().multiProcessorCount), dim3(kThreads),
                                    nullptr, 0, stream),
        "cudaLaunchCooperativeKernel");
}

void launch_plain(cudaStream_t stream) {
  nothing<<<properties().multiProcessorCount, kThreads, 0, stream>>>();
  check(cudaGetLastError(), "an empty kernel's launch");
}

constexpr int kMany = 1000;

void launches_of(const char* kind, void (*launch)(cudaStream_t)) {
  guarded(Figure("launch").text("kernel", kind), [&](Figure& figure) {
    const double many = microseconds([&] {
      for (int i = 0; i < kMany; ++i) launch(nullptr);
    });
    figure.value(many / kMany, "us", "1000 empty kernels, one CTA an SM, one after another");
  });
  guarded(Figure("launch_and_wait").text("kernel", kind), [&](Figure& figure) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> found;
    for (int i = 0; i < 200; ++i) {
      const auto start = Clock::now();
      launch(nullptr);
      check(cudaStreamSynchronize(nullptr), "an empty kernel");
      found.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    figure.value(median(found), "us", "one empty kernel and cudaStreamSynchronize, host's clock");
  });
  guarded(Figure("graph_node").text("kernel", kind), [&](Figure& figure) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < kMany; ++i) launch(stream);
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    const double many =
        microseconds([&] { check(cudaGraphLaunch(executable, nullptr), "cudaGraphLaunch"); });
    figure.value(many / kMany, "us", "a graph of 1000 empty kernels in a chain");
    check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  });
}

}  // namespace

void launches() {
  warm_up();
  launches_of("plain", launch_plain);
  launches_of("cooperative", launch_cooperative);
}

}  // namespace fusedrnn::probe
