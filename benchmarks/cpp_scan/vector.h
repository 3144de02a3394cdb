// Sixteen floats in an AVX-512 register, and the functions of the scan on them as polynomials.
#pragma once

#include <immintrin.h>

namespace scan {

using Vector = __m512;
constexpr int WIDTH = 16;

inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

// 2^x: the fraction |f| <= 1/2 through a polynomial of degree 5 (1e-7), the rest into the exponent.
inline Vector exp2(Vector x) {
    const Vector f = _mm512_reduce_ps(x, 8);
    Vector p = fma(all(0.0013300605351105332f), f, all(0.009669691324234009f));
    p = fma(p, f, all(0.05550558492541313f));
    p = fma(p, f, all(0.24022282660007477f));
    p = fma(p, f, all(0.6931471805599453f));
    return _mm512_scalef_ps(fma(p, f, all(1.0f)), x - f);
}

// softplus(x) = log(1 + e^x) and its slope, the sigmoid. log(1 + y) = 2 atanh(y / (2 + y)).
inline Vector softplus(Vector x, Vector& sigmoid) {
    const Vector y = exp2(_mm512_abs_ps(x) * all(-1.4426950408889634f));
    const Vector s = y / (y + all(2.0f)), square = s * s;
    Vector tail = fma(all(0.1400599425706557f), square, all(0.1400090248274664f));
    tail = fma(tail, square, all(0.20010763627620673f));
    tail = fma(tail, square, all(0.33333208142721316f)) * square;
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    sigmoid = _mm512_mask_blend_ps(below, all(1.0f), y) / (y + all(1.0f));
    return fma(all(2.0f), fma(s, tail, s), _mm512_max_ps(x, _mm512_setzero_ps()));
}

}  // namespace scan
