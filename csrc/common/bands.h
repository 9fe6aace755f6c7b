// The layout that linears are repacked to for the kernels: bands of 32 output columns, each one contiguous stream
// over all input rows. Index arithmetic only, for host and device compilers alike; nothing here touches memory.
//
//   codes   | band 0: all rows of columns 0..31 | band 1: all rows of columns 32..63 | ...
//   band    | unit 0 (32 packed rows) | unit 1 | ...            a unit of b bits is b word rows
//   word row   32 words of 32 bits, one a column                              (128 bytes)
//
// The 32 codes of one column and unit are eight *quads* of four consecutive rows. A quad is handled as one word with
// a code a byte (row 4 i + j in byte j), which is what integer dot-product instructions take. All four codes of a
// quad sit at the same bits of their byte, so one shift and one mask bring out a quad. Bits of one byte of the word
// rows w0, w1, ... of a unit, most significant on the left; qi is the code of quad i, and "lo", "hi" are its bits:
//
//   2 bits  w0 |q3|q2|q1|q0|   w1 |q7|q6|q5|q4|
//   3 bits  w0 |q6 lo:2|q1|q0|   w1 |q7 lo:2|q3|q2|   w2 |q7 hi:1|q6 hi:1|q5|q4|
//   4 bits  w0 |q1|q0|   w1 |q3|q2|   w2 |q5|q4|   w3 |q7|q6|
//   5 bits  w0..w3 the low 4 bits of q as above    w4 |q7 hi:1|q6 hi:1| ... |q0 hi:1|
//   6 bits  w0..w3 the low 4 bits of q as above    w4 |q3 hi:2| ... |q0 hi:2|   w5 |q7 hi:2| ... |q4 hi:2|
//   8 bits  w0 |q0|   w1 |q1|   ...   w7 |q7|
//
// b words for 32 codes of b bits: the repacked codes take what they take in the file. A last 2-bit group that ends on
// half a unit is filled up with codes of weight zero.
#pragma once
#include <stdint.h>

#include "layout.h"

namespace dbrxq {
namespace bands {

constexpr int kColumns = 32;      // of a band; stored N is a multiple of it
constexpr int kQuads = 8;         // of a unit
constexpr int kSegmentUnits = 4;  // longest run of units that shares one scale of the activations
static_assert(kColumns == layout::kColumnMultiple, "every matrix is whole bands");
static_assert(kQuads * 4 == layout::kUnitRows, "a quad is four rows");

// `bits` bits of a quad's codes: bit `position` and up in the bytes of word row `word`, bit `weight` and up in the
// code.
struct Part {
  int word, position, bits, weight;
};

DBRXQ_HD static constexpr int part_count(int width, int quad) {
  return width == 5 || width == 6 || (width == 3 && quad >= 6) ? 2 : 1;
}

DBRXQ_HD static constexpr Part part(int width, int quad, int index) {
  switch (width) {
    case 2: return {quad / 4, quad % 4 * 2, 2, 0};
    case 3:
      if (quad < 6) return {quad / 2, quad % 2 * 3, 3, 0};
      return index == 0 ? Part{quad - 6, 6, 2, 0} : Part{2, quad, 1, 2};
    case 5:
      if (index == 1) return {4, quad, 1, 4};
      return {quad / 2, quad % 2 * 4, 4, 0};
    case 6:
      if (index == 1) return {4 + quad / 4, quad % 4 * 2, 2, 4};
      return {quad / 2, quad % 2 * 4, 4, 0};
    case 4: return {quad / 2, quad % 2 * 4, 4, 0};
    default: return {quad, 0, 8, 0};
  }
}

// `mask` of the low byte in all four bytes.
DBRXQ_HD static constexpr uint32_t in_all_bytes(uint32_t mask) { return mask * 0x01010101u; }
DBRXQ_HD static constexpr uint32_t part_mask(const Part& p) { return in_all_bytes((1u << p.bits) - 1u); }

}  // namespace bands
}  // namespace dbrxq
