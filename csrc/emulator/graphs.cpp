// Streams and graphs of the emulator: launches into a stream under capture are recorded, and run when a graph is launched.
//
// What the real runtime refuses is refused here: capturing the default stream, launching into it meanwhile, ending what
// was not begun. Every launch that runs or is recorded is noted by the types of its arguments, for tests that count.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

struct EmulatedStream {
  bool capturing = false, invalid = false;
  std::vector<std::function<void()>> launches;
};
struct EmulatedGraph {
  std::vector<std::function<void()>> launches;
};

namespace {
EmulatedStream* captured = nullptr;  // the stream under capture
std::vector<std::string> notes;
}  // namespace

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!stream) return cudaErrorInvalidValue;
  if (captured == stream) captured = nullptr;
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream) return cudaErrorStreamCaptureUnsupported;
  if (captured) return cudaErrorInvalidValue;
  captured = stream;
  stream->capturing = true;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (!stream || !stream->capturing) return cudaErrorInvalidValue;
  captured = nullptr;
  stream->capturing = false;
  auto launches = std::exchange(stream->launches, {});
  if (std::exchange(stream->invalid, false)) return cudaErrorStreamCaptureInvalidated;
  *graph = new EmulatedGraph{std::move(launches)};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new EmulatedGraph(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (!executable || (stream && stream->capturing)) return cudaErrorInvalidValue;
  for (const auto& launch : executable->launches) launch();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

int dbrxq::emulator::submit(cudaStream_t stream, const char* what, std::function<void()> launch) {
  if (captured && stream != captured) {  // an order that the capture would have to know
    captured->invalid = true;
    return cudaErrorStreamCaptureImplicit;
  }
  notes.emplace_back(what);
  if (captured)
    captured->launches.push_back(std::move(launch));
  else
    launch();
  return cudaSuccess;
}

// The notes since the last call, one a line, as long as they fit; returns their number.
extern "C" __attribute__((visibility("default"))) int64_t dbrxq_emulator_launches(char* text, int64_t bytes) {
  std::string all;
  for (const std::string& note : notes) all += note + "\n";
  if (bytes > 0) {
    const size_t copied = all.copy(text, static_cast<size_t>(bytes) - 1);
    text[copied] = 0;
  }
  const auto count = static_cast<int64_t>(notes.size());
  notes.clear();
  return count;
}
