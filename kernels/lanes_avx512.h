// Sixteen lanes in one register. See lanes.h.
#pragma once

#include <immintrin.h>

namespace lowprec::LOWPREC_PATH {
namespace {

constexpr std::size_t kScoredLanes = 4;
constexpr std::size_t kSearched = 4;

struct Lanes {
  __m512 v;
};

// Into the second cache. As assembly: GCC 12 takes a function that only prefetches for one without effect, and drops it.
inline void prefetch(const char* line) { asm volatile("prefetcht1 %0" : : "m"(*line)); }
// Into the first one.
inline void prefetch_nearest(const char* line) { asm volatile("prefetcht0 %0" : : "m"(*line)); }
inline void prefetch_to_write(const char* line) { asm volatile("prefetchw %0" : : "m"(*line)); }

inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes all(float value) { return {_mm512_set1_ps(value)}; }
inline Lanes load(const float* in) { return {_mm512_loadu_ps(in)}; }
inline void store(float* out, Lanes a) { _mm512_storeu_ps(out, a.v); }

inline __mmask16 first(std::size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Lanes load_part(const float* in, std::size_t n) { return {_mm512_maskz_loadu_ps(first(n), in)}; }
inline void store_part(float* out, Lanes a, std::size_t n) { _mm512_mask_storeu_ps(out, first(n), a.v); }
inline Lanes keep_first(Lanes a, std::size_t n) { return {_mm512_maskz_mov_ps(first(n), a.v)}; }

inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a < b ? a : b, so b when either is NaN.
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
// To the nearest integer, halves to even.
inline Lanes rounded(Lanes a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256i halves(Lanes a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// What fp16 keeps of each lane.
inline Lanes as_half(Lanes a) { return {_mm512_cvtph_ps(halves(a))}; }
// Rounded towards minus and plus infinity.
inline Lanes as_half_down(Lanes a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))};
}
inline Lanes as_half_up(Lanes a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC))};
}
inline void store_halves(std::uint16_t* out, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves(a));
}
inline Lanes load_halves(const std::uint16_t* in) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)))};
}
struct Words {
  __m512i v;
};
inline Words load_words(const std::int32_t* in) {
  Words words{_mm512_loadu_si512(in)};
  asm("" : "+v"(words.v));  // read once: GCC would read them from memory for each use
  return words;
}
// As floats, and their lower halves, from 0 to 65535.
inline Lanes upper_half(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Lanes lower_half(Words a) { return {_mm512_cvtepi32_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff)))}; }
// Where a == b, `then`, elsewhere `otherwise`.
inline Lanes where_equal(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), otherwise.v, then.v)};
}
// Where a < b, `then`, elsewhere `otherwise`.
inline Lanes where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), otherwise.v, then.v)};
}
// A bit for each lane that is not within [low, high]; NaN is not.
inline std::uint32_t outside(Lanes a, Lanes low, Lanes high) {
  const __mmask16 inside = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ) & _mm512_cmp_ps_mask(a.v, high.v, _CMP_LE_OQ);
  return static_cast<std::uint16_t>(~inside);
}

// Integers from 0 to 255 as bytes.
inline __m128i bytes(Lanes a) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)); }

// Lane k of row[i] and lane i of row[k] change places.
inline void transpose(Lanes (&row)[kLanes]) {
  __m512 pairs[kLanes], fours[kLanes];
  for (std::size_t i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(row[i].v, row[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(row[i].v, row[i + 1].v);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (std::size_t i = 0; i < kLanes; i += 4) {
    fours[i] = low(pairs[i], pairs[i + 2]);
    fours[i + 1] = high(pairs[i], pairs[i + 2]);
    fours[i + 2] = low(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = high(pairs[i + 1], pairs[i + 3]);
  }
  // Now chunk c of fours[4 * r + k] holds column 4 * c + k of rows 4 * r up to 4 * r + 3.
  for (std::size_t k = 0; k < 4; ++k) {
    const __m512 ab = _mm512_shuffle_f32x4(fours[k], fours[k + 4], 0x88);
    const __m512 cd = _mm512_shuffle_f32x4(fours[k + 8], fours[k + 12], 0x88);
    const __m512 ab_odd = _mm512_shuffle_f32x4(fours[k], fours[k + 4], 0xdd);
    const __m512 cd_odd = _mm512_shuffle_f32x4(fours[k + 8], fours[k + 12], 0xdd);
    row[k].v = _mm512_shuffle_f32x4(ab, cd, 0x88);
    row[k + 4].v = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    row[k + 8].v = _mm512_shuffle_f32x4(ab, cd, 0xdd);
    row[k + 12].v = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
}

template <int kLow, int kHigh, typename Op>
Lanes folded_chunks(Lanes a, Lanes b, Op op) {
  return op(Lanes{_mm512_shuffle_f32x4(a.v, b.v, kLow)}, Lanes{_mm512_shuffle_f32x4(a.v, b.v, kHigh)});
}

// Each register folded to four lanes, in order: lanes i and i + 8, then those 4 apart.
template <typename Op>
Lanes in_fours(Lanes a, Lanes b, Lanes c, Lanes d, Op op) {
  const Lanes ab = folded_chunks<0x44, 0xee>(a, b, op), cd = folded_chunks<0x44, 0xee>(c, d, op);
  return folded_chunks<0x88, 0xdd>(ab, cd, op);
}

// Lane 4 * c + i: the four lanes c of row[i], folded, those 2 and then 1 apart.
template <typename Op>
Lanes folded_fours(const Lanes (&row)[4], Op op) {
  const auto pairs = [&op](Lanes a, Lanes b) {
    return _mm512_castps_pd(op(Lanes{_mm512_unpacklo_ps(a.v, b.v)}, Lanes{_mm512_unpackhi_ps(a.v, b.v)}).v);
  };
  const __m512d low = pairs(row[0], row[1]), high = pairs(row[2], row[3]);
  return op(Lanes{_mm512_castpd_ps(_mm512_unpacklo_pd(low, high))},
            Lanes{_mm512_castpd_ps(_mm512_unpackhi_pd(low, high))});
}

// All lanes of one row, folded in the same order.
template <typename Op>
float folded(Lanes a, Op op) {
  const auto half = [&op](__m512 x, __m512 y) { return op(Lanes{x}, Lanes{y}).v; };
  __m512 v = half(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x0e));
  v = half(v, _mm512_shuffle_f32x4(v, v, 0x01));
  v = half(v, _mm512_permute_ps(v, 0x0e));
  v = half(v, _mm512_permute_ps(v, 0x01));
  return _mm512_cvtss_f32(v);
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
