// Pooled lookups at a low precision, straight from fp32 rows.
#pragma once

#include <type_traits>

#include "quantize.h"

namespace lowprec::LOWPREC_PATH {
namespace {

// Calls `work(block, begin)` for the ids of bags [first, last), up to sixteen at a time.
template <typename Work>
void each_block(const Rows& rows, const Bags& bags, std::size_t first, std::size_t last, const Work& work) {
  const auto end = static_cast<std::size_t>(bags.offsets[last]);
  for (auto at = static_cast<std::size_t>(bags.offsets[first]); at < end; at += kLanes) {
    work(block_of(rows, bags.ids, at, end), at, end);
  }
}

// Vectors of bags are asked for so far ahead, in bags: with one id in each, they are as many bytes as the rows.
constexpr std::size_t kBagsAhead = 24;

// NaN stays, unlike in a stored code: the sum then shows it.
template <int kBits, bool kClamp>
Lanes code(Lanes centred, Lanes inverse) {
  const Lanes exact = centred * inverse;
  if constexpr (kClamp) return rounded(min(all(kMaxCode<kBits>), max(zero(), exact)));
  return rounded(exact);
}

// The rows [begin, end) of a block are of one bag. Adds kNum lanes of each to `sums`.
template <int kBits, bool kClamp, std::size_t kNum>
void add_row(const float* row, const Steps& steps, std::size_t i, float weight, std::size_t rest, Lanes (&sums)[kNum]) {
  const auto at = [&](std::size_t k) {
    return rest > 0 && k + 1 == kNum ? load_part(row + k * kLanes, rest) : load(row + k * kLanes);
  };
  if constexpr (kBits == 16) {
    const Lanes w = all(weight);
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kNum; ++k) sums[k] = fma(w, as_half(at(k)), sums[k]);
  } else {
    const Lanes bias = all(steps.bias[i]), inverse = all(steps.inverse[i]);
    const Lanes scale = all(steps.scale[i] * weight), added = all(steps.bias[i] * weight);
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kNum; ++k) {
      sums[k] = fma(scale, code<kBits, kClamp>(at(k) - bias, inverse), sums[k] + added);
    }
  }
}

// kNum lanes of columns from `column` on; the last of them holds `rest` columns when that is not zero.
template <int kBits, std::size_t kNum>
void add_rows(const Block& block, std::size_t begin, std::size_t end, const Steps& steps, const float* weights,
              std::size_t column, std::size_t rest, float* out) {
  Lanes sums[kNum];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < kNum; ++k) {
    sums[k] = rest > 0 && k + 1 == kNum ? load_part(out + k * kLanes, rest) : load(out + k * kLanes);
  }
  for (std::size_t i = begin; i < end; ++i) {
    const float weight = weights == nullptr ? 1.0f : weights[i];
    if (kBits != 16 && (steps.clamped >> i & 1u) != 0) {
      add_row<kBits, true, kNum>(block.row[i] + column, steps, i, weight, rest, sums);
    } else {
      add_row<kBits, false, kNum>(block.row[i] + column, steps, i, weight, rest, sums);
    }
  }
#pragma GCC unroll 8
  for (std::size_t k = 0; k < kNum; ++k) {
    if (rest > 0 && k + 1 == kNum) {
      store_part(out + k * kLanes, sums[k], rest);
    } else {
      store(out + k * kLanes, sums[k]);
    }
  }
}

template <int kBits>
void add_to_bag(const Block& block, std::size_t begin, std::size_t end, const Steps& steps, const float* weights,
                std::size_t dim, float* out) {
  // Eight lanes of sums stay in registers while the rows of the bag go by.
  for (std::size_t column = 0; column < dim;) {
    const std::size_t left = dim - column;
    const auto add = [&](auto num, std::size_t rest) {
      add_rows<kBits, num>(block, begin, end, steps, weights, column, rest, out + column);
      column += num * kLanes;
    };
    using std::integral_constant;
    if (left >= 8 * kLanes) {
      add(integral_constant<std::size_t, 8>{}, 0);
    } else if (left >= 4 * kLanes) {
      add(integral_constant<std::size_t, 4>{}, 0);
    } else if (left >= 2 * kLanes) {
      add(integral_constant<std::size_t, 2>{}, 0);
    } else {
      add(integral_constant<std::size_t, 1>{}, left < kLanes ? left : 0);
    }
  }
}

inline void scale_mean(const Bags& bags, std::size_t bag, std::size_t dim, float* out) {
  const std::int64_t count = bags.offsets[bag + 1] - bags.offsets[bag];
  if (!bags.mean || count == 0) return;
  const float inverse = 1.0f / static_cast<float>(count);
  for (std::size_t i = 0; i < dim; ++i) out[i] *= inverse;
}

template <int kBits>
void pooled(const Rows& rows, const Bags& bags, std::size_t first, std::size_t last, const RowRange* ranges,
            float* out) {
  const std::size_t dim = rows.dim;
  // A bag is cleared when its first row comes, finished when its last one has gone by: while it is in the first cache.
  std::size_t bag = first;
  const auto clear_bag = [&] {
    if (bag + kBagsAhead < last) each_line(out + (bag + kBagsAhead) * dim, dim, prefetch_to_write);
    if (bag < last) std::memset(out + bag * dim, 0, dim * sizeof(float));
  };
  const auto finish_bag = [&] {
    scale_mean(bags, bag, dim, out + bag * dim);
    ++bag;
    clear_bag();
  };
  clear_bag();
  each_block(rows, bags, first, last, [&](const Block& block, std::size_t at, std::size_t end) {
    BlockSteps made{};
    if constexpr (kBits != 16) made = block_steps<kBits>(block, dim, ranges == nullptr ? nullptr : ranges + at);
    const Steps steps(made);
    prefetch_ahead(rows, bags.ids, at, end);
    for (std::size_t i = 0; i < block.num_rows;) {
      while (bags.offsets[bag + 1] <= static_cast<std::int64_t>(at + i)) finish_bag();
      const auto bag_end = static_cast<std::size_t>(bags.offsets[bag + 1]) - at;
      const std::size_t stop = bag_end < block.num_rows ? bag_end : block.num_rows;
      const float* weights = bags.weights == nullptr ? nullptr : bags.weights + at;
      add_to_bag<kBits>(block, i, stop, steps, weights, dim, out + bag * dim);
      i = stop;
    }
  });
  while (bag < last) finish_bag();
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
