// y = x . W + bias over repacked linears: quantize the activations, hand out bands of columns. A column's sums are made
// by one task in one order, so the number of threads changes nothing.
#include "integer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "isa.h"
#include "parallel.h"

namespace dbrxq {

const IntegerKernels& integer_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return kAvx512Integer;
  if (isa() == Isa::avx2) return isa_has_vnni() ? kAvxVnniInteger : kAvx2Integer;
#endif
  return kScalarInteger;
}

namespace {

// Codes that stay in the second-level cache while all tiles pass by, with room for the activations of a tile.
constexpr int64_t kCachedBytes = 400'000;

}  // namespace

int64_t band_run(const PackedView& view, int64_t tokens, int64_t left) {
  if (tokens > integer_kernels().tile_tokens) return std::max<int64_t>(kCachedBytes / view.header->band_bytes, 1);
  // Few tokens: long stretches of memory at first, short ones at the end to even the load out.
  return std::clamp<int64_t>(left / (4 * threads()), 1, 32);
}

void quantize_tile(const PackedView& view, int activation_bits, const Quantized& q, int64_t tile,
                   const float* const* rows) {
  integer_kernels().quantize(view, activation_bits, rows, q.size(tile), q.open(*view.header, tile));
}

void multiply_bands(const PackedView& view, int activation_bits, const Quantized& q, int64_t first, int64_t last,
                    float* sums) {
  const int64_t band_floats = q.padded() * bands::kColumns;
  for (int64_t tile = 0; tile < q.tiles(); ++tile)
    for (int64_t band = first; band < last; ++band)
      integer_kernels().multiply(view, activation_bits, band, q.size(tile), q.open(*view.header, tile), tile == 0,
                                 sums + (band - first) * band_floats + q.first(tile) * bands::kColumns);
}

namespace {

constexpr int64_t kTokenBlock = 512;  // bounds the quantized activations and the sums of a task

struct Part {
  PackedView view;
  int64_t column;     // first column in y
  int64_t quantized;  // index of the part whose activations it shares (itself, when it is the first of its order)
  Quantized q;
};

void forward_block(std::vector<Part>& parts, int activation_bits, const float* x, int64_t tokens, float* y,
                   int64_t columns, Buffer<int32_t>& memory) {
  int64_t words = 0;
  for (Part& part : parts)
    if (part.quantized == &part - parts.data()) {
      part.q = Quantized(tokens);
      words += part.q.words(*part.view.header);
    }
  int32_t* at = memory.reserve(words);
  std::vector<int64_t> own;  // parts with activations of their own
  for (Part& part : parts) {
    if (part.quantized == &part - parts.data()) {
      own.push_back(part.quantized);
      part.q.memory = at;
      at += part.q.words(*part.view.header);
    } else {
      part.q = parts[static_cast<size_t>(part.quantized)].q;
    }
  }
  const int64_t tiles = parts[0].q.tiles();
  const auto quantize = [&](int64_t i) {
    const Part& part = parts[static_cast<size_t>(own[static_cast<size_t>(i / tiles)])];
    const int64_t token = part.q.first(i % tiles);
    const float* rows[kLargestTile] = {};
    for (int64_t m = 0; m < part.q.width && token + m < tokens; ++m) rows[m] = x + (token + m) * part.view.header->k;
    quantize_tile(part.view, activation_bits, part.q, i % tiles, rows);
  };
  const auto count = static_cast<int64_t>(own.size()) * tiles;
  if (tiles == 1) {
    for (int64_t i = 0; i < count; ++i) quantize(i);  // less work than waking a thread
  } else {
    parallel_for(count, quantize);
  }

  struct Task {
    const Part* part;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  int64_t all = 0;
  for (const Part& part : parts) all += part.view.bands();
  for (const Part& part : parts) {
    const int64_t wanted = (part.view.header->out_features + bands::kColumns - 1) / bands::kColumns;
    for (int64_t first = 0, last; first < wanted; first = last) {
      last = std::min(first + band_run(part.view, tokens, all), wanted);
      tasks.push_back({&part, first, last});
      all -= last - first;
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    const PackedView& view = task.part->view;
    const int64_t count = task.last - task.first;
    const int64_t padded = task.part->q.padded();
    float* sums = thread_scratch(count * padded * bands::kColumns);
    multiply_bands(view, activation_bits, task.part->q, task.first, task.last, sums);
    for (int64_t band = task.first; band < task.last; ++band) {
      const int64_t column = band * bands::kColumns;
      const int64_t width = std::min<int64_t>(bands::kColumns, view.header->out_features - column);
      const float* from = sums + (band - task.first) * padded * bands::kColumns;
      for (int64_t t = 0; t < tokens; ++t) {
        float* to = y + t * columns + task.part->column + column;
        if (view.bias)
          for (int64_t c = 0; c < width; ++c) to[c] = from[t * bands::kColumns + c] + view.bias[column + c];
        else
          std::memcpy(to, from + t * bands::kColumns, sizeof(float) * static_cast<size_t>(width));
      }
    }
  });
}

int forward(const void* const* packed, int64_t count, int activation_bits, const float* x, int64_t tokens, float* y) {
  std::vector<Part> parts(static_cast<size_t>(count));
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) {
    Part& part = parts[static_cast<size_t>(i)];
    const int status = view_packed(packed[i], part.view);
    if (status != DBRXQ_OK) return status;
    if (part.view.header->k != parts[0].view.header->k) return DBRXQ_BAD_SHAPE;
    read_ahead(part.view);
    part.column = columns;
    columns += part.view.header->out_features;
    part.quantized = i;
    for (int64_t j = i - 1; j >= 0; --j)
      if (parts[static_cast<size_t>(j)].view.header->order == part.view.header->order) part.quantized = j;
  }
  for (const Part& part : parts) {
    const int status = check_body(part.view);
    if (status != DBRXQ_OK) return status;
  }
  thread_local Buffer<int32_t> memory;
  for (int64_t t = 0; t < tokens; t += kTokenBlock)
    forward_block(parts, activation_bits, x + t * parts[0].view.header->k, std::min(kTokenBlock, tokens - t),
                  y + t * columns, columns, memory);
  return DBRXQ_OK;
}

}  // namespace
}  // namespace dbrxq

int dbrxq_repacked_linear(const void* const* packed, int64_t count, int activation_bits, const float* x, int64_t tokens,
                          float* y) {
  return dbrxq::guarded([&] {
    if (!dbrxq::isa_usable()) return static_cast<int>(DBRXQ_BAD_ISA);
    if (tokens < 0 || count < 1 || (activation_bits != 8 && activation_bits != 16))
      return static_cast<int>(DBRXQ_BAD_SHAPE);
    return dbrxq::forward(packed, count, activation_bits, x, tokens, y);
  });
}
