// SIMD vectors as wide as the processor's registers, in the vector types of GCC and Clang, and a vectorized 2^x.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

constexpr double LOG2E = 1.4426950408889634;

// `may_alias` and the alignment of one element allow loads of a vector from the address of any element.
typedef float floats __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef int32_t ints __attribute__((vector_size(BYTES), aligned(4), may_alias));

template <class T> struct Vector;
template <> struct Vector<float> { using type = floats; };
template <> struct Vector<double> { using type = doubles; };
template <class T> using vec = typename Vector<T>::type;
template <class T> constexpr int LANES = BYTES / sizeof(T);
template <class T> constexpr T INF = std::numeric_limits<T>::infinity();

template <class T> inline vec<T> load(const T* p) { return *reinterpret_cast<const vec<T>*>(p); }
template <class T> inline void store(T* p, vec<T> v) { *reinterpret_cast<vec<T>*>(p) = v; }
template <class T> inline vec<T> zeros() { return vec<T>{}; }

template <class T> inline T sum(vec<T> v) {
  T parts[LANES<T>];
  store<T>(parts, v);
  for (int half = LANES<T> / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

template <class T> inline T highest(vec<T> v) {
  T parts[LANES<T>];
  store<T>(parts, v);
  for (int half = LANES<T> / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  return parts[0];
}

// 2^x for x <= 127, with a relative error below 3e-7. x is split into the nearest integer, which becomes the exponent,
// and the rest, whose power is a polynomial. The result is 0 for x < -126.
inline floats exp2(floats x) {
  constexpr float ROUND = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  floats clamped = x < -126.0f ? zeros<float>() : x;
  floats shifted = clamped + ROUND;
  ints exponent = reinterpret_cast<ints&>(shifted) << 23;
  floats f = clamped - (shifted - ROUND);
  floats p = f * 1.5403530393381608e-4f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910071e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  ints bits = reinterpret_cast<ints&>(p) + exponent;
  floats power = reinterpret_cast<floats&>(bits);
  floats zero_or_nan = x < -126.0f ? zeros<float>() : x;
  return x >= -126.0f ? power : zero_or_nan;
}

inline doubles exp2(doubles x) {
  doubles power = {};
  for (int i = 0; i < LANES<double>; i++) power[i] = std::exp2(x[i]);
  return power;
}
