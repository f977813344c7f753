// The optimisers: one struct each, and the one list of them. As in activations.h, the update is written once over a
// value type V. The formulas, names and defaults are those of torch.optim.
//   settings            what a group of parameters sets
//   states              the tensors that go with each parameter
//   live(s)             how many of them the settings need, the first ones of the list: LEAST or one more
//   coefficients(s, n)  of a parameter's n-th step, n from 1, where dw is to be multiplied by `clip` first
//   update(w, dw, ...)  one step of an element
#pragma once

#include <cstdint>

#include "platform.h"

namespace pyperc {

inline constexpr int MAX_SETTINGS = 8, MAX_STATES = 3, MAX_COEFFICIENTS = 8;

// `item`: which of the numbers, where torch holds several under one name.
struct Setting {
  const char* name = nullptr;
  double value = 0;
  int item = -1;
};

struct Coefficients {
  double value[MAX_COEFFICIENTS];
};

// v = momentum v + (1 - dampening) dw, v = dw in the first step; w -= lr v, or lr (dw + momentum v) after Nesterov.
struct Sgd {
  static constexpr const char* name = "sgd";
  enum { LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE };
  static constexpr Setting settings[MAX_SETTINGS] = {{"lr", 1e-3},          {"momentum", 0.0}, {"dampening", 0.0},
                                                     {"weight_decay", 0.0}, {"nesterov", 0.0}, {"maximize", 0.0}};
  static constexpr const char* states[MAX_STATES] = {"momentum_buffer"};

  static constexpr int LEAST = 0;

  static int live(const double* s) { return s[MOMENTUM] != 0 ? LEAST + 1 : LEAST; }
  static Coefficients coefficients(const double* s, int64_t n, double clip) {
    const double momentum = s[MOMENTUM];
    Coefficients c{};
    c.value[SIGN] = s[MAXIMIZE] != 0 ? -clip : clip;
    c.value[DECAY] = s[WEIGHT_DECAY];
    c.value[STEP] = s[LR];
    c.value[KEEP] = n == 1 ? 0.0 : momentum;
    c.value[TAKE] = n == 1 ? 1.0 : 1.0 - s[DAMPENING];
    c.value[AHEAD] = momentum;
    c.value[OWN] = s[NESTEROV] != 0 ? 1.0 : 0.0;
    return c;
  }
  template <int LIVE, class V>
  static PYPERC_INLINE V update(V w, V dw, V* state, const Coefficients& c) {
    V g = dw * c.value[SIGN] + w * c.value[DECAY];
    if constexpr (LIVE > LEAST) {
      state[0] = state[0] * c.value[KEEP] + g * c.value[TAKE];
      g = c.value[OWN] != 0 ? g + state[0] * c.value[AHEAD] : state[0];
    }
    return w - g * c.value[STEP];
  }
  enum { SIGN, DECAY, STEP, KEEP, TAKE, AHEAD, OWN };  // coefficients
};

// m = beta1 m + (1 - beta1) dw, v = beta2 v + (1 - beta2) dw^2; with the two freed of their bias towards zero,
// w -= lr m / (sqrt(v) + eps). amsgrad: of the largest v so far. Kingma and Ba, ICLR 2015; Reddi et al., ICLR 2018.
struct Adam {
  static constexpr const char* name = "adam";
  enum { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, AMSGRAD, MAXIMIZE, DECOUPLED };
  static constexpr Setting settings[MAX_SETTINGS] = {
      {"lr", 1e-3},          {"betas", 0.9, 0}, {"betas", 0.999, 1}, {"eps", 1e-8},
      {"weight_decay", 0.0}, {"amsgrad", 0.0},  {"maximize", 0.0},   {"decoupled_weight_decay", 0.0}};
  static constexpr const char* states[MAX_STATES] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  static constexpr int LEAST = 2;

  static int live(const double* s) { return s[AMSGRAD] != 0 ? LEAST + 1 : LEAST; }
  static Coefficients coefficients(const double* s, int64_t n, double clip) {
    const bool decoupled = s[DECOUPLED] != 0;
    Coefficients c{};
    c.value[SIGN] = s[MAXIMIZE] != 0 ? -clip : clip;
    c.value[DECAY] = decoupled ? 0.0 : s[WEIGHT_DECAY];
    c.value[SHRINK] = decoupled ? 1.0 - s[LR] * s[WEIGHT_DECAY] : 1.0;
    c.value[TAKE1] = 1.0 - s[BETA1];
    c.value[TAKE2] = 1.0 - s[BETA2];
    c.value[STEP] = s[LR] / (1.0 - __builtin_pow(s[BETA1], static_cast<double>(n)));
    c.value[ROOT] = 1.0 / __builtin_sqrt(1.0 - __builtin_pow(s[BETA2], static_cast<double>(n)));
    c.value[SMALL] = s[EPS];
    return c;
  }
  template <int LIVE, class V>
  static PYPERC_INLINE V update(V w, V dw, V* state, const Coefficients& c) {
    const V g = dw * c.value[SIGN] + w * c.value[DECAY];
    state[0] = state[0] + (g - state[0]) * c.value[TAKE1];
    state[1] = state[1] - state[1] * c.value[TAKE2] + g * g * c.value[TAKE2];
    V second = state[1];
    if constexpr (LIVE > LEAST) second = state[2] = where(state[2] - second > 0.0, state[2], second);
    // lr is what is divided: a unit that has died leaves denormal m behind, which processors divide slowly.
    return w * c.value[SHRINK] - state[0] * (V::of(c.value[STEP]) / (sqrt(second) * c.value[ROOT] + c.value[SMALL]));
  }
  enum { SIGN, DECAY, SHRINK, TAKE1, TAKE2, STEP, ROOT, SMALL };  // coefficients
};

// Adam whose weights decay beside the gradient, not through it. Loshchilov and Hutter, ICLR 2019.
struct AdamW : Adam {
  static constexpr const char* name = "adamw";
  static constexpr Setting settings[MAX_SETTINGS] = {
      {"lr", 1e-3},           {"betas", 0.9, 0}, {"betas", 0.999, 1}, {"eps", 1e-8},
      {"weight_decay", 1e-2}, {"amsgrad", 0.0},  {"maximize", 0.0},   {"decoupled_weight_decay", 1.0}};
};

#define PYPERC_OPTIMIZERS(X) \
  X(Sgd)                     \
  X(Adam)                    \
  X(AdamW)

enum class Optimizer : int {
#define X(O) O,
  PYPERC_OPTIMIZERS(X)
#undef X
};

#define X(O) +1
inline constexpr int OPTIMIZER_COUNT = 0 PYPERC_OPTIMIZERS(X);
#undef X

}  // namespace pyperc
