// What the kernels of the losses and of the linear models are given: plain structs; no torch, no ownership.
#pragma once

#include <cstdint>

#include "losses.h"

namespace pyperc {

// Value and derivative of a loss over a block of scores, in one pass. Rows lie ld_... apart.
template <class T>
struct LossBlock {
  int64_t rows, columns;
  const T* s;
  int64_t ld_s;
  const T* y;  // [rows, columns]: LossOver::Element; or LossOver::Row with probabilities in the place of classes
  int64_t ld_y;
  const int64_t* target;  // LossOver::Row: [rows], each in [0, columns), or ignore_index; null: y
  const T* weight;        // [rows, columns] for LossOver::Element, [rows] for LossOver::Row; null: 1
  int64_t ld_weight;
  Parameters parameters;
  T* value;  // weight * loss, [rows, columns] or [rows]; null where not wanted
  int64_t ld_value;
  T* ds;  // weight * scale * derivative, [rows, columns], which may be s; null where not wanted
  int64_t ld_ds;
  T scale;
  double sum;                 // grows by the sum of weight * loss
  const T* row_weight;        // LossOver::Element: [rows], instead of `weight`; null: 1
  const T* class_weight;      // LossOver::Row: [columns]; null: 1
  double smoothing;           // LossOver::Row: the share of each target that is spread evenly over the classes
  int64_t ignore_index = -1;  // LossOver::Row: rows of this target count for nothing
};
template <class T>
using LossFunction = void (*)(LossBlock<T>&);

// The loss of a linear model over some rows and its gradient, each row read from memory once:
//   s = x w^T + b,  value += sum of weight * loss(s, y),  dw += ds^T x,  db += column sums of ds.
template <class T>
struct LinearRows {
  int64_t rows, columns, classes;
  const T* x;
  int64_t ld;
  const T* w;             // [classes, columns]
  const T* b;             // [classes], or null
  const T* y;             // [rows]: targets of an element-wise loss with classes = 1; else null
  const int64_t* target;  // [rows]: classes of cross_entropy, or of the element-wise loss one against the rest
  const T* weight;        // [rows], or null
  const T* positive;      // [classes], or null: a further weight of a class's own samples, one against the rest
  Loss loss;
  Parameters parameters;
  T* workspace;  // linear_workspace(classes) elements
  T* dw;         // [classes, columns]
  T* db;         // [classes]
  double value;

  static constexpr int ROWS = 8;  // that go together; of 784 pixels in float32 they fill half of a first-level cache
  static constexpr int64_t workspace_size(int64_t classes) { return 4 * ROWS * (classes < 16 ? 16 : classes); }
};

// Pairs of columns whose products are further features, sorted by the first column: group g holds the pairs
// (first[g], second[k]), k from begin[g] to begin[g + 1]. A group whose first is zero in a row costs nothing there.
struct Products {
  int64_t groups = 0, count = 0;
  const int32_t *first = nullptr, *begin = nullptr, *second = nullptr;
};

// The perceptron algorithm for one class over rows, in order: where y s <= 0, w += eta y x and b += eta y, with
// y = +1 where target = positive, -1 elsewhere. Weights: columns of x first, then the products'.
template <class T>
struct PerceptronRows {
  int64_t begin, end, columns;
  const T* x;
  int64_t ld;
  const int64_t* order;  // row numbers, or null: 0, 1, 2, ...
  const int64_t* target;
  int64_t positive;
  const T* weight;  // of the rows, or null; a row of weight zero is passed over
  T own;            // a further weight of the rows with y = +1
  Products products;
  T eta;
  T* w;
  T* b;            // null: none
  const T* first;  // the weights and the bias that the epoch began with; read where scores is not null
  T first_b;
  T* scores;  // [rows], ld_scores apart: each row's s with those; or null
  int64_t ld_scores;
  T* sum;         // of step * (what was added to w), for the average of w over all steps; or null
  T* sum_b;       // the same for b
  int64_t step;   // grows by one a row
  int64_t count;  // of changes, grows
};

// Dual coordinate descent for  |w|^2 / 2 + (b - b_0)^2 / (2 bias) + sum_i upper_i max(0, 1 - y_i (w . x_i + b))
// (Hsieh, Chang, Lin, Keerthi and Sundararajan, ICML 2008, with their shrinking):
//   w = sum alpha_i y_i x_i,  b = b_0 + bias sum alpha_i y_i,  0 <= alpha_i <= upper_i.
template <class T>
struct DualDescent {
  int64_t rows, columns;
  const T* x;
  int64_t ld;
  const T* y;
  const T* upper;
  double bias;  // 0: b stays
  T* w;         // in and out, with b and alpha: they agree as above
  double b;
  double* alpha;
  int32_t* index;  // [rows], workspace
  T* norm;         // [rows], workspace
  int64_t max_epochs;
  double tolerance;  // on the violation of the optimality conditions
  uint64_t seed;
  int64_t epochs;    // taken
  double violation;  // in the last epoch; below the tolerance where it converged
};

}  // namespace pyperc
