#include <cstddef>

#include "cpu/slab.h"
#include "cpu/slab_copy.h"

namespace granet::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

void fill_zero(float* target, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) store_four(target + i, Four{});
  for (; i < count; ++i) target[i] = 0.0f;
}

// Every other float.
void copy_even(float* target, const float* source, int64_t count) {
  int64_t i = 0;
  for (; i + 5 <= count; i += 4) {  // the eighth float of a pair of vectors may be beyond the tensor
    const Four a = load_four<Element::kFloat32>(source + 2 * i);
    const Four b = load_four<Element::kFloat32>(source + 2 * i + 4);
    store_four(target + i, __builtin_shufflevector(a, b, 0, 2, 4, 6));
  }
  for (; i < count; ++i) target[i] = source[2 * i];
}

template <Element kElement>
void copy_run(const typename Stored<kElement>::Type* source, int64_t step, float* target, int64_t lanes,
              int64_t length) {
  if constexpr (kElement == Element::kFloat32) {
    if (lanes == 1 && step == 1) return copy_floats(target, source, length);
    if (lanes == 1 && step == 2) return copy_even(target, source, length);
  }
  for (int64_t i = 0; i < length; ++i) target[i * lanes] = Stored<kElement>::load(source[i * step]);
}

// Runs whose elements lie next to one another, of four images that are interleaved.
template <Element kElement>
void copy_four_images(const Run* runs, const typename Stored<kElement>::Type* source, int64_t step, float* target,
                      int64_t lanes) {
  const int64_t length = runs[0].length;
  const auto* s0 = source + runs[0].origin;
  const auto* s1 = source + runs[1].origin;
  const auto* s2 = source + runs[2].origin;
  const auto* s3 = source + runs[3].origin;
  float* t = target + runs[0].position;
  int64_t i = 0;
  if (step == 1) {
    for (; i + 4 <= length; i += 4, t += 4 * lanes) {
      Four a = load_four<kElement>(s0 + i), b = load_four<kElement>(s1 + i);
      Four c = load_four<kElement>(s2 + i), d = load_four<kElement>(s3 + i);
      transpose(a, b, c, d);
      store_four(t, a);
      store_four(t + lanes, b);
      store_four(t + 2 * lanes, c);
      store_four(t + 3 * lanes, d);
    }
  }
  for (; i < length; ++i, t += lanes) {
    const int64_t at = i * step;
    store_four(t, Four{Stored<kElement>::load(s0[at]), Stored<kElement>::load(s1[at]), Stored<kElement>::load(s2[at]),
                       Stored<kElement>::load(s3[at])});
  }
}

// The lines of a run. The processor's prefetchers lose the thread at the end of every short row: fetching those of the
// next channel while one is packed took 0.85 of the time of a layer at 56 x 56, 98 % sparse.
template <typename Value>
void fetch(const Run& run, const Value* source, int64_t step) {
  const auto* begin = reinterpret_cast<const char*>(source + run.origin);
  const auto* end = reinterpret_cast<const char*>(source + run.origin + run.length * step);
  for (const char* line = begin; line < end; line += kLineBytes) __builtin_prefetch(line);
}

// `ahead`: elements from this plane to the one that is packed next.
template <Element kElement>
void pack_plane(const Runs& runs, const typename Stored<kElement>::Type* source, int64_t ahead, float* slab) {
  const size_t count = runs.runs.size();
  size_t i = 0;
  if (runs.interleaved) {
    for (; i + 4 <= count; i += 4) {
      for (size_t lane = i; lane < i + 4; ++lane) fetch(runs.runs[lane], source + ahead, runs.step);
      copy_four_images<kElement>(&runs.runs[i], source, runs.step, slab, runs.lanes);
    }
  }
  for (; i < count; ++i) {
    const Run& run = runs.runs[i];
    fetch(run, source + ahead, runs.step);
    copy_run<kElement>(source + run.origin, runs.step, slab + run.position, runs.lanes, run.length);
  }
}

// Channels next to one another in memory, each into a plane.
template <Element kElement>
void pack_neighbours(const Run& run, const typename Stored<kElement>::Type* source, int64_t step, int64_t channels,
                     int64_t plane, float* target) {
  for_each_block(
      run.length, channels,
      [&](int64_t i, int64_t c) {
        transpose_block<kElement>(source + i * step + c, step, target + c * plane + i, plane);
      },
      [&](int64_t i, int64_t c) { target[c * plane + i] = Stored<kElement>::load(source[i * step + c]); });
}

// Of interleaved images: four channels next to one another in memory, into four planes.
template <Element kElement>
void pack_four_planes(const Runs& runs, const typename Stored<kElement>::Type* source, int64_t plane, float* slab) {
  for (const Run& run : runs.runs) {
    const auto* s = source + run.origin;
    float* t = slab + run.position;
    for (int64_t i = 0; i < run.length; ++i, s += runs.step, t += runs.lanes) {
      for (int64_t c = 0; c < 4; ++c) t[c * plane] = Stored<kElement>::load(s[c]);
    }
  }
}

void fill_gaps(const Phase& phase, int64_t channels, int64_t plane, float* slab) {
  for (int64_t c = 0; c < channels; ++c) {
    for (const Gap& gap : phase.runs.gaps) fill_zero(slab + c * plane + phase.offset + gap.position, gap.length);
  }
}

// Channels next to one another in memory.
template <Element kElement>
void pack_pixels(const Phase& phase, const ImageView& view, int64_t channels, int64_t plane, float* slab) {
  const auto* source = static_cast<const typename Stored<kElement>::Type*>(view.data);
  const Runs& runs = phase.runs;
  fill_gaps(phase, channels, plane, slab);
  slab += phase.offset;
  if (runs.lanes == 1) {
    for (const Run& run : runs.runs) {
      pack_neighbours<kElement>(run, source + run.origin, runs.step, channels, plane, slab + run.position);
    }
    return;
  }
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) pack_four_planes<kElement>(runs, source + c, plane, slab + c * plane);
  for (; c < channels; ++c) pack_plane<kElement>(runs, source + c, c + 1 < channels ? 1 : 0, slab + c * plane);
}

// Channel by channel: the phases of one share its cache lines.
template <Element kElement>
void pack_planes(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane,
                 float* slab) {
  const auto* source = static_cast<const typename Stored<kElement>::Type*>(view.data);
  for (int64_t c = 0; c < channels; ++c, source += view.channel_stride, slab += plane) {
    for (const Phase& phase : phases) {
      fill_gaps(phase, 1, plane, slab);
      pack_plane<kElement>(phase.runs, source, c + 1 < channels ? view.channel_stride : 0, slab + phase.offset);
    }
  }
}

template <Element kElement>
void pack_elements(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane,
                   float* slab) {
  if (view.channel_stride != 1) return pack_planes<kElement>(phases, view, channels, plane, slab);
  for (const Phase& phase : phases) pack_pixels<kElement>(phase, view, channels, plane, slab);
}

}  // namespace

void pack(const std::vector<Phase>& phases, const ImageView& view, int64_t channels, int64_t plane, float* slab) {
  const bool floating = view.element == Element::kFloat32;
  (floating ? pack_elements<Element::kFloat32> : pack_elements<Element::kBFloat16>)(phases, view, channels, plane,
                                                                                    slab);
}

}  // namespace granet::cpu
