// Dot products of pooled embeddings with given vectors, straight from stored rows: no pooled vector is written.
//
// out[b] = gradients[b] . pooled[b], where pooled[b] is the weighted sum, or the mean, of the rows of bag b. As
// value = scale * code + bias, a row-wise row needs only its codes: row . g = scale * (codes . g) + bias * sum(g).
//
// Everything is fp32, in one order for all CPUs: the products of a row fall into 16 lanes, lane i % 16 in the order of
// i; lanes are added in halves (j and j + 8, then j + 4, j + 2, j + 1); sum(g) likewise; rows are added in the order of
// the bag, each after its weight; a mean divides last. lowprec/ops/reference.py is the definition, bit for bit.
//
// The functions are pure, hold no state, and may be called from several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowprec {

// stored: rows of `dim` values that begin row_stride bytes apart; bits 2, 4 or 8 as in rowwise.h, 16 for plain halves.
// Bag b holds ids[offsets[b]] up to ids[offsets[b + 1]]; an empty bag gives 0. weights: one for each id, or null.
// gradients[num_bags][dim]. The ids must be rows and the offsets rise from 0 (see first_outside, first_wrong_offset).
void pooled_dots(const std::uint8_t* stored, std::int64_t row_stride, std::size_t dim, int bits,
                 const std::int64_t* ids, const std::int64_t* offsets, std::size_t num_bags, const float* weights,
                 bool mean, const float* gradients, float* out);

// The first position where offsets[num_bags + 1] do not rise from 0 to num_ids, or -1.
std::int64_t first_wrong_offset(const std::int64_t* offsets, std::size_t num_bags, std::int64_t num_ids);

}  // namespace lowprec
