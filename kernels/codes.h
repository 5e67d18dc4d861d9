// Sixteen codes to the bytes that hold them, low-order bits first.
#pragma once

#include "lanes.h"

namespace lowprec::LOWPREC_PATH {
namespace {

#if defined(LOWPREC_AVX512) || defined(LOWPREC_AVX2)

template <int kBits>
void store_codes(std::uint8_t* out, Lanes codes) {
  __m128i packed = bytes(codes);
  if constexpr (kBits == 4) {
    // Pairs of codes become low + 16 * high in 16 bits.
    packed = _mm_maddubs_epi16(packed, _mm_set1_epi16(0x1001));
    packed = _mm_packus_epi16(packed, packed);
  } else if constexpr (kBits == 2) {
    // The same in two steps: four codes in 32 bits.
    packed = _mm_maddubs_epi16(packed, _mm_set1_epi16(0x0401));
    packed = _mm_madd_epi16(packed, _mm_set1_epi32(0x00100001));
    packed = _mm_packs_epi32(packed, packed);
    packed = _mm_packus_epi16(packed, packed);
  }
  std::memcpy(out, &packed, kLanes * kBits / 8);
}

#else

template <int kBits>
void store_codes(std::uint8_t* out, Lanes codes) {
  constexpr std::size_t kPerByte = 8 / kBits;
  const Bytes single = bytes(codes);
  for (std::size_t i = 0; i < kLanes / kPerByte; ++i) {
    unsigned byte = 0;
    for (std::size_t k = 0; k < kPerByte; ++k) byte |= static_cast<unsigned>(single.v[i * kPerByte + k]) << (k * kBits);
    out[i] = static_cast<std::uint8_t>(byte);
  }
}

#endif

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
