// The row range of least squared error that a bounded search finds; lowprec/ops/reference says how and why.
#pragma once

#include "kernels.h"
#include "ranges.h"

namespace lowprec::LOWPREC_PATH {
namespace {

constexpr int kStepsPerStart = 2, kStepsOfBest = 2;
constexpr float kLargestHalf = 65504.0f, kSmallestHalf = 0x1p-24f;
// Below this share of the sum of squared codes their variance is rounding noise: all codes are the same.
constexpr float kLeastVariance = 0x1p-21f;

// Insets of the starts on either side, in steps of the row: first + k * pitch, k < num.
struct Insets {
  std::size_t num;
  float first, pitch;
};

template <int kBits>
Insets insets(std::size_t dim) {
  if constexpr (kBits == 8) return {2, -0.45f, 0.6f};
  if constexpr (kBits == 2) return {4, 0.0f, 0.3f};
  return {4, dim <= 64 ? -0.45f : 0.0f, 0.4f};
}

// A range of each row and its squared error, at the codes that it was made for.
struct Candidate {
  Lanes error, scale, bias;
};

inline Candidate where_less(Lanes a, Lanes b, const Candidate& then, const Candidate& otherwise) {
  return {where_less(a, b, then.error, otherwise.error), where_less(a, b, then.scale, otherwise.scale),
          where_less(a, b, then.bias, otherwise.bias)};
}

inline Candidate lower(const Candidate& a, const Candidate& b) { return where_less(b.error, a.error, b, a); }

// Sixteen rows moved by their centres, a column in each sixteen floats, with the sums that steps need.
struct Moved {
  const float* columns;
  std::size_t dim;
  Lanes centre, total, squares;
};

inline Lanes negative(Lanes a) { return zero() - a; }

// Columns of the block, the values of sixteen rows each; zeros in the lanes of no row.
inline void columns_of(const Block& block, std::size_t dim, float* out) {
  for (std::size_t column = 0; column < dim; column += kLanes) {
    Lanes rows[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      rows[i] = i < block.num_rows ? load_first(block.row[i] + column, dim - column) : zero();
    }
    transpose(rows);
    for (std::size_t i = 0; i < kLanes && column + i < dim; ++i) store(out + (column + i) * kLanes, rows[i]);
  }
}

inline Moved moved(const float* columns, std::size_t dim, const Extremes& found, float* out) {
  Moved rows{out, dim, all(0.5f) * found.min + all(0.5f) * found.max, zero(), zero()};
  for (std::size_t i = 0; i < dim; ++i) {
    const Lanes x = load(columns + i * kLanes) - rows.centre;
    rows.total = rows.total + x;
    rows.squares = fma(x, x, rows.squares);
    store(out + i * kLanes, x);
  }
  return rows;
}

// Codes of kNum ranges at a time, then the fp16 ranges that suit those codes best, and their errors at them.
template <int kBits, std::size_t kNum>
void step(const Moved& rows, Candidate* candidates) {
  const Lanes top = all(kMaxCode<kBits>), two = all(2.0f), num = all(static_cast<float>(rows.dim));
  const Lanes share = all(1.0f / static_cast<float>(rows.dim));
  Lanes inverse[kNum], shift[kNum], products[kNum], codes[kNum], squares[kNum];
  for (std::size_t k = 0; k < kNum; ++k) {
    inverse[k] = all(1.0f) / candidates[k].scale;
    shift[k] = (rows.centre - candidates[k].bias) * inverse[k];
    products[k] = codes[k] = squares[k] = zero();
  }
  for (std::size_t i = 0; i < rows.dim; ++i) {
    const Lanes x = load(rows.columns + i * kLanes);
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kNum; ++k) {
      const Lanes code = rounded(min(max(fma(x, inverse[k], shift[k]), zero()), top));
      products[k] = fma(x, code, products[k]);
      codes[k] = codes[k] + code;
      squares[k] = fma(code, code, squares[k]);
    }
  }
  for (std::size_t k = 0; k < kNum; ++k) {
    Candidate& now = candidates[k];
    const Lanes mean = codes[k] * share, variance = squares[k] - codes[k] * mean;
    const Lanes slope = where_less(squares[k] * all(kLeastVariance), variance,
                                   (products[k] - rows.total * mean) / variance, now.scale);
    const Lanes nearest = as_half(rows.centre + (rows.total * share - slope * mean));
    const Lanes bias = min(max(nearest, all(-kLargestHalf)), all(kLargestHalf));
    const Lanes offset = bias - rows.centre, above = products[k] - offset * codes[k];
    const Lanes best = as_half(where_less(zero(), squares[k], above / squares[k], slope));
    const Lanes smallest = where_less(now.scale, zero(), all(-kSmallestHalf), all(kSmallestHalf));
    const Lanes scale = where_equal(best, zero(), smallest, best);
    const Lanes error = rows.squares + offset * (num * offset - two * rows.total);
    now = {error + scale * (scale * squares[k] - two * above), scale, bias};
  }
}

// The range from a bias, inset from one end of the row and rounded outwards to fp16, to the other end, inset by shares of
// its own steps. The scale is rounded away from zero, or the row's far end would lie outside where fp16 is coarse.
template <int kBits>
Candidate start(const Extremes& found, Lanes unit, float inset, float far_inset, bool from_top) {
  constexpr float kTop = kMaxCode<kBits>;
  const Lanes bias = from_top ? min(as_half_up(found.max - unit * all(inset)), all(kLargestHalf))
                              : max(as_half_down(found.min + unit * all(inset)), all(-kLargestHalf));
  const Lanes width = (from_top ? found.min : found.max) - bias;
  Lanes scale = (width - width * all(far_inset / kTop)) / all(kTop);
  scale = where_equal(scale, zero(), all(1.0f), scale);
  const Lanes size = min(as_half_up(max(scale, negative(scale))), all(kLargestHalf));
  return {zero(), where_less(scale, zero(), negative(size), size), bias};
}

// The range of least error at its codes that the search meets.
template <int kBits>
Candidate searched(const Moved& rows, const Extremes& found) {
  const Insets inset = insets<kBits>(rows.dim);
  const Lanes unit = (found.max - found.min) / all(kMaxCode<kBits>);
  const Candidate none{all(__builtin_inff()), all(1.0f), zero()};
  Candidate best[2] = {none, none};
  for (std::size_t begin = 0; begin < inset.num * inset.num; begin += kSearched) {
    Candidate now[kSearched], met[kSearched];
    for (std::size_t k = 0; k < kSearched; ++k) {
      const std::size_t i = (begin + k) / inset.num, j = (begin + k) % inset.num;
      now[k] = start<kBits>(found, unit, inset.first + inset.pitch * static_cast<float>(i),
                            inset.first + inset.pitch * static_cast<float>(j), (i + j) % 2 == 1);
      met[k] = none;
    }
    for (int i = 0; i < kStepsPerStart; ++i) {
      step<kBits, kSearched>(rows, now);
      for (std::size_t k = 0; k < kSearched; ++k) met[k] = lower(met[k], now[k]);
    }
    for (const Candidate& each : met) {
      const Candidate beaten = where_less(each.error, best[0].error, best[0], each);
      best[0] = lower(best[0], each);
      best[1] = lower(best[1], beaten);
    }
  }
  Candidate now[2] = {best[0], best[1]};
  for (int i = 0; i < kStepsOfBest; ++i) {
    step<kBits, 2>(rows, now);
    for (std::size_t k = 0; k < 2; ++k) best[k] = lower(best[k], now[k]);
  }
  return lower(best[0], best[1]);
}

// Of what stored rows restore to, against the rows.
template <int kBits>
Lanes squared_error(const float* columns, std::size_t dim, Lanes scale, Lanes bias) {
  const Lanes inverse = all(1.0f) / scale;
  Lanes error = zero();
  for (std::size_t i = 0; i < dim; ++i) {
    const Lanes x = load(columns + i * kLanes);
    const Lanes difference = x - (scale * rounded(clamped_code<kBits>(x, bias, inverse)) + bias);
    error = fma(difference, difference, error);
  }
  return error;
}

static_assert(kMseScratch == 2 * kLanes, "the columns of a block, as they are and moved");

// Replaces minmax `ranges` where a better one is found. scratch: kMseScratch * dim floats.
template <int kBits>
void improve_ranges(const Block& block, std::size_t dim, const Extremes& found, float* scratch, RowRange* ranges) {
  columns_of(block, dim, scratch);
  const BlockSteps minmax = given_steps(ranges, block.num_rows);
  const Lanes error = squared_error<kBits>(scratch, dim, minmax.scale, minmax.bias);
  const Candidate best = searched<kBits>(moved(scratch, dim, found, scratch + dim * kLanes), found);
  float before[kLanes], after[kLanes];
  std::uint16_t scales[kLanes], biases[kLanes];
  store(before, error);
  store(after, squared_error<kBits>(scratch, dim, best.scale, best.bias));
  store_halves(scales, best.scale);
  store_halves(biases, best.bias);
  for (std::size_t i = 0; i < block.num_rows; ++i) {
    // A row that overflows fp16 has an error of infinity or NaN, and keeps minmax.
    if (after[i] < before[i] && before[i] < __builtin_inff()) ranges[i] = {scales[i], biases[i]};
  }
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
