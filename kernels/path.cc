// The kernels of one CPU path. CMakeLists.txt compiles this file once for each, with its flags and LOWPREC_PATH set.
#include "changes.h"
#include "ids.h"
#include "kernels.h"
#include "score.h"

namespace lowprec::LOWPREC_PATH {
namespace {

std::int64_t quantize_any(const Rows& rows, const std::int64_t* ids, std::size_t begin, std::size_t end, int bits,
                          RangeKind kind, float* scratch, std::uint8_t* out) {
  const auto run = bits == 16 ? quantize<16> : bits == 8 ? quantize<8> : bits == 4 ? quantize<4> : quantize<2>;
  return run(rows, ids, begin, end, kind, scratch, out);
}

std::int64_t row_ranges_any(const Rows& rows, const std::int64_t* ids, std::size_t begin, std::size_t end, int bits,
                            RangeKind kind, float* scratch, RowRange* out) {
  const auto run = bits == 8 ? row_ranges<8> : bits == 4 ? row_ranges<4> : row_ranges<2>;
  return run(rows, ids, begin, end, kind, scratch, out);
}

void pooled_any(const Rows& rows, const Bags& bags, std::size_t begin, std::size_t end, int bits,
                const RowRange* ranges, float* out) {
  const auto run = bits == 16 ? pooled<16> : bits == 8 ? pooled<8> : bits == 4 ? pooled<4> : pooled<2>;
  run(rows, bags, begin, end, ranges, out);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{quantize_any, row_ranges_any, pooled_any, scores, row_changes, scores_of_changes,
                      first_outside, first_falling};

}  // namespace lowprec::LOWPREC_PATH
