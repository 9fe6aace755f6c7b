// Repacking a stored linear into bands (repacked.h, common/bands.h), once when a model is loaded.
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dbrxq.h"
#include "guard.h"
#include "half.h"
#include "layout.h"
#include "linear_view.h"
#include "parallel.h"
#include "repacked.h"

namespace dbrxq {
namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::vector<Segment> cut_segments(const std::vector<GroupSpan>& groups) {
  std::vector<Segment> segments;
  int32_t unit = 0;
  int64_t byte = 0;
  for (const GroupSpan& group : groups) {
    auto left = static_cast<int32_t>((group.rows + layout::kUnitRows - 1) / layout::kUnitRows);
    while (left > 0) {
      const int32_t units = left < bands::kSegmentUnits ? left : bands::kSegmentUnits;
      segments.push_back({group.bits, static_cast<int32_t>(group.index), unit, units, byte});
      unit += units;
      left -= units;
      byte += static_cast<int64_t>(units) * group.bits * 4 * bands::kColumns;
    }
  }
  return segments;
}

// Sizes and offsets.
PackedHeader lay_out(const LinearView& view, const std::vector<Segment>& segments) {
  PackedHeader header = {};
  const Segment& last = segments.back();
  header.magic = kPackedMagic;
  header.k = view.k;
  header.n = view.n;
  header.out_features = view.out_features;
  header.units = last.unit + last.units;
  header.segments = static_cast<int64_t>(segments.size());
  header.groups = static_cast<int64_t>(view.groups.size());
  header.band_bytes = last.byte + static_cast<int64_t>(last.units) * last.bits * 4 * bands::kColumns;
  const int64_t bands = view.n / bands::kColumns;
  header.segments_at = aligned(sizeof header);
  header.permutation_at = header.segments_at + aligned(header.segments * static_cast<int64_t>(sizeof(Segment)));
  header.tables_at = header.permutation_at + aligned(header.units * layout::kUnitRows * 4);
  const int64_t after = header.tables_at + aligned(header.groups * 16 * 4);
  header.bias_at = view.bias ? after : 0;
  header.head_bytes = after + (view.bias ? aligned(view.n * 4) : 0);
  header.codes_at = aligned(bands * header.groups * 16);
  header.body_bytes = header.codes_at + bands * header.band_bytes;
  return header;
}

uint16_t load_half(const char* from, int64_t index) {
  uint16_t half;
  std::memcpy(&half, from + 2 * index, sizeof half);
  return half;
}

// table[i] = half((i + 1)^2 * half(max / 256)); whether every weight that the table can give is finite in half.
bool fill_table(const LinearView& view, const GroupSpan& group, float* table) {
  const float unit = half_to_float(float_to_half(half_to_float(load_half(view.scale_max, group.index)) / 256.0f));
  for (int i = 0; i < 16; ++i) {
    const auto step = static_cast<float>(i + 1);
    table[i] = half_to_float(float_to_half(step * step * unit));
  }
  return std::fabs(table[15]) * static_cast<float>(layout::zero_point(group.bits)) < 65520.0f;
}

uint64_t hash(uint64_t seed, const void* data, int64_t bytes) {  // FNV-1a
  const auto* at = static_cast<const unsigned char*>(data);
  for (int64_t i = 0; i < bytes; ++i) seed = (seed ^ at[i]) * 0x100000001b3u;
  return seed;
}

void pack_steps(const LinearView& view, int64_t band, int64_t group, uint8_t* steps) {
  uint32_t words[4];
  std::memcpy(words, view.scales + (group * (view.n / 8) + layout::scale_word(band * bands::kColumns)) * 4,
              sizeof words);
  for (int c = 0; c < 16; ++c) {
    const uint32_t low = words[layout::scale_word(c)] >> layout::scale_shift(c) & 15u;
    const uint32_t high = words[layout::scale_word(c + 16)] >> layout::scale_shift(c + 16) & 15u;
    steps[c] = static_cast<uint8_t>(low | high << 4);
  }
}

// One unit of a band: from `bits` word rows of the file to `bits` word rows of the band.
void pack_codes(const char* from, int64_t step, int bits, int rows, char* to) {
  uint32_t quads[bands::kQuads][bands::kColumns] = {};
  for (int r = 0; r < layout::kUnitRows; ++r) {
    uint32_t code[bands::kColumns];
    if (r < rows) {
      uint32_t words[bands::kColumns], next[bands::kColumns] = {};
      const char* at = from + layout::code_word(bits, r) * step;
      std::memcpy(words, at, sizeof words);
      if (layout::code_straddles(bits, r)) std::memcpy(next, at + step, sizeof next);
      for (int c = 0; c < bands::kColumns; ++c) code[c] = layout::extract_code(bits, r, words[c], next[c]);
    } else {
      for (uint32_t& filling : code) filling = static_cast<uint32_t>(layout::zero_point(bits));
    }
    for (int c = 0; c < bands::kColumns; ++c) quads[r / 4][c] |= code[c] << (r % 4 * 8);
  }
  uint32_t words[8][bands::kColumns] = {};
  for (int quad = 0; quad < bands::kQuads; ++quad)
    for (int i = 0; i < bands::part_count(bits, quad); ++i) {
      const bands::Part part = bands::part(bits, quad, i);
      const uint32_t mask = bands::part_mask(part);
      for (int c = 0; c < bands::kColumns; ++c)
        words[part.word][c] |= (quads[quad][c] >> part.weight & mask) << part.position;
    }
  std::memcpy(to, words, static_cast<size_t>(bits) * sizeof words[0]);
}

void pack_band(const LinearView& view, int64_t band, char* codes, uint8_t* steps) {
  for (const GroupSpan& group : view.groups) {
    pack_steps(view, band, group.index, steps + group.index * 16);
    for (int64_t row = 0; row < group.rows; row += layout::kUnitRows) {
      const char* from = view.words + (group.word + row * group.bits / 32) * view.n * 4 + band * bands::kColumns * 4;
      const int64_t left = group.rows - row;
      pack_codes(from, view.n * 4, group.bits, static_cast<int>(left < layout::kUnitRows ? left : layout::kUnitRows),
                 codes);
      codes += group.bits * 4 * bands::kColumns;
    }
  }
}

int plan(const dbrxq_linear& linear, LinearView& view, std::vector<Segment>& segments, PackedHeader& header) {
  const int status = view_linear(linear, view);
  if (status != DBRXQ_OK) return status;
  segments = cut_segments(view.groups);
  header = lay_out(view, segments);
  return DBRXQ_OK;
}

// Asks for huge pages where the block covers whole ones: they spare the page walks of a stream through gigabytes.
void advise_huge_pages(char* packed, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(packed) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(packed) + static_cast<uintptr_t>(bytes)) / page * page;
  // Only advice: a kernel without huge pages refuses it, and nothing changes.
  if (end > start) (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// Tells that the stored words will hardly be read again, so that the system takes their pages back first. Keeps them.
void advise_cold(const LinearView& view) {
#if defined(__linux__) && defined(MADV_COLD)
  constexpr uintptr_t page = 4096;
  const GroupSpan& last = view.groups.back();
  const auto start = reinterpret_cast<uintptr_t>(view.words);
  const uintptr_t first = (start + page - 1) / page * page;
  const uintptr_t end = (start + static_cast<uintptr_t>((last.word + last.rows * last.bits / 32) * view.n * 4)) / page *
                        page;
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_COLD);
#endif
}

// Everything but the body. Of the memory that parts leave free, nothing is written.
int make_head(const LinearView& view, const std::vector<Segment>& segments, PackedHeader& header, char* head) {
  auto* tables = reinterpret_cast<float*>(head + header.tables_at);
  for (const GroupSpan& group : view.groups)
    if (!fill_table(view, group, tables + group.index * 16)) return DBRXQ_NOT_FINITE;

  auto* permutation = reinterpret_cast<int32_t*>(head + header.permutation_at);
  for (int64_t j = 0; j < view.k; ++j) {
    int32_t row;
    std::memcpy(&row, view.invperm + 4 * j, sizeof row);
    permutation[row] = static_cast<int32_t>(j);
  }
  for (int64_t row = view.k; row < header.units * layout::kUnitRows; ++row) permutation[row] = permutation[view.k - 1];
  const auto segment_bytes = static_cast<int64_t>(segments.size() * sizeof(Segment));
  std::memcpy(head + header.segments_at, segments.data(), static_cast<size_t>(segment_bytes));
  header.order = hash(hash(0xcbf29ce484222325u, segments.data(), segment_bytes), permutation,
                      header.units * layout::kUnitRows * 4);
  if (view.bias) {
    auto* bias = reinterpret_cast<float*>(head + header.bias_at);
    for (int64_t c = 0; c < view.n; ++c) bias[c] = half_to_float(load_half(view.bias, c));
  }
  std::memcpy(head, &header, sizeof header);
  return DBRXQ_OK;
}

int repack(const dbrxq_linear& linear, char* head, char* body) {
  LinearView view;
  std::vector<Segment> segments;
  PackedHeader header;
  int status = plan(linear, view, segments, header);
  if (status != DBRXQ_OK) return status;
  header.body = body;
  status = make_head(view, segments, header, head);
  if (status != DBRXQ_OK) return status;
  advise_huge_pages(body, header.body_bytes);
  const int64_t steps = view.n / bands::kColumns * header.groups * 16;
  std::memset(body + steps, 0, static_cast<size_t>(header.codes_at - steps));
  parallel_for(view.n / bands::kColumns, [&](int64_t band) {
    pack_band(view, band, body + header.codes_at + band * header.band_bytes,
              reinterpret_cast<uint8_t*>(body) + band * header.groups * 16);
  });
  advise_cold(view);
  return DBRXQ_OK;
}

int head_of(const dbrxq_linear& linear, const char* body, uint64_t checksum, bool mapped, char* head) {
  LinearView view;
  std::vector<Segment> segments;
  PackedHeader header;
  const int status = plan(linear, view, segments, header);
  if (status != DBRXQ_OK) return status;
  header.body = body;
  header.checksum = checksum;
  header.state = kUnchecked;
  header.mapped = mapped;
  return make_head(view, segments, header, head);
}

}  // namespace

int view_packed(const void* packed, PackedView& view) {
  const auto* start = static_cast<const char*>(packed);
  const auto* header = static_cast<const PackedHeader*>(packed);
  if (header->magic != kPackedMagic) return DBRXQ_BAD_REPACKED;
  view.header = header;
  view.segments = reinterpret_cast<const Segment*>(start + header->segments_at);
  view.permutation = reinterpret_cast<const int32_t*>(start + header->permutation_at);
  view.tables = reinterpret_cast<const float*>(start + header->tables_at);
  view.bias = header->bias_at ? reinterpret_cast<const float*>(start + header->bias_at) : nullptr;
  view.steps = reinterpret_cast<const uint8_t*>(header->body);
  view.codes = header->body + header->codes_at;
  return DBRXQ_OK;
}

}  // namespace dbrxq

int dbrxq_repacked_bytes(const dbrxq_linear* linear, int64_t* head, int64_t* body) {
  return dbrxq::guarded([&] {
    dbrxq::LinearView view;
    std::vector<dbrxq::Segment> segments;
    dbrxq::PackedHeader header;
    const int status = dbrxq::plan(*linear, view, segments, header);
    if (status != DBRXQ_OK) return status;
    *head = header.head_bytes;
    *body = header.body_bytes;
    return status;
  });
}

int dbrxq_repack(const dbrxq_linear* linear, void* head, void* body) {
  return dbrxq::guarded([&] { return dbrxq::repack(*linear, static_cast<char*>(head), static_cast<char*>(body)); });
}

int dbrxq_repacked_head(const dbrxq_linear* linear, const void* body, uint64_t checksum, int mapped, void* head) {
  return dbrxq::guarded([&] {
    return dbrxq::head_of(*linear, static_cast<const char*>(body), checksum, mapped != 0, static_cast<char*>(head));
  });
}
