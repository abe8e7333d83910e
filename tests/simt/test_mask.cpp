// Tests of csrc/cuda/{table,mask,cast}.h, run on the host. Buffers have exactly the sizes that the contracts name, so
// that a sanitizer sees the first byte read or written beyond them.
#include "cuda/mask.h"

#include <algorithm>
#include <array>
#include <bit>

#include "cuda/cast.h"
#include "device.h"
#include "sanitizers.h"

namespace {

using namespace granet;

constexpr std::array<int64_t, 14> kSizes = {0, 1, 7, 8, 9, 127, 128, 129, 1023, 1024, 1025, 8192, 8200, 20'000};

void expect_success(cudaError_t error, const std::string& what) { expect(error == cudaSuccess, what, -1); }

// More rows than one launch carries, and lengths on either side of a chunk.
void test_table() {
  constexpr int64_t kChunk = 100;
  cuda::TableRows rows(/*lists=*/2, /*further=*/1, kChunk);
  std::vector<int64_t> numels;
  for (int64_t i = 0; i < 250; ++i) numels.push_back(i % 7 == 0 ? 0 : i * 3);
  for (const int64_t numel : numels) {
    rows.begin_row(numel);
    rows.add(&rows);
    rows.add(nullptr);
    rows.add(-numel);
  }
  WrittenTable written(rows);
  const cuda::Table table = written.get();
  expect(std::equal(rows.words().begin(), rows.words().end(), table.rows), "a table's rows", 250);
  int64_t chunk = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    expect(table.rows[static_cast<int64_t>(i) * table.width + cuda::kFirstChunk] == chunk, "first chunk", numels[i]);
    for (int64_t last = chunk + ceil_div(numels[i], kChunk); chunk < last; ++chunk) {
      expect(table.owners[chunk] == static_cast<int32_t>(i), "a chunk's owner", numels[i]);
    }
  }
  expect(chunk == table.chunks, "chunks", table.chunks);
  expect(cuda::launch_write_table(cuda::TableRows(1000, 0, 1), nullptr, nullptr) == cudaErrorInvalidValue,
         "rows that no launch can carry", 1000);
}

void test_pack_and_unpack(int64_t numel, size_t offset) {
  const Bytes mask = random_mask(numel, 0.4), expected = pack(mask);
  Bytes at_offset(offset + mask.size());
  std::copy(mask.begin(), mask.end(), at_offset.begin() + static_cast<int64_t>(offset));
  Bytes packed(expected.size(), 0xaa);
  expect_success(cuda::launch_pack_mask(at_offset.data() + offset, numel, packed.data(), nullptr), "pack");
  expect(packed == expected, "pack", numel);
  Bytes unpacked(offset + mask.size());
  expect_success(cuda::launch_unpack_mask(packed.data(), numel, unpacked.data() + offset, nullptr), "unpack");
  expect(unpacked == at_offset, "unpack", numel);
}

void test_count() {
  std::vector<Bytes> masks;
  std::vector<unsigned long long> expected;
  for (const int64_t bytes : {0, 16, 48, 16'384, 16'400, 40'000, 17}) {
    masks.push_back(random_mask(bytes, 0.5));
    unsigned long long ones = 0;
    for (uint8_t& byte : masks.back()) {
      byte = static_cast<uint8_t>(byte * 0xb5);
      ones += static_cast<unsigned>(std::popcount(byte));
    }
    expected.push_back(ones);
  }
  cuda::TableRows rows(/*lists=*/1, /*further=*/0, cuda::kCountChunk);
  for (const Bytes& mask : masks) {
    rows.begin_row(static_cast<int64_t>(mask.size()));
    rows.add(mask.data());
  }
  WrittenTable table(rows);
  std::vector<unsigned long long> counts(masks.size());
  expect_success(cuda::launch_count_active(table.get(), counts.data(), nullptr), "count");
  expect(counts == expected, "count", 0);
}

template <typename Bits>
void test_zero(size_t offset, double active) {
  std::vector<std::vector<Bits>> tensors;
  std::vector<Bytes> masks, packed;
  cuda::TableRows rows(/*lists=*/2, /*further=*/0, cuda::kZeroChunk);
  for (const int64_t numel : kSizes) {
    tensors.emplace_back(offset + size(numel), static_cast<Bits>(-1));
    masks.push_back(random_mask(numel, active));
    packed.push_back(pack(masks.back()));
    rows.begin_row(numel);
    rows.add(tensors.back().data() + offset);
    rows.add(packed.back().data());
  }
  WrittenTable table(rows);
  expect_success(cuda::launch_zero_inactive(table.get(), sizeof(Bits), nullptr), "zero");
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (size_t i = 0; i < masks[t].size(); ++i) {
      const Bits wanted = masks[t][i] != 0 ? static_cast<Bits>(-1) : Bits{0};
      if (tensors[t][offset + i] != wanted) return expect(false, "zero_inactive", kSizes[t]);
    }
    for (size_t i = 0; i < offset; ++i) expect(tensors[t][i] == static_cast<Bits>(-1), "before the tensor", kSizes[t]);
  }
}

// fp32 to fp64 is exact, so any difference is of place.
void test_cast(int64_t numel, size_t offset, bool keep_all) {
  const std::vector<float> source = random_numbers<float>(numel);
  const Bytes mask = random_mask(numel, 0.3), packed = pack(mask);
  std::vector<double> target(offset + size(numel), -1);
  const cuda::MaskCast cast = {.source = source.data(),
                               .source_dtype = Dtype::kFloat32,
                               .order = {},
                               .mask = packed.data(),
                               .keep_all = &keep_all,
                               .target = target.data() + offset,
                               .target_dtype = Dtype::kFloat64,
                               .numel = numel};
  expect_success(cuda::launch_mask_cast(cast, nullptr), "cast");
  for (size_t i = 0; i < source.size(); ++i) {
    const double wanted = keep_all || mask[i] != 0 ? source[i] : 0.0;
    if (std::bit_cast<uint64_t>(target[offset + i]) != std::bit_cast<uint64_t>(wanted)) {
      return expect(false, "mask_cast", numel);
    }
  }
}

// A matrix read across its rows.
void test_cast_in_another_order() {
  constexpr int64_t kRows = 37, kColumns = 61;
  const std::vector<double> source = random_numbers<double>(kRows * kColumns);
  const Bytes mask = random_mask(kRows * kColumns, 0.6), packed = pack(mask);
  std::vector<double> target(source.size(), -1);
  cuda::SourceOrder order{.dims = 2, .size = {kRows, kColumns}, .stride = {kColumns, 1}};
  const cuda::MaskCast cast = {.source = source.data(),
                               .source_dtype = Dtype::kFloat64,
                               .order = order,
                               .mask = packed.data(),
                               .keep_all = nullptr,
                               .target = target.data(),
                               .target_dtype = Dtype::kFloat64,
                               .numel = kRows * kColumns};
  expect_success(cuda::launch_mask_cast(cast, nullptr), "cast across");
  for (size_t i = 0; i < target.size(); ++i) {
    const double wanted = mask[i] != 0 ? source[i % kRows * kColumns + i / kRows] : 0.0;
    if (target[i] != wanted) return expect(false, "mask_cast of another order", static_cast<int64_t>(i));
  }
}

}  // namespace

int main() {
  test_table();
  test_count();
  for (const int64_t numel : kSizes) {
    if (kThreadSanitizer && numel != 8200) continue;  // a thread of the device costs a millisecond
    for (const size_t offset : {0, 1}) {
      test_pack_and_unpack(numel, offset);
      test_cast(numel, offset, /*keep_all=*/false);
    }
    test_cast(numel, 0, /*keep_all=*/true);
  }
  test_cast_in_another_order();
  for (const double active : {0.0, 0.05, 0.9, 1.0}) {
    if (kThreadSanitizer && active != 0.9) continue;
    for (const size_t offset : {0, 1}) {
      test_zero<uint16_t>(offset, active);
      test_zero<uint32_t>(offset, active);
      test_zero<uint64_t>(offset, active);
    }
  }
  expect(cuda::launch_zero_inactive({}, 3, nullptr) == cudaErrorInvalidValue, "elements of three bytes", 0);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
