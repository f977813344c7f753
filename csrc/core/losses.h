// The losses: one struct each, and the one list of them. Every backend, every name and every test follows from here.
//
// A loss compares a prediction s with a target y. As in activations.h, the text is written once over a value type V: a
// SIMD vector, or a torch tensor (for other dtypes and devices, and for derivatives of any order).
//   value(s, y, p)        the loss of one sample
//   derivative(s, y, p)   its derivative with respect to s
// The targets of mse are numbers; those of logistic, hinge and squared hinge are -1 and +1, and they depend on the
// margin z = y s alone. cross_entropy is a loss of a whole row of scores, its target the index of a class.
#pragma once

#include "activations.h"

namespace pyperc {

// What a loss reads at once: one score, or the row of all classes' scores.
enum class LossOver { Element, Row };

struct LossDefaults {
  static constexpr LossOver over = LossOver::Element;
  static constexpr Parameter parameters[MAX_PARAMETERS] = {};
};

struct Mse : LossDefaults {
  static constexpr const char* name = "mse";
  template <class V>
  static PYPERC_INLINE V value(V s, V y, const Parameters&) {
    return (s - y) * (s - y);
  }
  template <class V>
  static PYPERC_INLINE V derivative(V s, V y, const Parameters&) {
    return (s - y) * 2.0;
  }
};

// -log sigmoid(y s) = max(0, -z) + log(1 + e^-|z|): no term overflows. Both use e^-|z|, which the compiler shares.
struct Logistic : LossDefaults {
  static constexpr const char* name = "logistic";
  template <class V>
  static PYPERC_INLINE V decay(V z) {
    return exp(where(z > 0.0, zeros_like(z) - z, z));
  }
  template <class V>
  static PYPERC_INLINE V value(V s, V y, const Parameters&) {
    const V z = y * s;
    return where(z > 0.0, zeros_like(z), zeros_like(z) - z) + log1p(decay(z));
  }
  // -y sigmoid(-z)
  template <class V>
  static PYPERC_INLINE V derivative(V s, V y, const Parameters&) {
    const V z = y * s, e = decay(z);
    return (zeros_like(y) - y) * where(z > 0.0, e, zeros_like(z) + 1.0) / (e + 1.0);
  }
};

// max(0, threshold - y s): 1 is the support vector machine, 0 the perceptron. At the kink the sample counts, as the
// perceptron algorithm has it: y s <= 0 is an error.
struct Hinge : LossDefaults {
  static constexpr const char* name = "hinge";
  static constexpr Parameter parameters[MAX_PARAMETERS] = {{"threshold", 1.0}};
  template <class V>
  static PYPERC_INLINE V value(V s, V y, const Parameters& p) {
    const V z = y * s;
    return where(z > p.value[0], zeros_like(z), p.value[0] - z);
  }
  template <class V>
  static PYPERC_INLINE V derivative(V s, V y, const Parameters& p) {
    const V z = y * s;
    return where(z > p.value[0], zeros_like(z), zeros_like(y) - y);
  }
};

// max(0, threshold - y s)^2: smooth, the loss of scikit-learn's LinearSVC unless told otherwise.
struct SquaredHinge : LossDefaults {
  static constexpr const char* name = "squared_hinge";
  static constexpr Parameter parameters[MAX_PARAMETERS] = {{"threshold", 1.0}};
  template <class V>
  static PYPERC_INLINE V value(V s, V y, const Parameters& p) {
    const V z = y * s, gap = where(z > p.value[0], zeros_like(z), p.value[0] - z);
    return gap * gap;
  }
  template <class V>
  static PYPERC_INLINE V derivative(V s, V y, const Parameters& p) {
    const V z = y * s, gap = where(z > p.value[0], zeros_like(z), p.value[0] - z);
    return gap * y * -2.0;
  }
};

// log sum_c e^s_c - s_y. A backend supplies the row's maximum and sum; what is left of each class is here:
//   decay(s, highest)     e^(s - highest)
//   value(sum, margin)    sum: of the decays, at least 1; margin: highest - s_y
struct CrossEntropy : LossDefaults {
  static constexpr const char* name = "cross_entropy";
  static constexpr LossOver over = LossOver::Row;
  template <class V>
  static PYPERC_INLINE V decay(V s, V highest) {
    return exp(s - highest);
  }
  template <class V>
  static PYPERC_INLINE V value(V sum, V margin) {
    return log1p(sum - 1.0) + margin;
  }
};

#define PYPERC_LOSSES(X) \
  X(Mse)                 \
  X(Logistic)            \
  X(Hinge)               \
  X(SquaredHinge)        \
  X(CrossEntropy)

enum class Loss : int {
#define X(L) L,
  PYPERC_LOSSES(X)
#undef X
};

#define X(L) +1
inline constexpr int LOSS_COUNT = 0 PYPERC_LOSSES(X);
#undef X

}  // namespace pyperc
