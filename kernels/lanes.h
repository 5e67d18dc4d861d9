// Sixteen floats and what can be done with them, on the CPU path that this file is compiled for (see path.cc).
//
// Every path has the same sixteen lanes and the same arithmetic, operation by operation, so that no result depends on
// the CPU. Everything is in an unnamed namespace: a function compiled for one path must never be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace lowprec::LOWPREC_PATH {
namespace {

constexpr std::size_t kLanes = 16;

}  // namespace
}  // namespace lowprec::LOWPREC_PATH

// Beside the lanes, each says how many of them its registers hold: kScoredLanes of columns, with five sums for each,
// while the rows of a bag go by; kSearched ranges of a row that are tried side by side, with three sums for each.
#if defined(LOWPREC_AVX512)
#include "lanes_avx512.h"
#elif defined(LOWPREC_AVX2)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

namespace lowprec::LOWPREC_PATH {
namespace {

struct Add {
  Lanes operator()(Lanes a, Lanes b) const { return a + b; }
};
struct Min {
  Lanes operator()(Lanes a, Lanes b) const { return min(a, b); }
};
struct Max {
  Lanes operator()(Lanes a, Lanes b) const { return max(a, b); }
};

// The lanes from n on are zero.
Lanes load_first(const float* in, std::size_t n) {
  if (n >= kLanes) return load(in);
  return load_part(in, n);
}

void store_first(float* out, Lanes a, std::size_t n) {
  if (n >= kLanes) return store(out, a);
  store_part(out, a, n);
}

// Lane i of the result is row[i] folded: lanes i and i + 8, then those 4, 2 and 1 apart.
template <typename Op>
Lanes folded_each(const Lanes (&row)[kLanes], Op op) {
  const auto four = [&](std::size_t k) { return in_fours(row[k], row[k + 4], row[k + 8], row[k + 12], op); };
  return folded_fours({four(0), four(1), four(2), four(3)}, op);
}

}  // namespace
}  // namespace lowprec::LOWPREC_PATH
