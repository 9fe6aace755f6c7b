// A repacked linear: a head, which knows every size, and a body, the bytes that a product streams through.
//
//   head   | header | segments | permutation | tables | bias |     every part at a multiple of 64 bytes
//   body   | steps | codes |                                       likewise
//
//   segments     a group's rows cut into runs of at most 4 units (128 rows): what shares one activation scale
//   permutation  int32 [32 units]      input channel of each packed row
//   tables       float [G][16]         the 16 scales a column of the group can have, exact: half(s^2 half(max/256))
//   bias         float [N]             only with a bias
//   steps        uint8 [bands][G][16]  scale codes: column c of the band in the low half of byte c, c + 16 in the high
//   codes        bands as common/bands.h draws them
//
// Rows that fill up the last unit repeat the channel of the last row, so that they don't change an activation scale;
// their codes are the zero point, so that they add nothing.
//
// The head is always made of the stored tensors. The body may be in a mapped file: where and how far it is read follows
// from the head alone, and no value of its bytes leads out of it. All instruction sets share one layout.
#pragma once
#include <cstdint>

#include "bands.h"
#include "dbrxq.h"

namespace dbrxq {

constexpr uint64_t kPackedMagic = 0x3230717872626471u;

// What is known of a body's bytes.
enum BodyState : int32_t {
  kTrusted,    // made here, or compared with its checksum
  kUnchecked,  // to be compared at its first use
  kDamaged,
};

struct PackedHeader {
  uint64_t magic;
  int64_t head_bytes, body_bytes;
  int64_t k, n, out_features, units, segments, groups;
  int64_t band_bytes;  // of the codes of one band
  uint64_t order;      // hash of permutation and segments: equal orders share quantized activations
  // Bytes from the start of the head; bias_at is 0 without a bias.
  int64_t segments_at, permutation_at, tables_at, bias_at;
  int64_t codes_at;  // bytes from the start of the body
  const char* body;
  uint64_t checksum;      // of a body that is not trusted
  mutable int32_t state;  // a BodyState, atomic
  int32_t mapped;         // whether the body is in a mapped file, which is read ahead of its use
};

struct Segment {
  int32_t bits, group;
  int32_t unit, units;  // first unit, 1..bands::kSegmentUnits units
  int64_t byte;         // first byte in the codes of a band
};

struct PackedView {
  const PackedHeader* header;
  const Segment* segments;
  const int32_t* permutation;
  const float* tables;
  const float* bias;  // or null
  const uint8_t* steps;
  const char* codes;

  int64_t bands() const { return header->n / bands::kColumns; }
  const uint8_t* band_steps(int64_t band) const { return steps + band * header->groups * 16; }
  const char* band_codes(int64_t band) const { return codes + band * header->band_bytes; }
};

// Checks that `packed` is a head that this library made, and fills `view`; returns a status.
int view_packed(const void* packed, PackedView& view);

// Asks for the pages of a large body in a mapped file, all at once and without waiting for them.
void read_ahead(const PackedView& view);

// DBRXQ_DAMAGED unless the body is trusted or, now that it is used for the first time, as its checksum says.
int check_body(const PackedView& view);

// Of the contents of a head and its body, wherever they lie.
uint64_t checksum(const PackedView& view);

// Activations of M tokens, quantized. Each value is v * scale with one scale a segment and token, and v either
//   one byte,    v = high,             |v| <= 127,    scale = max|x| / 127 over the segment, or
//   two bytes,   v = 128 high + low,   |v| <= 16256,  scale = max|x| / 16256 over all of the token, so that its
//                                                     segments add up before they are multiplied by it.
// An infinity or a NaN makes the scale a NaN, and so the token's output.
//
//   high, low   four rows a word: [units][8 quads][M]
//   scales      float [segments][M]
//   offsets     int32 [segments][M]   minus the zero point times the sum of v
struct ActivationTile {
  int32_t *high, *low;
  float* scales;
  int32_t* offsets;
};
inline int64_t tile_words(const PackedHeader& header, int64_t m) {
  return (2 * bands::kQuads * header.units + 2 * header.segments) * m;
}
inline ActivationTile open_tile(const PackedHeader& header, int64_t m, int32_t* words) {
  const int64_t quads = bands::kQuads * header.units * m;
  int32_t* scales = words + 2 * quads;
  return {words, words + quads, reinterpret_cast<float*>(scales), scales + header.segments * m};
}

// Whether activations that meet codes of this width have two bytes. One byte's error (rms about 0.5 % of the
// activations) is a sixteenth of the rounding error of 4-bit weights and adds 0.3 % to the divergence that they cause;
// it is an eighth of that of 5-bit weights, where errors as small as that are what the bits are paid for.
inline bool two_bytes(int activation_bits, int bits) { return activation_bits == 16 || bits > 4; }

constexpr int64_t kLargestTile = 8;

struct IntegerKernels {
  // Tokens of a full tile: as many as have their sums in registers, up to kLargestTile.
  int64_t tile_tokens;
  // Fills a tile of m tokens, one or an even number up to tile_tokens; rows[i] are activations [K] of token i, null for
  // none (zeros).
  void (*quantize)(const PackedView& view, int activation_bits, const float* const* rows, int64_t m,
                   const ActivationTile& tile);
  // sums [m][32] of one band and tile, without bias. The codes are decoded anew for every tile: that costs less than
  // storing them decoded, even for hundreds of tokens (6144 by 10752 of 3 bits, 64 tokens: 11 ms against 13). `fetch`
  // tells that the codes are still in memory.
  void (*multiply)(const PackedView& view, int activation_bits, int64_t band, int64_t m, const ActivationTile& tile,
                   bool fetch, float* sums);
};

const IntegerKernels& integer_kernels();  // of the instruction set in use

extern const IntegerKernels kScalarInteger, kAvx2Integer, kAvxVnniInteger, kAvx512Integer;

}  // namespace dbrxq
