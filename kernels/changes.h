// What low precision changes in the rows of a small table, found once: scores without quantizing a row again.
//
// A change is small beside its value: 16 bits of it are about what rounding leaves of the difference of two floats.
#pragma once

#include "pending.h"

namespace lowprec::LOWPREC_PATH {
namespace {

// Changes below this are taken for zero: a step of theirs would not be a normal float.
constexpr float kSmallestChange = 0x1p-90f;

// A word is the upper half times kHalfWord, and the lower half, which is moved up by kMiddle to have no sign.
constexpr float kHalfWord = 65536.0f, kMiddle = 32768.0f, kLargestInHalf = 32767.0f;

// Changes of a row at kBits, filled up with zeros to whole lanes. Returns their step in 16 bits.
template <int kBits>
float changes_of(const float* row, std::size_t dim, const Steps& steps, std::size_t i, float* out) {
  Lanes largest = zero(), bad = zero();
  for (std::size_t column = 0; column < dim; column += kLanes) {
    const Lanes x = load_first(row + column, dim - column);
    Lanes change;
    if constexpr (kBits == 16) {
      change = as_half(x) - x;
    } else {
      const Lanes d = x - all(steps.bias[i]);
      change = fma(all(steps.scale[i]), code<kBits, true>(d, all(steps.inverse[i])), zero() - d);
    }
    if (dim - column < kLanes) change = keep_first(change, dim - column);
    store(out + column, change);
    largest = max(max(change, zero() - change), largest);
    bad = fma(change, zero(), bad);
  }
  // NaN where a change is not finite.
  const float size = folded(largest, Max{}) + folded(bad, Add{});
  return size < kSmallestChange ? 0.0f : size / kLargestInHalf;
}

// Changes in steps of 16 bits.
inline Lanes in_steps(const float* changes, float step) {
  if (!(step > 0.0f)) return zero();
  return load(changes) / all(step);
}

inline void store_words(const float* upper, float upper_step, const float* lower, float lower_step, std::int32_t* out) {
  float lower_values[kLanes], upper_values[kLanes], below[kLanes];
  std::uint32_t lower_bits[kLanes];
  store(lower_values, rounded(in_steps(lower, lower_step)));
  for (std::size_t i = 0; i < kLanes; ++i) {
    lower_bits[i] = static_cast<std::uint32_t>(lower_values[i] + kMiddle);
    below[i] = static_cast<float>(lower_bits[i]) / kHalfWord;
  }
  store(upper_values, rounded(in_steps(upper, upper_step) - load(below)));
  for (std::size_t i = 0; i < kLanes; ++i) {
    const auto upper_bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(upper_values[i]));
    out[i] = static_cast<std::int32_t>(upper_bits << 16 | lower_bits[i]);
  }
}

inline void row_changes(const Rows& rows, std::size_t begin, std::size_t end, const RowRange* const* ranges,
                        float* scratch, std::int32_t* words, float* steps) {
  const std::size_t dim = rows.dim, row_words = change_words(dim), padded = row_words / 2;
  float* changes[kNumScored];
  for (std::size_t k = 0; k < kNumScored; ++k) changes[k] = scratch + k * padded;
  for (std::size_t at = begin; at < end; at += kLanes) {
    const Block block = block_of(rows, nullptr, at, end);
    const auto own = [&](std::size_t p) { return ranges[p] == nullptr ? nullptr : ranges[p] + at; };
    const Steps bytes(block_steps<8>(block, dim, own(0))), nibbles(block_steps<4>(block, dim, own(1))),
        pairs(block_steps<2>(block, dim, own(2)));
    for (std::size_t i = 0; i < block.num_rows; ++i) {
      float* step = steps + (at + i) * kNumScored;
      step[0] = changes_of<16>(block.row[i], dim, bytes, i, changes[0]);
      step[1] = changes_of<8>(block.row[i], dim, bytes, i, changes[1]);
      step[2] = changes_of<4>(block.row[i], dim, nibbles, i, changes[2]);
      step[3] = changes_of<2>(block.row[i], dim, pairs, i, changes[3]);
      std::int32_t* out = words + (at + i) * row_words;
      for (std::size_t column = 0; column < padded; column += kLanes, out += 2 * kLanes) {
        store_words(changes[0] + column, step[0], changes[1] + column, step[1], out);
        store_words(changes[2] + column, step[2], changes[3] + column, step[3], out + kLanes);
      }
      step[0] /= kHalfWord;
      step[2] /= kHalfWord;
    }
  }
}

// The steps of a row.
using Four [[gnu::vector_size(kNumScored * sizeof(float))]] = float;

inline Four load_four(const float* in) {
  Four out;
  std::memcpy(&out, in, sizeof out);
  return out;
}

// Rows are asked for so far ahead, into the first cache.
constexpr std::size_t kIdsAhead = 8;

// A bag of this length is worth the time to begin with more lanes at once.
constexpr std::size_t kLongBag = 8;

// Scores of bags, from changes. kFirst: of 16 and 8 bits; kSecond: of 4 and 2.
template <bool kFirst, bool kSecond, bool kWeighted>
struct ChangedBags {
  const Changes& changes;
  const Bags& bags;
  std::size_t row_bytes, last_id;

  // kNum lanes of columns from `column` on, of a bag with ids [begin, end); the last of them holds `rest` columns when
  // that is not zero.
  template <std::size_t kNum>
  [[gnu::always_inline]] void add(std::size_t begin, std::size_t end, std::size_t column, std::size_t rest,
                                  const float* gradient, Lanes (&products)[kNumScored]) const {
    const auto* words = reinterpret_cast<const char*>(changes.words + 2 * column);
    Lanes sums[kNumScored][kNum];
#pragma GCC unroll 4
    for (auto& of_precision : sums) {
#pragma GCC unroll 4
      for (Lanes& sum : of_precision) sum = zero();
    }
    Four all_steps{};
    for (std::size_t i = begin; i < end; ++i) {
      if (__builtin_expect(i + kIdsAhead < last_id, 1)) ask_for<kNum>(words, bags.ids[i + kIdsAhead]);
      const auto* of_row = reinterpret_cast<const std::int32_t*>(words + bags.ids[i] * row_bytes);
      const float* of_steps = changes.steps + bags.ids[i] * kNumScored;
      const float weight = kWeighted ? bags.weights[i] : 1.0f;
      all_steps += kWeighted ? load_four(of_steps) * weight : load_four(of_steps);
      const auto add = [&](std::size_t p, Lanes half, Lanes& sum) {
        sum = fma(all(kWeighted ? of_steps[p] * weight : of_steps[p]), half, sum);
      };
#pragma GCC unroll 4
      for (std::size_t k = 0; k < kNum; ++k) {
        if constexpr (kFirst) {
          const Words words = load_words(of_row + 2 * k * kLanes);
          add(0, upper_half(words), sums[0][k]);
          add(1, lower_half(words), sums[1][k]);
        }
        if constexpr (kSecond) {
          const Words words = load_words(of_row + (2 * k + 1) * kLanes);
          add(2, upper_half(words), sums[2][k]);
          add(3, lower_half(words), sums[3][k]);
        }
      }
    }
#pragma GCC unroll 4
    for (std::size_t k = 0; k < kNum; ++k) {
      const float* from = gradient + column + k * kLanes;
      const Lanes g = rest > 0 && k + 1 == kNum ? load_part(from, rest) : load(from);
      const auto multiply = [&](std::size_t p, Lanes sum) { products[p] = fma(g, sum, products[p]); };
      const auto centred = [&](std::size_t p) { return fma(all(all_steps[p]), all(-kMiddle), sums[p][k]); };
      if constexpr (kFirst) {
        multiply(0, sums[0][k]);
        multiply(1, centred(1));
      }
      if constexpr (kSecond) {
        multiply(2, sums[2][k]);
        multiply(3, centred(3));
      }
    }
  }

  template <std::size_t kNum>
  void ask_for(const char* words, std::int64_t id) const {
    const char* of_row = words + id * row_bytes;
#pragma GCC unroll 8
    for (std::size_t line = 0; line < 2 * kNum; ++line) prefetch_nearest(of_row + 64 * line);
    prefetch_nearest(reinterpret_cast<const char*>(changes.steps + id * kNumScored));
  }

  void add_bag(std::size_t begin, std::size_t end, const float* gradient, Lanes (&products)[kNumScored]) const {
    constexpr std::size_t kNum = kScoredLanes < 2 ? 1 : 2;
    for (std::size_t column = 0; column < changes.dim;) {
      const std::size_t left = changes.dim - column;
      if (kScoredLanes >= 4 && end - begin >= kLongBag && left >= 4 * kLanes) {
        add<4>(begin, end, column, 0, gradient, products);
        column += 4 * kLanes;
      } else if (left > (kNum - 1) * kLanes) {
        add<kNum>(begin, end, column, left < kNum * kLanes ? left - (kNum - 1) * kLanes : 0, gradient, products);
        column += kNum * kLanes;
      } else {
        add<1>(begin, end, column, left < kLanes ? left : 0, gradient, products);
        column += kLanes;
      }
    }
  }
};

template <bool kFirst, bool kSecond, bool kWeighted>
void scores_of_changes(const Changes& changes, const Bags& bags, std::size_t first, std::size_t last,
                       const float* gradients, float* const* out) {
  const ChangedBags<kFirst, kSecond, kWeighted> changed{changes, bags, change_words(changes.dim) * sizeof(std::int32_t),
                                                        static_cast<std::size_t>(bags.offsets[last])};
  PendingBags pending(bags, first, last, gradients, changes.dim, out);
  auto begin = static_cast<std::size_t>(bags.offsets[first]);
  while (pending.bag < last) {
    const auto end = static_cast<std::size_t>(bags.offsets[pending.bag + 1]);
    Lanes products[kNumScored] = {zero(), zero(), zero(), zero()};
    if (begin < end) changed.add_bag(begin, end, pending.gradient(), products);
    pending.finish_bag(products);
    begin = end;
  }
}

inline void scores_of_changes(const Changes& changes, const Bags& bags, std::size_t first, std::size_t last,
                              const float* gradients, float* const* out) {
  const bool is_first = out[0] != nullptr || out[1] != nullptr, is_second = out[2] != nullptr || out[3] != nullptr;
  const auto run = [&](auto of_first, auto of_second) {
    if (bags.weights != nullptr) {
      scores_of_changes<of_first, of_second, true>(changes, bags, first, last, gradients, out);
    } else {
      scores_of_changes<of_first, of_second, false>(changes, bags, first, last, gradients, out);
    }
  };
  if (is_first && is_second) {
    run(std::true_type{}, std::true_type{});
  } else if (is_first) {
    run(std::true_type{}, std::false_type{});
  } else if (is_second) {
    run(std::false_type{}, std::true_type{});
  }
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
