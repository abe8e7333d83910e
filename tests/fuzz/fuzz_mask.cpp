// The mask codec and zeroing against their definitions, one bit at a time.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include <fuzzer/FuzzedDataProvider.h>

#include "common/bits.h"
#include "cpu/mask.h"

namespace {

using namespace granet;
using Bytes = std::vector<uint8_t>;

void require(bool holds) {
  if (!holds) std::abort();
}

void check_codec(const Bytes& mask) {
  const auto numel = static_cast<int64_t>(mask.size());
  Bytes packed(static_cast<size_t>(mask_bytes(numel)), uint8_t{0xaa});
  Bytes unpacked(mask.size(), uint8_t{0xaa});
  cpu::pack_mask(mask.data(), numel, packed.data());
  cpu::unpack_mask(packed.data(), numel, unpacked.data());
  int64_t active = 0;
  for (size_t i = 0; i < mask.size(); ++i) {
    const uint8_t bit = mask[i] != 0;
    require((packed[i / 8] >> (i % 8) & 1) == bit && unpacked[i] == bit);
    active += bit;
  }
  require(cpu::count_active(packed.data(), mask_bytes(numel)) == active);
}

// `packed` and the bytes of the weights are arbitrary; bits past the last weight have no meaning.
void check_zeroing(const Bytes& weights, const Bytes& packed, size_t item_size) {
  Bytes zeroed = weights;
  const size_t numel = weights.size() / item_size;
  require(cpu::zero_inactive(zeroed.data(), item_size, packed.data(), static_cast<int64_t>(numel)));
  for (size_t i = 0; i < numel * item_size; ++i) {
    const bool keep = is_active(packed[i / item_size / 8], static_cast<int64_t>(i / item_size));
    require(zeroed[i] == (keep ? weights[i] : 0));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  const size_t item_size = size_t{1} << data.ConsumeIntegralInRange(0, 3);
  const auto numel = data.ConsumeIntegralInRange<size_t>(0, 700);
  Bytes packed = data.ConsumeBytes<uint8_t>(static_cast<size_t>(mask_bytes(static_cast<int64_t>(numel))));
  packed.resize(static_cast<size_t>(mask_bytes(static_cast<int64_t>(numel))));
  Bytes weights = data.ConsumeRemainingBytes<uint8_t>();
  check_codec(weights);
  weights.resize(numel * item_size, uint8_t{0x7f});
  check_zeroing(weights, packed, item_size);
  return 0;
}
