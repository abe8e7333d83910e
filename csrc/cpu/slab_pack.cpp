#include <algorithm>
#include <cstddef>
#include <utility>

#include "common/bfloat16.h"
#include "cpu/slab.h"
#include "cpu/slab_parts.h"

namespace granet::cpu {
namespace {

int64_t bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

const PackKernels& kernels_for(Element element) {
  return element == Element::kFloat32 ? slab_kernels().pack_float : slab_kernels().pack_bfloat16;
}

template <typename T>
int64_t count_of(const std::vector<T>& vector) {
  return static_cast<int64_t>(vector.size());
}

float to_float(float value) { return value; }
float to_float(uint16_t bits) { return bfloat16_to_float(bits); }

// One element at a time, whatever their steps. `Value`: a float, or the bits of a bfloat16.
template <typename Value>
void pack_elements(const Runs& runs, const void* source, float* plane) {
  const auto* elements = static_cast<const Value*>(source);
  for (const Gap& gap : runs.gaps) std::fill_n(plane + gap.position, gap.length, 0.0f);
  for (const Run& run : runs.runs) {
    for (int64_t i = 0; i < run.length; ++i) {
      plane[run.position + i * runs.lanes] = to_float(elements[run.origin + i * runs.step]);
    }
  }
}

// The vectors of a plane of one image. Elements of several rows are one part where the rows adjoin in memory.
std::vector<PackedVector> vectors_of(const Runs& runs, int64_t width) {
  std::vector<PackedVector> parts;
  parts.reserve(static_cast<size_t>(runs.floats / width));
  auto run = runs.runs.begin();
  const int64_t last = runs.runs.empty() ? 0 : runs.runs.back().origin + (runs.runs.back().length - 1) * runs.step;
  for (int64_t start = 0; start < runs.floats; start += width) {
    PackedVector part{};
    int64_t behind = 0;  // the element that would go on with the part
    for (; run != runs.runs.end() && run->position < start + width; ++run) {
      const int64_t begin = std::max<int64_t>(0, start - run->position);
      const int64_t end = std::min(run->length, start + width - run->position);
      const int64_t origin = run->origin + begin * runs.step;
      if (part.lanes != 0 && origin != behind) parts.push_back(std::exchange(part, {}));
      if (part.lanes == 0) {
        part.origin = origin;
        part.is_whole = origin + width * runs.step - 1 <= last;
      }
      const uint32_t lanes = ((1u << (end - begin)) - 1) << (run->position + begin - start);
      part.lanes = static_cast<uint16_t>(part.lanes | lanes);
      behind = origin + (end - begin) * runs.step;
      if (end < run->length) break;  // goes on in the next vector
    }
    part.is_last = true;
    parts.push_back(part);
  }
  return parts;
}

// How the planes of a phase are packed: by a kernel where they are as one wants them.
class PlanePacker {
 public:
  PlanePacker(const Phase& phase, Element element) : phase_(phase), element_(element) {
    const Runs& runs = phase.runs;
    if (runs.step != 1 && runs.step != 2) return;
    const int64_t width = slab_kernels().lanes;
    if (runs.lanes == 1) vectors_ = vectors_of(runs, width);
    packs_images_ = runs.interleaved && runs.lanes == width;
  }

  void pack(const void* source, int64_t ahead, float* slab) const {
    const auto& [runs, offset] = phase_;
    float* plane = slab + offset;
    if (!vectors_.empty()) {
      kernels_for(element_).rows({vectors_.data(), count_of(vectors_), runs.step, source, ahead, plane});
    } else if (packs_images_) {
      kernels_for(element_).images({runs.runs.data(), count_of(runs.runs), runs.gaps.data(), count_of(runs.gaps),
                                    runs.step, source, ahead, plane});
    } else {
      (element_ == Element::kFloat32 ? pack_elements<float> : pack_elements<uint16_t>)(runs, source, plane);
    }
  }

 private:
  const Phase& phase_;
  Element element_;
  std::vector<PackedVector> vectors_;
  bool packs_images_ = false;
};

// Channels next to one another in memory.
void pack_pixels(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane,
                 float* slab) {
  for (const auto& [runs, offset] : phases) {
    const std::vector<PixelVector> vectors = pixel_vectors(runs, 0, runs.floats);
    kernels_for(view.element).pixels({vectors.data(), count_of(vectors), channels, view.data, slab + offset, plane});
  }
}

// Channel by channel: the phases of one share its cache lines.
void pack_planes(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane,
                 float* slab) {
  std::vector<PlanePacker> packers;
  for (const Phase& phase : phases) packers.emplace_back(phase, view.element);
  const auto* source = static_cast<const std::byte*>(view.data);
  for (int64_t c = 0; c < channels; ++c, source += view.channel_stride * bytes_of(view.element), slab += plane) {
    const int64_t ahead = c + 1 < channels ? view.channel_stride : 0;
    for (const PlanePacker& packer : packers) packer.pack(source, ahead, slab);
  }
}

}  // namespace

void pack(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane, float* slab) {
  (view.channel_stride == 1 && channels > 1 ? pack_pixels : pack_planes)(phases, view, channels, plane, slab);
}

}  // namespace granet::cpu
