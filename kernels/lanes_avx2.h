// Sixteen lanes in two registers; needs AVX2, FMA and F16C. See lanes.h.
#pragma once

#include <immintrin.h>

namespace lowprec::LOWPREC_PATH {
namespace {

constexpr std::size_t kScoredLanes = 1;
constexpr std::size_t kSearched = 1;

struct Lanes {
  __m256 low, high;
};

// Into the second cache. As assembly: GCC 12 takes a function that only prefetches for one without effect, and drops it.
inline void prefetch(const char* line) { asm volatile("prefetcht1 %0" : : "m"(*line)); }
// Into the first one.
inline void prefetch_nearest(const char* line) { asm volatile("prefetcht0 %0" : : "m"(*line)); }
inline void prefetch_to_write(const char* line) { asm volatile("prefetchw %0" : : "m"(*line)); }

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes load(const float* in) { return {_mm256_loadu_ps(in), _mm256_loadu_ps(in + 8)}; }
inline void store(float* out, Lanes a) {
  _mm256_storeu_ps(out, a.low);
  _mm256_storeu_ps(out + 8, a.high);
}

// All bits in the first n of eight lanes.
inline __m256i first_of_eight(std::size_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline __m256i first_low(std::size_t n) { return first_of_eight(n); }
inline __m256i first_high(std::size_t n) { return first_of_eight(n > 8 ? n - 8 : 0); }

inline Lanes load_part(const float* in, std::size_t n) {
  if (n <= 8) return {_mm256_maskload_ps(in, first_low(n)), _mm256_setzero_ps()};
  return {_mm256_loadu_ps(in), _mm256_maskload_ps(in + 8, first_high(n))};
}
inline void store_part(float* out, Lanes a, std::size_t n) {
  _mm256_maskstore_ps(out, first_low(n), a.low);
  if (n > 8) _mm256_maskstore_ps(out + 8, first_high(n), a.high);
}
inline Lanes keep_first(Lanes a, std::size_t n) {
  return {_mm256_and_ps(a.low, _mm256_castsi256_ps(first_low(n))),
          _mm256_and_ps(a.high, _mm256_castsi256_ps(first_high(n)))};
}

inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes rounded(Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
inline __m128i halves(__m256 a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Lanes as_half(Lanes a) { return {_mm256_cvtph_ps(halves(a.low)), _mm256_cvtph_ps(halves(a.high))}; }
// Rounded towards minus and plus infinity.
inline Lanes as_half_down(Lanes a) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.low, kDown)), _mm256_cvtph_ps(_mm256_cvtps_ph(a.high, kDown))};
}
inline Lanes as_half_up(Lanes a) {
  constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.low, kUp)), _mm256_cvtph_ps(_mm256_cvtps_ph(a.high, kUp))};
}
inline void store_halves(std::uint16_t* out, Lanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves(a.low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), halves(a.high));
}
inline Lanes load_halves(const std::uint16_t* in) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 8)))};
}
struct Words {
  __m256i low, high;
};
inline Words load_words(const std::int32_t* in) {
  const auto eight = [](const std::int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
  return {eight(in), eight(in + 8)};
}
inline Lanes upper_half(Words a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Lanes lower_half(Words a) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  return upper_half({_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)});
}
inline Lanes where_equal(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return {_mm256_blendv_ps(otherwise.low, then.low, _mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ)),
          _mm256_blendv_ps(otherwise.high, then.high, _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))};
}
inline Lanes where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return {_mm256_blendv_ps(otherwise.low, then.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(otherwise.high, then.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
inline std::uint32_t outside(Lanes a, Lanes low, Lanes high) {
  const auto inside = [](__m256 x, __m256 from, __m256 to) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(
        _mm256_and_ps(_mm256_cmp_ps(x, from, _CMP_GE_OQ), _mm256_cmp_ps(x, to, _CMP_LE_OQ))));
  };
  return 0xffffu ^ (inside(a.low, low.low, high.low) | inside(a.high, low.high, high.high) << 8);
}

inline __m128i bytes(Lanes a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
}

// Eight rows of eight lanes each, as transpose() below.
inline void transpose_eight(__m256 (&row)[8]) {
  __m256 pairs[8], fours[8];
  for (std::size_t i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (std::size_t i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (std::size_t k = 0; k < 4; ++k) {
    row[k] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20);
    row[k + 4] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31);
  }
}

// Lane k of row[i] and lane i of row[k] change places.
inline void transpose(Lanes (&row)[kLanes]) {
  __m256 quarters[2][2][8];  // [upper rows][upper lanes]
  for (std::size_t i = 0; i < kLanes; ++i) {
    quarters[i / 8][0][i % 8] = row[i].low;
    quarters[i / 8][1][i % 8] = row[i].high;
  }
  for (auto& half : quarters) {
    for (auto& quarter : half) transpose_eight(quarter);
  }
  for (std::size_t i = 0; i < kLanes; ++i) row[i] = {quarters[0][i / 8][i % 8], quarters[1][i / 8][i % 8]};
}

// An Op for one register of a pair; the other one costs nothing once inlined.
template <typename Op>
__m256 half_op(Op op, __m256 a, __m256 b) {
  return op(Lanes{a, a}, Lanes{b, b}).low;
}

template <typename Op>
Lanes in_fours(Lanes a, Lanes b, Lanes c, Lanes d, Op op) {
  const auto two = [&op](Lanes x, Lanes y) {
    const __m256 of_x = half_op(op, x.low, x.high), of_y = half_op(op, y.low, y.high);
    return half_op(op, _mm256_permute2f128_ps(of_x, of_y, 0x20), _mm256_permute2f128_ps(of_x, of_y, 0x31));
  };
  return {two(a, b), two(c, d)};
}

template <typename Op>
Lanes folded_fours(const Lanes (&row)[4], Op op) {
  const auto of_half = [&](__m256 a, __m256 b, __m256 c, __m256 d) {
    const auto pairs = [&op](__m256 x, __m256 y) {
      return _mm256_castps_pd(half_op(op, _mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y)));
    };
    const __m256d ab = pairs(a, b), cd = pairs(c, d);
    return half_op(op, _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  };
  return {of_half(row[0].low, row[1].low, row[2].low, row[3].low),
          of_half(row[0].high, row[1].high, row[2].high, row[3].high)};
}

template <typename Op>
float folded(Lanes a, Op op) {
  __m256 v = half_op(op, a.low, a.high);
  v = half_op(op, v, _mm256_permute2f128_ps(v, v, 0x01));
  v = half_op(op, v, _mm256_permute_ps(v, 0x0e));
  v = half_op(op, v, _mm256_permute_ps(v, 0x01));
  return _mm256_cvtss_f32(v);
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
