// Some rows of a gated linear unit, see glu.h.
#pragma once
#include "activations.h"
#include "glu.h"

namespace seqconv::SEQCONV_ISA {

// op(h, load, store) for the channels from 0 on, a vector of them at a time and then one by one:
// load(p) reads p[0], p[1], ... where p is a pointer to channel h, store(p, value) writes them.
template <class Op>
SEQCONV_INLINE void for_channels(int64_t channels, const Op& op) {
  int64_t h = 0;
  for (; h + kLanes<float> <= channels; h += kLanes<float>)
    op(
        h, [](const float* p) { return load_vector(p); },
        [](float* p, Vec<float> value) { store_vector(p, value); });
  for (; h < channels; ++h)
    op(
        h, [](const float* p) { return splat(*p); },
        [](float* p, Vec<float> value) { *p = value[0]; });
}

inline void glu_forward_unit(const GluProblem& p, int64_t begin, int64_t end) {
  const int64_t channels = p.channels;
  for (int64_t n = begin; n < end; ++n) {
    const float* z = p.z + 2 * n * channels;
    float* y = p.y + n * channels;
    for_channels(channels, [&](int64_t h, const auto& load, const auto& store) {
      Vec<float> value = load(z + h), gate = load(z + channels + h);
      if (p.bias) {
        value += load(p.bias + h);
        gate += load(p.bias + channels + h);
      }
      store(y + h, value * sigmoid(gate));
    });
  }
}

// sums: 2 channels floats, this unit's part of dbias, which is zero at first.
inline void glu_backward_unit(const GluProblem& p, int64_t begin, int64_t end, float* sums) {
  const int64_t channels = p.channels;
  for (int64_t n = begin; n < end; ++n) {
    const float *z = p.z + 2 * n * channels, *dy = p.dy + n * p.dy_stride;
    float* dz = p.dz + 2 * n * channels;
    for_channels(channels, [&](int64_t h, const auto& load, const auto& store) {
      Vec<float> value = load(z + h), gate = load(z + channels + h);
      if (p.bias) {
        value += load(p.bias + h);
        gate += load(p.bias + channels + h);
      }
      const Vec<float> open = sigmoid(gate), dvalue = load(dy + h) * open;
      const Vec<float> dgate = dvalue * value * (1.0f - open);
      store(dz + h, dvalue);
      store(dz + channels + h, dgate);
      if (sums) {
        store(sums + h, load(sums + h) + dvalue);
        store(sums + channels + h, load(sums + channels + h) + dgate);
      }
    });
  }
}

}  // namespace seqconv::SEQCONV_ISA
