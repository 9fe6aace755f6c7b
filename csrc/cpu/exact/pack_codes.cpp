// Packing, unpacking and exact dequantization (common/layout.h has the pictures; oracle: runtime/exl2/format.py).
#include <cstring>
#include <vector>

#include "buffer.h"
#include "dbrxq.h"
#include "guard.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "linear_view.h"

namespace dbrxq {
namespace {

// A unit of rows of one group: what a task packs or unpacks.
struct Unit {
  int bits, rows;
  int64_t row, word;
};

std::vector<Unit> list_units(const std::vector<GroupSpan>& groups) {
  std::vector<Unit> units;
  for (const GroupSpan& group : groups)
    for (int64_t row = 0; row < group.rows; row += layout::kUnitRows) {
      const int64_t left = group.rows - row;
      units.push_back({group.bits, static_cast<int>(left < layout::kUnitRows ? left : layout::kUnitRows),
                       group.row + row, group.word + row * group.bits / 32});
    }
  return units;
}

void pack_unit(const Unit& unit, const uint8_t* codes, int64_t n, uint32_t* words) {
  std::memset(words + unit.word * n, 0, sizeof(uint32_t) * static_cast<size_t>(unit.rows * unit.bits / 32 * n));
  const uint32_t mask = layout::code_mask(unit.bits);
  for (int r = 0; r < unit.rows; ++r) {
    const uint8_t* from = codes + (unit.row + r) * n;
    const int shift = layout::code_shift(unit.bits, r);
    uint32_t* to = words + (unit.word + layout::code_word(unit.bits, r)) * n;
    for (int64_t c = 0; c < n; ++c) to[c] |= (from[c] & mask) << shift;
    if (layout::code_straddles(unit.bits, r))
      for (int64_t c = 0; c < n; ++c) to[n + c] |= (from[c] & mask) >> (32 - shift);
  }
}

void unpack_unit(const Unit& unit, const char* words, int64_t n, uint8_t* codes) {
  for (int r = 0; r < unit.rows; ++r) {
    uint8_t* to = codes + (unit.row + r) * n;
    const char* from = words + (unit.word + layout::code_word(unit.bits, r)) * n * 4;
    const bool straddles = layout::code_straddles(unit.bits, r);
    for (int64_t c = 0; c < n; ++c) {
      uint32_t word, next = 0;
      std::memcpy(&word, from + 4 * c, sizeof word);
      if (straddles) std::memcpy(&next, from + 4 * (n + c), sizeof next);
      to[c] = static_cast<uint8_t>(layout::extract_code(unit.bits, r, word, next));
    }
  }
}

}  // namespace
}  // namespace dbrxq

int dbrxq_pack_codes(const uint8_t* codes, const int16_t* q_groups, int64_t groups, int64_t k, int64_t n,
                     int64_t word_rows, uint32_t* words) {
  return dbrxq::guarded([&] {
    std::vector<dbrxq::GroupSpan> spans;
    if (n < 1) return static_cast<int>(DBRXQ_BAD_SHAPE);
    const int status = dbrxq::read_groups(q_groups, groups, k, word_rows, spans);
    if (status != DBRXQ_OK) return status;
    const auto units = dbrxq::list_units(spans);
    dbrxq::parallel_for(static_cast<int64_t>(units.size()),
                        [&](int64_t i) { dbrxq::pack_unit(units[static_cast<size_t>(i)], codes, n, words); });
    return static_cast<int>(DBRXQ_OK);
  });
}

int dbrxq_unpack_codes(const void* words, const int16_t* q_groups, int64_t groups, int64_t k, int64_t n,
                       int64_t word_rows, uint8_t* codes) {
  return dbrxq::guarded([&] {
    std::vector<dbrxq::GroupSpan> spans;
    if (n < 1) return static_cast<int>(DBRXQ_BAD_SHAPE);
    const int status = dbrxq::read_groups(q_groups, groups, k, word_rows, spans);
    if (status != DBRXQ_OK) return status;
    const auto units = dbrxq::list_units(spans);
    dbrxq::parallel_for(static_cast<int64_t>(units.size()), [&](int64_t i) {
      dbrxq::unpack_unit(units[static_cast<size_t>(i)], static_cast<const char*>(words), n, codes);
    });
    return static_cast<int>(DBRXQ_OK);
  });
}

int dbrxq_dequantize(const dbrxq_linear* linear, uint16_t* weight) {
  return dbrxq::guarded([&] {
    if (!dbrxq::isa_usable()) return static_cast<int>(DBRXQ_BAD_ISA);
    dbrxq::LinearView view;
    const int status = dbrxq::view_linear(*linear, view);
    if (status != DBRXQ_OK) return status;
    std::vector<int32_t> permutation(static_cast<size_t>(view.k));  // input channel of each packed row
    for (int64_t j = 0; j < view.k; ++j) {
      int32_t row;
      std::memcpy(&row, view.invperm + 4 * j, sizeof row);
      permutation[static_cast<size_t>(row)] = static_cast<int32_t>(j);
    }
    constexpr int64_t band = 256;
    const dbrxq::Kernels& kernels = dbrxq::kernels();
    dbrxq::parallel_for((view.n + band - 1) / band, [&](int64_t task) {
      const int64_t first = task * band, last = first + band < view.n ? first + band : view.n;
      kernels.dequantize(view, permutation.data(), first, last, weight);
    });
    return static_cast<int>(DBRXQ_OK);
  });
}
