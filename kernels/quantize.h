// fp32 rows to stored rows, sixteen at a time.
#pragma once

#include "codes.h"
#include "mse.h"
#include "ranges.h"

namespace lowprec::LOWPREC_PATH {
namespace {

inline Block block_of(const Rows& rows, const std::int64_t* ids, std::size_t begin, std::size_t end) {
  Block block;
  block.num_rows = end - begin < kLanes ? end - begin : kLanes;
  for (std::size_t i = 0; i < block.num_rows; ++i) {
    const std::size_t at = begin + i;
    block.row[i] = rows[ids == nullptr ? static_cast<std::int64_t>(at) : ids[at]];
  }
  return block;
}

// The sign of a zero minimum is that of the zero which FBGEMM's scan finds: the last one in the first of eight lanes
// that has one, else the first behind the last whole eight. No restored value shows it, but stored bytes are compared.
inline bool zero_minimum_is_negative(const float* row, std::size_t dim) {
  constexpr std::size_t kScanned = 8;
  const std::size_t whole = dim / kScanned * kScanned;
  for (std::size_t lane = 0; lane < kScanned; ++lane) {
    for (std::size_t i = whole; i >= kScanned; i -= kScanned) {
      const float x = row[i - kScanned + lane];
      if (x == 0.0f) return float_bits(x) != 0;
    }
  }
  for (std::size_t i = whole; i < dim; ++i) {
    if (row[i] == 0.0f) return float_bits(row[i]) != 0;
  }
  return false;
}

// The bits of rows that hold NaN or Inf: x * 0 is NaN there, and stays so in a sum.
inline std::uint32_t not_finite(const Block& block, const Lanes (&zeros)[kLanes]) {
  return outside(folded_each(zeros, Add{}), zero(), zero()) & ((1u << block.num_rows) - 1);
}

// x * 0 of a row, added up.
inline Lanes zeros_of(const float* row, std::size_t dim) {
  Lanes any = zero();
  for (std::size_t column = 0; column < dim; column += kLanes) {
    any = fma(load_first(row + column, dim - column), zero(), any);
  }
  return any;
}

// `scratch` is read for mse alone.
template <int kBits>
void ranges_of(const Block& block, std::size_t dim, RangeKind kind, float* scratch, RowRange* out) {
  const Extremes found = extremes(block, dim);
  const Lanes bias = as_half(found.min);
  std::uint16_t scales[kLanes], biases[kLanes];
  float smallest[kLanes];
  store_halves(scales, minmax_scale<kBits>(bias, found.max));
  store_halves(biases, bias);
  store(smallest, found.min);
  for (std::size_t i = 0; i < block.num_rows; ++i) {
    if (smallest[i] == 0.0f) biases[i] = zero_minimum_is_negative(block.row[i], dim) ? 0x8000u : 0;
    out[i] = {scales[i], biases[i]};
  }
  if (kind == RangeKind::kMse) improve_ranges<kBits>(block, dim, found, scratch, out);
}

// `zeros` gathers x * 0 of each row.
template <int kBits>
void store_rows(const Block& block, std::size_t dim, const RowRange* ranges, const Steps& steps, std::uint8_t* out,
                Lanes (&zeros)[kLanes]) {
  const std::size_t whole = dim / kLanes, rest = dim % kLanes;
  constexpr std::size_t kBytes = kLanes * kBits / 8;
  for (std::size_t i = 0; i < block.num_rows; ++i) {
    const float* row = block.row[i];
    std::uint8_t* stored = out + i * row_bytes(dim, kBits);
    std::memcpy(stored, &ranges[i], sizeof ranges[i]);
    stored += sizeof ranges[i];
    const Lanes bias = all(steps.bias[i]), inverse = all(steps.inverse[i]);
    Lanes any = zero();
    for (std::size_t k = 0; k < whole; ++k) {
      const Lanes x = load(row + k * kLanes);
      any = fma(x, zero(), any);
      store_codes<kBits>(stored + k * kBytes, clamped_code<kBits>(x, bias, inverse));
    }
    if (rest > 0) {
      const Lanes x = load_part(row + whole * kLanes, rest);
      any = fma(x, zero(), any);
      std::uint8_t last[kBytes];
      store_codes<kBits>(last, keep_first(clamped_code<kBits>(x, bias, inverse), rest));
      std::memcpy(stored + whole * kBytes, last, (rest * kBits + 7) / 8);
    }
    zeros[i] = any;
  }
}

inline void store_halves_of(const Block& block, std::size_t dim, std::uint8_t* out, Lanes (&zeros)[kLanes]) {
  const std::size_t whole = dim / kLanes, rest = dim % kLanes;
  for (std::size_t i = 0; i < block.num_rows; ++i) {
    std::uint8_t* stored = out + i * 2 * dim;
    Lanes any = zero();
    std::uint16_t part[kLanes];
    for (std::size_t k = 0; k < whole; ++k) {
      const Lanes x = load(block.row[i] + k * kLanes);
      any = fma(x, zero(), any);
      store_halves(part, x);
      std::memcpy(stored + k * sizeof part, part, sizeof part);
    }
    if (rest > 0) {
      const Lanes x = load_part(block.row[i] + whole * kLanes, rest);
      any = fma(x, zero(), any);
      store_halves(part, x);
      std::memcpy(stored + whole * sizeof part, part, rest * sizeof part[0]);
    }
    zeros[i] = any;
  }
}

template <int kBits>
std::int64_t quantize(const Rows& rows, const std::int64_t* ids, std::size_t begin, std::size_t end, RangeKind kind,
                      float* scratch, std::uint8_t* out) {
  for (std::size_t at = begin; at < end; at += kLanes) {
    const Block block = block_of(rows, ids, at, end);
    if (ids != nullptr) prefetch_ahead(rows, ids, at, end);
    Lanes zeros[kLanes];
    for (std::size_t i = block.num_rows; i < kLanes; ++i) zeros[i] = zero();
    std::uint8_t* stored = out + at * row_bytes(rows.dim, kBits);
    if constexpr (kBits == 16) {
      store_halves_of(block, rows.dim, stored, zeros);
    } else {
      RowRange ranges[kLanes];
      ranges_of<kBits>(block, rows.dim, kind, scratch, ranges);
      const Steps steps(given_steps(ranges, block.num_rows));
      store_rows<kBits>(block, rows.dim, ranges, steps, stored, zeros);
    }
    if (const std::uint32_t bad = not_finite(block, zeros)) return static_cast<std::int64_t>(at) + __builtin_ctz(bad);
  }
  return -1;
}

template <int kBits>
std::int64_t row_ranges(const Rows& rows, const std::int64_t* ids, std::size_t begin, std::size_t end, RangeKind kind,
                        float* scratch, RowRange* out) {
  for (std::size_t at = begin; at < end; at += kLanes) {
    const Block block = block_of(rows, ids, at, end);
    if (ids != nullptr) prefetch_ahead(rows, ids, at, end);
    Lanes zeros[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) zeros[i] = i < block.num_rows ? zeros_of(block.row[i], rows.dim) : zero();
    if (const std::uint32_t bad = not_finite(block, zeros)) return static_cast<std::int64_t>(at) + __builtin_ctz(bad);
    ranges_of<kBits>(block, rows.dim, kind, scratch, out + at);
  }
  return -1;
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
