// What low precision changes in the product of pooled rows and a gradient: the inner loop of the profile.
//
// With d = x - bias, a value changes by scale * code - d. Both parts are pooled, precision by precision, one read of the
// row for all; the gradient is multiplied in once a bag. Centred by the bias, what cancels is no larger than the range of
// a row. The multiplications and the additions of a value are about as many, which are other units of the CPU.
#pragma once

#include <utility>

#include "pending.h"

namespace lowprec::LOWPREC_PATH {
namespace {

// What turns the values of a row into codes and back, for int8, int4 and int2.
struct ScoreSteps {
  float bias[kNumRowwise];
  float scale[kNumRowwise];
  float inverse[kNumRowwise];
  std::uint32_t clamped;  // not zero when codes may have to be clamped
  float unused[6];        // sixteen rows are a square of floats
};

constexpr unsigned kHalf = 1, kByte = 2, kNibble = 4, kPair = 8;  // bits of a set of precisions, as kScoredBits has them
constexpr unsigned kRowwise = kByte | kNibble | kPair;

// Pooled so far, kNum lanes of columns: fp16 less fp32, scale * code of the row-wise precisions, and their x - bias.
// kShared: the bias of a row is the same for all, so there is one of the latter.
template <unsigned kSet, bool kShared, std::size_t kNum>
struct Pooled {
  static constexpr std::size_t kNumCentred = kShared ? 1 : kNumRowwise;
  Lanes half[kNum], codes[kNumRowwise][kNum], centred[kNumCentred][kNum];

  // Where bags begin in one block and end in another, sums wait in `scratch`.
  void take(float* scratch, std::size_t dim, std::size_t rest) {
    each([&](Lanes& sum, std::size_t k, std::size_t plane) {
      sum = load_first(scratch + plane * dim + k * kLanes, k + 1 == kNum && rest > 0 ? rest : kLanes);
    });
  }
  void leave(float* scratch, std::size_t dim, std::size_t rest) {
    each([&](Lanes& sum, std::size_t k, std::size_t plane) {
      store_first(scratch + plane * dim + k * kLanes, sum, k + 1 == kNum && rest > 0 ? rest : kLanes);
    });
  }
  void clear() {
    each([](Lanes& sum, std::size_t, std::size_t) { sum = zero(); });
  }

  template <bool kClamp, bool kWeighted>
  void add(const float* row, const ScoreSteps& steps, float weight, std::size_t rest) {
    const auto weighted = [&](Lanes value, Lanes sum) {
      if constexpr (kWeighted) return fma(all(weight), value, sum);
      return sum + value;
    };
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kNum; ++k) {
      const Lanes x = k + 1 == kNum && rest > 0 ? load_part(row + k * kLanes, rest) : load(row + k * kLanes);
      if constexpr ((kSet & kHalf) != 0) half[k] = weighted(as_half(x) - x, half[k]);
      Lanes d = x;
      if constexpr (kShared && (kSet & kRowwise) != 0) {
        d = x - all(steps.bias[0]);
        centred[0][k] = weighted(d, centred[0][k]);
      }
      const auto add_codes = [&](auto bits, auto p) {
        if constexpr ((kSet >> (p + 1) & 1u) != 0) {
          if constexpr (!kShared) {
            d = x - all(steps.bias[p]);
            centred[p][k] = weighted(d, centred[p][k]);
          }
          const float scale = kWeighted ? steps.scale[p] * weight : steps.scale[p];
          codes[p][k] = fma(all(scale), code<bits, kClamp>(d, all(steps.inverse[p])), codes[p][k]);
        }
      };
      using std::integral_constant;
      add_codes(integral_constant<int, 8>{}, integral_constant<std::size_t, 0>{});
      add_codes(integral_constant<int, 4>{}, integral_constant<std::size_t, 1>{});
      add_codes(integral_constant<int, 2>{}, integral_constant<std::size_t, 2>{});
    }
  }

  // sums += g * change; the lanes of g from `rest` on are zero.
  void add_products(const float* gradient, std::size_t rest, Lanes (&sums)[kNumScored]) const {
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kNum; ++k) {
      const Lanes g = load_first(gradient + k * kLanes, k + 1 == kNum && rest > 0 ? rest : kLanes);
      if constexpr ((kSet & kHalf) != 0) sums[0] = fma(g, half[k], sums[0]);
#pragma GCC unroll 8
      for (std::size_t p = 0; p < kNumRowwise; ++p) {
        if ((kSet >> (p + 1) & 1u) == 0) continue;
        sums[p + 1] = fma(g, codes[p][k] - centred[kShared ? 0 : p][k], sums[p + 1]);
      }
    }
  }

 private:
  template <typename Visit>
  void each(const Visit& visit) {
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kNum; ++k) {
      visit(half[k], k, 0);
#pragma GCC unroll 8
      for (std::size_t p = 0; p < kNumRowwise; ++p) visit(codes[p][k], k, 1 + p);
#pragma GCC unroll 8
      for (std::size_t p = 0; p < kNumCentred; ++p) visit(centred[p][k], k, 1 + kNumRowwise + p);
    }
  }
};

// The rows [begin, end) of a block that belong to one bag, and whether they are its first and its last ones.
struct Segment {
  const Block& block;
  std::size_t begin, end;
  bool is_first, is_last;
  const ScoreSteps* steps;
  const float* weights;
};

template <unsigned kSet, bool kShared, std::size_t kNum>
void add_segment(const Segment& segment, std::size_t column, std::size_t rest, const float* gradient, float* scratch,
                 std::size_t dim, Lanes (&products)[kNumScored]) {
  Pooled<kSet, kShared, kNum> pooled;
  if (segment.is_first) {
    pooled.clear();
  } else {
    pooled.take(scratch + column, dim, rest);
  }
  for (std::size_t i = segment.begin; i < segment.end; ++i) {
    const float* row = segment.block.row[i] + column;
    const ScoreSteps& steps = segment.steps[i];
    const bool clamp = (kSet & kRowwise) != 0 && (!kShared || steps.clamped != 0);
    if (segment.weights != nullptr) {
      pooled.template add<true, true>(row, steps, segment.weights[i], rest);
    } else if (clamp) {
      pooled.template add<true, false>(row, steps, 1.0f, rest);
    } else {
      pooled.template add<!kShared, false>(row, steps, 1.0f, rest);
    }
  }
  if (segment.is_last) {
    pooled.add_products(gradient + column, rest, products);
  } else {
    pooled.leave(scratch + column, dim, rest);
  }
}

static_assert(sizeof(ScoreSteps) == kLanes * sizeof(float), "the steps of a row are what the lanes of a register hold");

inline void store_steps(const BlockSteps (&of)[kNumRowwise], std::size_t num_rows, ScoreSteps* out) {
  Lanes fields[kLanes];
  for (Lanes& field : fields) field = zero();
  std::uint32_t clamped = 0;
  for (std::size_t p = 0; p < kNumRowwise; ++p) {
    fields[p] = of[p].bias;
    fields[kNumRowwise + p] = of[p].scale;
    fields[2 * kNumRowwise + p] = of[p].inverse;
    clamped |= of[p].clamped;
  }
  transpose(fields);
  for (std::size_t i = 0; i < num_rows; ++i) {
    store(reinterpret_cast<float*>(out + i), fields[i]);
    out[i].clamped = clamped >> i & 1u;
  }
}

inline void minmax_score_steps(const Block& block, std::size_t dim, ScoreSteps* out) {
  const Extremes found = extremes(block, dim);
  const Lanes bias = as_half(found.min);
  store_steps({minmax_steps<8>(found, bias), minmax_steps<4>(found, bias), minmax_steps<2>(found, bias)},
              block.num_rows, out);
}

template <unsigned kSet, bool kShared>
void scores_of(const Rows& rows, const Bags& bags, std::size_t first, std::size_t last, const float* gradients,
               const RowRange* const* ranges, float* scratch, float* const* out) {
  const std::size_t dim = rows.dim;
  PendingBags pending(bags, first, last, gradients, dim, out);
  each_block(rows, bags, first, last, [&](const Block& block, std::size_t at, std::size_t end) {
    ScoreSteps made[kLanes];
    Segment segment{block, 0, 0, true, true, made, bags.weights == nullptr ? nullptr : bags.weights + at};
    if constexpr ((kSet & kRowwise) != 0) {
      if constexpr (!kShared) {
        const auto own = [&](std::size_t p) { return ranges[p] == nullptr ? nullptr : ranges[p] + at; };
        store_steps({block_steps<8>(block, dim, own(0)), block_steps<4>(block, dim, own(1)),
                     block_steps<2>(block, dim, own(2))},
                    block.num_rows, made);
      } else {
        minmax_score_steps(block, dim, made);
      }
    }
    prefetch_ahead(rows, bags.ids, at, end);
    for (std::size_t i = 0; i < block.num_rows; i = segment.end) {
      while (bags.offsets[pending.bag + 1] <= static_cast<std::int64_t>(at + i)) pending.finish_empty_bag();
      const auto bag_begin = static_cast<std::size_t>(bags.offsets[pending.bag]);
      const auto bag_end = static_cast<std::size_t>(bags.offsets[pending.bag + 1]);
      segment.begin = i;
      segment.end = bag_end < at + block.num_rows ? bag_end - at : block.num_rows;
      segment.is_first = bag_begin >= at;
      segment.is_last = bag_end <= at + block.num_rows;
      Lanes products[kNumScored] = {zero(), zero(), zero(), zero()};
      for (std::size_t column = 0; column < dim;) {
        const auto add = [&](auto num, std::size_t rest) {
          add_segment<kSet, kShared, num>(segment, column, rest, pending.gradient(), scratch, dim, products);
          column += num * kLanes;
        };
        const std::size_t left = dim - column;
        if (kScoredLanes >= 4 && kShared && left >= 4 * kLanes) {
          add(std::integral_constant<std::size_t, 4>{}, 0);
        } else if (kScoredLanes >= 2 && left >= 2 * kLanes) {
          add(std::integral_constant<std::size_t, 2>{}, 0);
        } else {
          add(std::integral_constant<std::size_t, 1>{}, left < kLanes ? left : 0);
        }
      }
      if (segment.is_last) pending.finish_bag(products);
    }
  });
  while (pending.bag < last) pending.finish_empty_bag();
}

using Scores = void (*)(const Rows&, const Bags&, std::size_t, std::size_t, const float*, const RowRange* const*,
                        float*, float* const*);

template <std::size_t... kSet>
Scores scores_of_set(unsigned set, bool shared, std::index_sequence<kSet...>) {
  constexpr Scores with_shared[] = {scores_of<kSet, true>...}, with_given[] = {scores_of<kSet, false>...};
  return shared ? with_shared[set] : with_given[set];
}

inline void scores(const Rows& rows, const Bags& bags, std::size_t first, std::size_t last, const float* gradients,
                   const RowRange* const* ranges, float* scratch, float* const* out) {
  unsigned set = 0;
  for (std::size_t k = 0; k < kNumScored; ++k) set |= out[k] == nullptr ? 0u : 1u << k;
  const bool shared = ranges[0] == nullptr && ranges[1] == nullptr && ranges[2] == nullptr;
  const auto run = scores_of_set(set, shared, std::make_index_sequence<1u << kNumScored>{});
  run(rows, bags, first, last, gradients, ranges, scratch, out);
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
