// exp, expm1, log1p, tanh, sigmoid, softplus and the normal law, written once over a vector type V, which is float or
// double or a vector of them. Included inside an ISA's own anonymous namespace, after simd.inl: it includes nothing,
// opens no namespace, calls no libm, and defines templates only.
//
// Everything is branch-free, without tables, and with one division at most. x = n ln 2 + r is reduced by adding a large
// number whose last mantissa bit weighs 1, which leaves n + bias in the low bits of the sum: shifted left they are 2^n.
// A polynomial in r remains; tools/minimax.py derives the coefficients and prints them as they stand here. None of this
// needs fma to round once. A NaN takes part in the arithmetic to the end, so NaN gives NaN; overflow comes at the exact
// threshold, and underflow is gradual.
//
// The largest errors, in units in the last place of the exact result: for float over all of magnitude 2^-20 to 2^7 and
// every 211th of the others, for double over 8 million random arguments; with fma (without).
//             exp          expm1        log1p        tanh         sigmoid      softplus
//   float     1.01 (0.97)  1.46 (1.53)  1.61 (1.73)  1.32 (1.32)  2.00 (2.00)  1.84 (1.96)
//   double    1.02 (0.99)  2.05 (2.15)  2.20 (2.34)  1.31 (1.31)  2.00 (2.00)  2.41 (2.54)

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

// The same by Horner's rule, for short sums.
template <class V>
PYPERC_INLINE V horner(V, Lane<V> c0) {
  return splat<V>(c0);
}
template <class V, class... C>
PYPERC_INLINE V horner(V x, Lane<V> c0, C... higher) {
  return fma(x, horner<V>(x, higher...), splat<V>(c0));
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

// 2^x = 2^n q with n = x, rounded, q = 1 + r c(r) and r = x - n; the lowest bits of `shifted` are n + shift, where
// round = rounder(shift - bias).
template <class V>
struct PowerOf2 {
  V shifted, q;
};
template <class V>
PYPERC_INLINE PowerOf2<V> power_of_2(V x, V round) {
  V shifted = x + round, r = x - (shifted - round), q;
  if constexpr (SINGLE<V>) {
    q = horner<V>(r, 1, 0.693147004, 0.240222424, 0.0555070415, 0.00967152882, 0.00132726424);
  } else {
    q = polynomial<V>(r, r * r, 1, 0.69314718055994529, 0.24022650695910111, 0.055504108664821736,
                      0.0096181291076005617, 0.0013333558146540437, 0.00015403530450288846, 1.5252733641467823e-05,
                      1.3215438233438037e-06, 1.0178156324686528e-07, 7.0733338767888037e-09, 4.4394970876615615e-10);
  }
  return {shifted, q};
}

// For x from -127 (-1023), where it is 0, to 128 (1024).
template <class V>
PYPERC_INLINE V exp2(V x) {
  auto [shifted, q] = power_of_2(x, rounder<V>(0));
  return from_bits<V>(bits(shifted) << (SINGLE<V> ? 23 : 52)) * q;
}

// For |x| up to 125 (1021), which leave q a normal number: n is added to its exponent.
template <class V>
PYPERC_INLINE V exp2_within(V x) {
  auto [shifted, q] = power_of_2(x, rounder<V>(SINGLE<V> ? -127 : -1023));
  return from_bits<V>(bits(q) + (bits(shifted) << (SINGLE<V> ? 23 : 52)));
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
PYPERC_INLINE V exp_up_to_overflow(V x) {
  constexpr Lane<V> LOW = SINGLE<V> ? -80 : -700;
  x = at_least(x, SINGLE<V> ? -104 : -746);
  auto low = x < splat<V>(LOW);
  auto [power, q] = reduce(x, select(low, rounder<V>(64), rounder<V>(-1)));
  return fma(power, q, power) * select(low, splat<V>(0x1p-64), splat<V>(2));
}
template <class V>
PYPERC_INLINE V exp(V x) {
  return exp_up_to_overflow(at_most(x, SINGLE<V> ? 89 : 710));
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

// log(1 + f) = f + f^2 c(f) for f in [-1/3, 1/3].
template <class V>
PYPERC_INLINE V log1p_near_0(V f) {
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
  return fma(f * f, c, f);
}

// log(1 + x) = k ln 2 + log(1 + f), 1 + f = 2^-k (1 + x) in [2/3, 4/3).
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
  V y = fma(k, splat<V>(LN2_LOW<V>), log1p_near_0(f));  // the smaller part first
  y = copysign(fma(k, splat<V>(LN2_HIGH<V>), y), x);
  y = select(x < splat<V>(__builtin_inf()), y, x);
  V outside = select(x == splat<V>(-1), splat<V>(-__builtin_inf()), splat<V>(__builtin_nan("")));
  return select(x > splat<V>(-1), y, outside);
}

// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|; from u = 1/3 on 1 + u is 2 (1 + f), below f is u.
template <class V>
PYPERC_INLINE V softplus(V x) {
  V u = exp_up_to_overflow(-abs(x));
  auto upper = u > splat<V>(Lane<V>(1.0 / 3));
  V f = select(upper, fma(u, splat<V>(0.5), splat<V>(-0.5)), u);
  V y = log1p_near_0(f) + select(upper, splat<V>(LN2_LOW<V>), splat<V>(0));
  return max(splat<V>(0), x) + (y + select(upper, splat<V>(LN2_HIGH<V>), splat<V>(0)));
}

template <class V>
struct NormalLaw {
  V cdf, pdf;
};

// The distribution function Phi and the density phi of the normal law. Phi(-a) = 2^g for a >= 0 with g = -1 + a c(a):
// one polynomial and no division. In the tail, where 1 + erf would cancel, it keeps a relative precision of its own: in
// float 2^-21 to -1, 2^-17 to -3, 2^-9 to -5. From the limit on, where g is -125 (-1020), it is 0: there Phi is 3e-26
// (3e-28). phi(x) = 2^(-log2 sqrt(2 pi) - x^2 / (2 ln 2)) is right wherever it is a normal number.
template <class V>
PYPERC_INLINE NormalLaw<V> normal_law(V x) {
  constexpr Lane<V> LEAST = SINGLE<V> ? -127 : -1023;
  V a = abs(x), g;
  if constexpr (SINGLE<V>) {
    g = polynomial<V>(a, a * a, -1, -1.15110791, -0.459178537, -0.0526010953, 0.00723186182, -0.000275892875,
                      -0.000125469756, 2.60955821e-05, -1.69514544e-06);
  } else {
    g = polynomial<V>(a, a * a, -1, -1.1511040990721604, -0.4592240942634192, -0.052421193325913051,
                      0.006899128876969772, 5.3352145671213244e-05, -0.00030588944728265584, 7.5253925036325797e-05,
                      -2.339175053126822e-06, -4.1024836374642265e-06, 1.3281430839423277e-06, -9.6774966734728396e-08,
                      -7.3237007508593742e-08, 3.3641562285071563e-08, -6.7803791459547876e-09, 1.349474723468337e-10,
                      3.9060601083050528e-10, -1.5239625418198975e-10, 3.5478538048069662e-11, -5.9203387594629994e-12,
                      7.3865916551451295e-13, -6.8950179776494127e-14, 4.6970913281937796e-15, -2.2112971821900013e-16,
                      6.4391195105152998e-18, -8.7424893180694141e-20);
  }
  V tail = select(a < splat<V>(SINGLE<V> ? Lane<V>(10.5311) : Lane<V>(10.963)), exp2_within(g), splat<V>(0));
  V density = fma(x * x, splat<V>(Lane<V>(-0.72134752044448170)), splat<V>(Lane<V>(-1.3257480647361592)));
  return {select(x < splat<V>(0), tail, splat<V>(1) - tail), exp2(at_least(density, LEAST))};
}
