// What a repacked linear on its own and the linears of experts share.
#pragma once
#include <cstdint>

#include "repacked.h"

namespace dbrxq {

// The quantized activations of `tokens` tokens: tiles of `width`, the last one of 1 token or an even number.
struct Quantized {
  int64_t tokens = 0, width = 1;
  int32_t* memory = nullptr;  // [words]

  explicit Quantized(int64_t tokens = 0) : tokens(tokens), width(integer_kernels().tile_tokens) {}
  int64_t tiles() const { return (tokens + width - 1) / width; }
  int64_t first(int64_t tile) const { return tile * width; }
  int64_t size(int64_t tile) const {
    const int64_t left = tokens - first(tile);
    return left >= width ? width : left == 1 ? 1 : (left + 1) / 2 * 2;
  }
  int64_t padded() const { return tokens ? first(tiles() - 1) + size(tiles() - 1) : 0; }  // tokens of all tiles
  int64_t words(const PackedHeader& header) const { return tile_words(header, 1) * padded(); }
  ActivationTile open(const PackedHeader& header, int64_t tile) const {
    return open_tile(header, size(tile), memory + tile_words(header, 1) * first(tile));
  }
};

// Fills one tile; rows [kLargestTile] are the activations of its tokens, null for none.
void quantize_tile(const PackedView& view, int activation_bits, const Quantized& q, int64_t tile,
                   const float* const* rows);

// Bands of the next task of a linear, when `left` bands of linears that are handed out together have no task yet.
int64_t band_run(const PackedView& view, int64_t tokens, int64_t left);

// sums [bands first..last-1][q.padded()][32], without bias.
void multiply_bands(const PackedView& view, int activation_bits, const Quantized& q, int64_t first, int64_t last,
                    float* sums);

}  // namespace dbrxq
