// Scale and bias of up to sixteen rows at once, one row in each lane.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace lowprec::LOWPREC_PATH {
namespace {

constexpr float kLargest = 3.40282346638528859812e38f;

// Up to sixteen rows that are worked on together.
struct Block {
  const float* row[kLanes];
  std::size_t num_rows;
};

// A table of this size is soon in the second cache; asking for its rows would cost a tenth of the work on them.
constexpr std::size_t kCached = 1 << 19;

// Calls `of_line` for an address in each line of the cache that holds some of `num` values.
inline void each_line(const float* values, std::size_t num, void (*of_line)(const char*)) {
  const auto* stop = reinterpret_cast<const char*>(values + num);
  for (auto* line = reinterpret_cast<const char*>(values); line < stop; line += 64) of_line(line);
  of_line(stop - 1);  // they may begin within a line
}

// Asks for the rows of the block after the next one, all at once: between rows that are worked on, requests that miss
// the TLB hold up the work (by hand, dim 128, cold, on an EPYC 9004: scores take 280 ns a row so, 82 ns this way). To the
// second cache: the first has few places for lines on their way (dim 32: 16 ns to read a row so, 11 this way, 24 unasked).
inline void prefetch_ahead(const Rows& rows, const std::int64_t* ids, std::size_t at, std::size_t end) {
  constexpr std::size_t kDistance = 2 * kLanes;
  if (rows.num_rows * rows.dim * sizeof(float) <= kCached) return;
  for (std::size_t i = at + kDistance; i < at + kDistance + kLanes && i < end; ++i) {
    each_line(rows[ids[i]], rows.dim, prefetch);
  }
}

// Smallest and largest value of each row; zeros in the lanes of no row. NaN is passed over.
struct Extremes {
  Lanes min, max;
};

inline Extremes extremes(const Block& block, std::size_t dim) {
  Lanes min_of[kLanes], max_of[kLanes];
  const std::size_t whole = dim / kLanes, rest = dim % kLanes;
  for (std::size_t i = 0; i < block.num_rows; ++i) {
    const float* row = block.row[i];
    Lanes smallest = all(kLargest), largest = all(-kLargest);
    for (std::size_t k = 0; k < whole; ++k) {
      const Lanes x = load(row + k * kLanes);
      smallest = min(x, smallest);
      largest = max(x, largest);
    }
    if (rest > 0) {
      // Filled up with the row's first value, which changes neither.
      float last[kLanes];
      store(last, all(row[0]));
      store_part(last, load_part(row + whole * kLanes, rest), rest);
      const Lanes x = load(last);
      smallest = min(x, smallest);
      largest = max(x, largest);
    }
    min_of[i] = smallest;
    max_of[i] = largest;
  }
  for (std::size_t i = block.num_rows; i < kLanes; ++i) min_of[i] = max_of[i] = zero();
  return {folded_each(min_of, Min{}), folded_each(max_of, Max{})};
}

template <int kBits>
constexpr float kMaxCode = static_cast<float>((1 << kBits) - 1);

// minmax: the bias is the minimum in fp16, the scale what then spans the range, in fp16; 1 where that is nothing.
template <int kBits>
Lanes minmax_scale(Lanes bias, Lanes largest) {
  const Lanes width = largest - bias;  // negative when the bias was rounded up beyond the largest value
  const Lanes scale = as_half(where_equal(width, zero(), all(1.0f), width / all(kMaxCode<kBits>)));
  return where_equal(scale, zero(), all(1.0f), scale);
}

// Steps of up to sixteen rows at one precision, one row in each lane.
struct BlockSteps {
  Lanes bias, scale, inverse;
  std::uint32_t clamped;  // a bit for each row that may have codes to clamp
};

template <int kBits>
BlockSteps minmax_steps(const Extremes& extremes, Lanes bias) {
  BlockSteps steps{bias, minmax_scale<kBits>(bias, extremes.max), zero(), 0};
  steps.inverse = all(1.0f) / steps.scale;  // finite: the smallest half above zero is 2^-24
  // Codes between those of the extremes need no clamp when these need none: rounding keeps the order.
  const Lanes first = rounded((extremes.min - bias) * steps.inverse);
  const Lanes last = rounded((extremes.max - bias) * steps.inverse);
  steps.clamped = outside(first, zero(), all(kMaxCode<kBits>)) | outside(last, zero(), all(kMaxCode<kBits>));
  return steps;
}

inline BlockSteps given_steps(const RowRange* ranges, std::size_t num_rows) {
  std::uint16_t scale[kLanes] = {}, bias[kLanes] = {};
  for (std::size_t i = 0; i < num_rows; ++i) {
    scale[i] = ranges[i].scale;
    bias[i] = ranges[i].bias;
  }
  const Lanes scales = load_halves(scale);
  return {load_halves(bias), scales, all(1.0f) / scales, 0xffffu};
}

// Without `ranges`, minmax.
template <int kBits>
BlockSteps block_steps(const Block& block, std::size_t dim, const RowRange* ranges) {
  if (ranges != nullptr) return given_steps(ranges, block.num_rows);
  const Extremes found = extremes(block, dim);
  return minmax_steps<kBits>(found, as_half(found.min));
}

// BlockSteps that are read row by row.
struct Steps {
  float bias[kLanes];
  float scale[kLanes];
  float inverse[kLanes];
  std::uint32_t clamped;

  explicit Steps(const BlockSteps& block) : clamped(block.clamped) {
    store(bias, block.bias);
    store(scale, block.scale);
    store(inverse, block.inverse);
  }
};

// NaN becomes code 0, as in FBGEMM.
template <int kBits>
Lanes clamped_code(Lanes x, Lanes bias, Lanes inverse) {
  return min(max((x - bias) * inverse, zero()), all(kMaxCode<kBits>));
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
