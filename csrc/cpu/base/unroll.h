// Loops over constants. Compilers keep an array in registers only where they see constant indices from the start, so
// loops over sums in registers are unrolled here instead of by the optimizer, and what they call is inlined first.
//
//   unroll<4>([&]<int I>() DBRXQ_INLINE { sums[I] = Vec::zero(); });
//
// Types and functions of the unnamed namespace: included by code that is compiled for several instruction sets.
#pragma once
#include <utility>

#define DBRXQ_INLINE __attribute__((always_inline))

namespace dbrxq {
namespace {

template <class Body, int... I>
DBRXQ_INLINE inline void unroll(std::integer_sequence<int, I...>, Body&& body) {
  (body.template operator()<I>(), ...);
}

// body<0>(), body<1>() .. body<N - 1>().
template <int N, class Body>
DBRXQ_INLINE inline void unroll(Body&& body) {
  unroll(std::make_integer_sequence<int, N>{}, body);
}

// Whether T is defined here: what is written over a type that its includer defines asks this first.
template <class T>
concept Defined = requires { sizeof(T); };

}  // namespace
}  // namespace dbrxq
