// exp, expm1, log1p, tanh, sigmoid and erf, written once over a vector type V, which is float or double or a vector of
// them. Included inside an ISA's own anonymous namespace, after simd.inl: it includes nothing, opens no namespace,
// calls no libm, and defines templates only.
//
// Everything is branch-free, without tables, and with one division at most. x = n ln 2 + r is reduced by adding a large
// number whose last mantissa bit weighs 1, which leaves n + bias in the low bits of the sum: shifted left they are 2^n.
// A polynomial in r remains; tools/minimax.py derives the coefficients and prints them as they stand here. None of this
// needs fma to round once. A NaN takes part in the arithmetic to the end, so NaN gives NaN; overflow comes at the exact
// threshold, and underflow is gradual.
//
// The largest errors, in units in the last place of the exact result: for float over all of magnitude 2^-20 to 2^7 and
// every 211th of the others, for double over 8 million random arguments; with fma (without).
//             exp          expm1        log1p        tanh         sigmoid      erf
//   float     1.01 (0.97)  1.46 (1.53)  1.61 (1.73)  1.32 (1.32)  2.00 (2.00)  1.94 (2.12)
//   double    1.02 (0.99)  2.05 (2.15)  2.20 (2.34)  1.31 (1.31)  2.00 (2.00)  2.23 (2.36)

template <class V>
constexpr bool SINGLE = sizeof(Lane<V>) == 4;

// c0 + c1 x + c2 x^2 + ..., in pairs: x2 is x^2. Half the latency of Horner's rule for one product more.
template <class V>
PYPERC_INLINE V polynomial(V, V, Lane<V> c0) {
  return splat<V>(c0);
}
template <class V>
PYPERC_INLINE V polynomial(V x, V, Lane<V> c0, Lane<V> c1) {
  return fma(x, splat<V>(c1), splat<V>(c0));
}
template <class V, class... C>
PYPERC_INLINE V polynomial(V x, V x2, Lane<V> c0, Lane<V> c1, C... higher) {
  return fma(x2, polynomial<V>(x, x2, higher...), fma(x, splat<V>(c1), splat<V>(c0)));
}

// min(a, b) is a < b ? a : b and max(a, b) is a > b ? a : b, so a NaN as the second argument stays.
template <class V>
PYPERC_INLINE V at_most(V x, Lane<V> most) {
  return min(splat<V>(most), x);
}
template <class V>
PYPERC_INLINE V at_least(V x, Lane<V> least) {
  return max(splat<V>(least), x);
}

template <class V>
PYPERC_INLINE V abs(V x) {
  return from_bits<V>(bits(x) & ~bits(splat<V>(-0.0)));
}

template <class V>
PYPERC_INLINE V copysign(V magnitude, V sign) {
  return from_bits<V>((bits(magnitude) & ~bits(splat<V>(-0.0))) | (bits(sign) & bits(splat<V>(-0.0))));
}

// The number that rounds to integers when it is added: 1.5 * 2^(mantissa bits), and `shift` plus the bias of the
// exponent.
template <class V>
PYPERC_INLINE V rounder(int shift) {
  return splat<V>(SINGLE<V> ? Lane<V>(0x1.8p23 + 127 + shift) : Lane<V>(0x1.8p52 + 1023 + shift));
}

template <class V>
struct Split {
  V power, n;
};

// n = x / ln 2, rounded, and power = 2^(n + shift), where round = rounder(shift).
template <class V>
PYPERC_INLINE Split<V> split(V x, V round) {
  V shifted = fma(x, splat<V>(Lane<V>(1.4426950408889634)), round);
  return {from_bits<V>(bits(shifted) << (SINGLE<V> ? 23 : 52)), shifted - round};
}

// The two parts of ln 2: n times the first is exact, the second holds what the first lacks (Cody and Waite, 1980).
template <class V>
constexpr Lane<V> LN2_HIGH = SINGLE<V> ? Lane<V>(0x1.62ep-1) : Lane<V>(0x1.62e42fefa38p-1);
template <class V>
constexpr Lane<V> LN2_LOW = SINGLE<V> ? Lane<V>(0x1.0bfbe8p-15) : Lane<V>(0x1.ef35793c7673p-45);

// x - n ln 2
template <class V>
PYPERC_INLINE V subtract_ln2(V n, V x) {
  return fma(n, splat<V>(-LN2_LOW<V>), fma(n, splat<V>(-LN2_HIGH<V>), x));
}

// e^r - 1 - r = r^2 c(r) for |r| <= (ln 2) / 2, added to y.
template <class V>
PYPERC_INLINE V add_exp_tail(V r, V y) {
  V r2 = r * r, c;
  if constexpr (SINGLE<V>) {
    c = polynomial<V>(r, r2, 0.5, 0.166666657, 0.0416664928, 0.00833354425, 0.00139323412, 0.000197633868);
  } else {
    c = polynomial<V>(r, r2, 0.50000000000000056, 0.16666666666666605, 0.041666666666573621, 0.0083333333333798377,
                      0.0013888888932399304, 0.00019841269739996639, 2.4801504394131007e-05, 2.7557388705351236e-06,
                      2.7626357679986906e-07, 2.5059791328316102e-08);
  }
  return fma(r2, c, y);
}

template <class V>
struct Reduced {
  V power, q;
};

// e^x = 2^n (1 + q) with q = e^r - 1, r = x - n ln 2, and power = 2^(n + shift), where round = rounder(shift).
template <class V>
PYPERC_INLINE Reduced<V> reduce(V x, V round) {
  auto [power, n] = split(x, round);
  V r = subtract_ln2(n, x);
  return {power, add_exp_tail(r, r)};
}

// e^x = 2^n (1 + r + r^2 c(r)).
// The power is applied in two factors, so that it neither overflows nor underflows before the result does.
template <class V>
PYPERC_INLINE V exp(V x) {
  constexpr Lane<V> LOW = SINGLE<V> ? -80 : -700;
  x = at_least(at_most(x, SINGLE<V> ? 89 : 710), SINGLE<V> ? -104 : -746);
  auto low = x < splat<V>(LOW);
  auto [power, q] = reduce(x, select(low, rounder<V>(64), rounder<V>(-1)));
  return fma(power, q, power) * select(low, splat<V>(0x1p-64), splat<V>(2));
}

// e^x - 1 = 2 (2^(n-1) q + (2^(n-1) - 1/2)) with q = e^r - 1 = r + r^2 c(r).
// Halved, because 2^128 overflows where e^x - 1 does not. Tiny arguments are their own result, with their sign.
template <class V>
PYPERC_INLINE V expm1(V x) {
  V y = at_least(at_most(x, SINGLE<V> ? 89 : 710), SINGLE<V> ? -20 : -40);
  auto [power, q] = reduce(y, rounder<V>(-1));
  V half = fma(power, q, power - splat<V>(0.5));
  return select(abs(x) < splat<V>(SINGLE<V> ? 0x1p-26 : 0x1p-55), x, half + half);
}

// 1 / (1 + e^-x) = c / (c + power (1 + q)) with c = 2^-SHIFT, power = c 2^n: c keeps the divisor finite down to where
// the quotient underflows, and the division rounds the quotient once. The larger of c and power is added last, so that
// nothing of the smaller is lost (2.15 ulp otherwise). Upwards the result is 1 long before x reaches the limit.
template <class V>
PYPERC_INLINE V sigmoid(V x) {
  constexpr int SHIFT = SINGLE<V> ? 24 : 53;
  x = at_least(at_most(x, SINGLE<V> ? 60 : 600), SINGLE<V> ? -104 : -746);
  auto [power, q] = reduce(-x, rounder<V>(-SHIFT));
  V c = splat<V>(SINGLE<V> ? Lane<V>(0x1p-24) : Lane<V>(0x1p-53));
  return c / (fma(power, q, min(c, power)) + max(c, power));
}

// x (1 + u c(u)) with u = x^2 below 9/16, from there on 1 - 2 / (e^2x + 1), whose errors shrink as it nears 1.
template <class V>
PYPERC_INLINE V tanh(V x) {
  V a = at_most(abs(x), SINGLE<V> ? Lane<V>(9.1) : Lane<V>(19.5));
  auto [power, q] = reduce(a + a, rounder<V>(0));
  V large = splat<V>(1) - splat<V>(2) / fma(power, q, power + splat<V>(1));
  V u = a * a, c;
  if constexpr (SINGLE<V>) {
    c = polynomial<V>(u, u * u, -0.333333135, 0.1333244, -0.0538363047, 0.0210033637, -0.00617463468);
  } else {
    c = polynomial<V>(u, u * u, -0.33333333333331777, 0.13333333333093189, -0.053968253839702163, 0.021869485120437227,
                      -0.0088631832063162004, 0.0035916298391653629, -0.0014527780731558705, 0.00057785078179372392,
                      -0.00020822457312192269, 4.9600546681546338e-05);
  }
  return copysign(select(a < splat<V>(0.5625), fma(a * u, c, a), large), x);
}

// log(1 + x) = k ln 2 + log(1 + f), 1 + f = 2^-k (1 + x) in [2/3, 4/3), log(1 + f) = f - f^2 / 2 + f^3 c(f).
// Only k is taken from the rounded 1 + x (halved, as k may be 128); f = 2^-k x + (2^-k - 1) then rounds once.
template <class V>
PYPERC_INLINE V log1p(V x) {
  V half = fma(x, splat<V>(0.5), splat<V>(0.5));
  Bits<V> scaled = bits(half) + (bits(splat<V>(1)) - bits(splat<V>(Lane<V>(2.0 / 3))));
  Bits<V> power = scaled & bits(splat<V>(__builtin_inf()));           // 2^(k-1)
  V inverse = from_bits<V>(bits(splat<V>(__builtin_inf())) - power);  // 4 * 2^-k
  V f = splat<V>(0.25) * fma(x, inverse, inverse - splat<V>(4));
  constexpr Lane<V> INTEGERS = SINGLE<V> ? Lane<V>(0x1p23) : Lane<V>(0x1p52);
  V k = from_bits<V>((scaled >> (SINGLE<V> ? 23 : 52)) | bits(splat<V>(INTEGERS))) -
        splat<V>(INTEGERS + (SINGLE<V> ? 126 : 1022));
  V c;
  if constexpr (SINGLE<V>) {
    c = polynomial<V>(f, f * f, -0.5, 0.333332121, -0.249998242, 0.200105786, -0.166793585, 0.140034974, -0.12199229,
                      0.139946476, -0.128288284);
  } else {
    c = polynomial<V>(f, f * f, -0.5, 0.33333333333338544, -0.25000000000013267, 0.19999999998094459,
                      -0.16666666663014804, 0.14285714523061166, -0.12500000378311996, 0.11111096708559694,
                      -0.099999798537373674, 0.090914007477315428, -0.083339568220285903, 0.076822393523079971,
                      -0.071310329052426596, 0.067923734169466524, -0.063887299947592596, 0.049550494237554046,
                      -0.045839971427507939, 0.088628045148229057, -0.086038907602686662);
  }
  V y = fma(k, splat<V>(LN2_LOW<V>), fma(f * f, c, f));  // the smaller part first
  y = copysign(fma(k, splat<V>(LN2_HIGH<V>), y), x);
  y = select(x < splat<V>(__builtin_inf()), y, x);
  V outside = select(x == splat<V>(-1), splat<V>(-__builtin_inf()), splat<V>(__builtin_nan("")));
  return select(x > splat<V>(-1), y, outside);
}

// erf(x) = sign(x) (1 - e^-g) with g = -log(erfc|x|) = |x| - |x| c(|x|): the error of g counts for less and less as |x|
// grows, so one polynomial serves from 0 to where erf rounds to 1. 1 - e^-g is formed as in expm1, except that |x| is
// added last: for n = 0 it is the larger part of q, and g itself is never rounded.
template <class V>
PYPERC_INLINE V erf(V x) {
  V a = at_most(abs(x), SINGLE<V> ? 4 : 6), c;
  if constexpr (SINGLE<V>) {
    c = polynomial<V>(a, a * a, -0.128379166, -0.636619568, -0.102776289, 0.0191477221, 0.00016975464, -0.00167597702,
                      0.000637549907, -0.000118918644, 9.39484107e-06);
  } else {
    c = polynomial<V>(a, a * a, -0.12837916709551256, -0.63661977236758982, -0.10277260330135728, 0.019128446993806524,
                      0.00020919484700451641, -0.0016962076269332951, 0.00059013224766568011, -2.5903942484840859e-05,
                      -6.4421736921101735e-05, 2.9577854833218776e-05, -3.1726054933268792e-06, -3.1298694421049561e-06,
                      2.0346020701146858e-06, -5.6890655733746177e-07, 1.0786799253041999e-08, 6.6126835807957429e-08,
                      -3.47184849613005e-08, 1.0809184994329682e-08, -2.3679899255278796e-09, 3.7725706554709654e-10,
                      -4.3155911935443453e-11, 3.3754549213310619e-12, -1.6203803899557101e-13, 3.6048850914434287e-15);
  }
  auto [power, n] = split(fma(a, c, -a), rounder<V>(0));
  V part = subtract_ln2(n, a * c);
  V q = add_exp_tail(part - a, part) - a;
  return copysign(fma(power, q, power - splat<V>(1)), x);
}
