// lowprec._native: checks arguments and releases the GIL; the arithmetic is in the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "pooled_dots.h"
#include "rowwise.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Rows may begin any distance apart; the values of a row are contiguous (checked by require_rows).
template <typename T>
using Rows = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = Vector<const std::int64_t>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void require_bits(int bits) {
  require(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8; got " + std::to_string(bits));
}

template <typename T>
void require_rows(const Rows<T>& rows, const char* name) {
  require(rows.shape(1) > 0, std::string(name) + " must have at least one column");
  require(rows.shape(0) == 0 || rows.shape(1) == 1 || rows.stride(1) == 1,
          std::string(name) + " must be contiguous along a row");
}

template <typename T>
void require_shape(const Matrix<T>& array, std::size_t num_rows, std::size_t num_columns, const char* name) {
  require(array.shape(0) == num_rows && array.shape(1) == num_columns,
          std::string(name) + " must be [" + std::to_string(num_rows) + ", " + std::to_string(num_columns) +
              "]; got [" + std::to_string(array.shape(0)) + ", " + std::to_string(array.shape(1)) + "]");
}

std::int64_t quantize_rows(Rows<const float> rows, int bits, Matrix<std::uint8_t> out, int num_threads) {
  require_bits(bits);
  require_rows(rows, "rows");
  require_shape(out, rows.shape(0), lowprec::row_bytes(rows.shape(1), bits), "out");
  nb::gil_scoped_release release;
  return lowprec::quantize_rows(rows.data(), rows.stride(0), rows.shape(0), rows.shape(1), bits, out.data(),
                                num_threads);
}

void require_ids(const Ids& ids, std::size_t num_rows) {
  const std::int64_t outside = lowprec::first_outside(ids.data(), ids.shape(0), static_cast<std::int64_t>(num_rows));
  if (outside >= 0) {
    throw std::out_of_range("ids[" + std::to_string(outside) + "] is " + std::to_string(ids.data()[outside]) +
                            ", outside the " + std::to_string(num_rows) + " rows of the table");
  }
}

std::int64_t quantize_gathered(Rows<const float> table, Ids ids, int bits, Matrix<std::uint8_t> out, int num_threads) {
  require_bits(bits);
  require_rows(table, "table");
  require_shape(out, ids.shape(0), lowprec::row_bytes(table.shape(1), bits), "out");
  nb::gil_scoped_release release;
  require_ids(ids, table.shape(0));
  return lowprec::quantize_gathered(table.data(), table.stride(0), ids.data(), ids.shape(0), table.shape(1), bits,
                                    out.data(), num_threads);
}

void dequantize_rows(Rows<const std::uint8_t> codes, int bits, Matrix<float> out, int num_threads) {
  require_bits(bits);
  require_rows(codes, "codes");
  const std::size_t dim = out.shape(1);
  require(dim > 0 && codes.shape(0) == out.shape(0) && codes.shape(1) == lowprec::row_bytes(dim, bits),
          "codes must be [" + std::to_string(out.shape(0)) + ", " + std::to_string(lowprec::row_bytes(dim, bits)) +
              "] for out [" + std::to_string(out.shape(0)) + ", " + std::to_string(dim) + "]; got [" +
              std::to_string(codes.shape(0)) + ", " + std::to_string(codes.shape(1)) + "]");
  nb::gil_scoped_release release;
  lowprec::dequantize_rows(codes.data(), codes.stride(0), codes.shape(0), dim, bits, out.data(), num_threads);
}

void pooled_dots(Rows<const std::uint8_t> stored, int bits, Ids ids, Ids offsets, Matrix<const float> gradients,
                 Vector<float> out, bool mean, Vector<const float> weights) {
  if (bits != 16) require_bits(bits);
  require_rows(stored, "stored");
  const std::size_t num_bags = out.shape(0), dim = gradients.shape(1);
  require(dim > 0, "gradients must have at least one column");
  require_shape(gradients, num_bags, dim, "gradients");
  const std::size_t num_bytes = bits == 16 ? 2 * dim : lowprec::row_bytes(dim, bits);
  require(stored.shape(1) == num_bytes, "stored rows of dim " + std::to_string(dim) + " must have " +
                                            std::to_string(num_bytes) + " bytes; got " +
                                            std::to_string(stored.shape(1)));
  require(offsets.shape(0) == num_bags + 1, "offsets must be one more than the " + std::to_string(num_bags) + " bags");
  const float* weight = weights.is_valid() ? weights.data() : nullptr;
  require(weight == nullptr || weights.shape(0) == ids.shape(0), "every id needs one weight");
  require(weight == nullptr || !mean, "weights need sum pooling");
  nb::gil_scoped_release release;
  const std::int64_t wrong =
      lowprec::first_wrong_offset(offsets.data(), num_bags, static_cast<std::int64_t>(ids.shape(0)));
  require(wrong < 0, "offsets must rise from 0 to the " + std::to_string(ids.shape(0)) + " ids; offsets[" +
                         std::to_string(wrong) + "] is " + std::to_string(wrong < 0 ? 0 : offsets.data()[wrong]));
  require_ids(ids, stored.shape(0));
  lowprec::pooled_dots(stored.data(), stored.stride(0), dim, bits, ids.data(), offsets.data(), num_bags, weight, mean,
                       gradients.data(), out.data());
}

}  // namespace

// noconvert: nanobind would else copy an argument of another dtype or layout, and what is written to the copy is lost.
NB_MODULE(_native, m) {
  m.doc() = "Compiled kernels of lowprec; lowprec.ops is their public face.";
  m.attr("SOURCE_DIGEST") = LOWPREC_SOURCE_DIGEST;
  m.def("quantize_rows", &quantize_rows, nb::arg("rows").noconvert(), "bits"_a, nb::arg("out").noconvert(),
        "num_threads"_a = 1,
        "Quantizes float32[n, dim] into out uint8[n, row_bytes]; returns the first row with NaN or Inf, or -1.");
  m.def("quantize_gathered", &quantize_gathered, nb::arg("table").noconvert(), nb::arg("ids").noconvert(), "bits"_a,
        nb::arg("out").noconvert(), "num_threads"_a = 1,
        "Quantizes table[ids] into out uint8[len(ids), row_bytes]; returns the first bad position, or -1.");
  m.def("dequantize_rows", &dequantize_rows, nb::arg("codes").noconvert(), "bits"_a, nb::arg("out").noconvert(),
        "num_threads"_a = 1, "Restores uint8[n, row_bytes] to out float32[n, dim].");
  m.def("pooled_dots", &pooled_dots, nb::arg("stored").noconvert(), "bits"_a, nb::arg("ids").noconvert(),
        nb::arg("offsets").noconvert(), nb::arg("gradients").noconvert(), nb::arg("out").noconvert(),
        nb::arg("mean").noconvert(), nb::arg("weights").noconvert().none() = nb::none(),
        "Writes gradients[b] . pooled[b] to out float32[num_bags], over stored uint8[n, row_bytes] (bits 16: halves).");
}
