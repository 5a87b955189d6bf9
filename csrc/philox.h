// Philox4x32-10 (Salmon et al., SC 2011) and stochastic rounding to 16 bits; r2d2fast/rounding.py defines both.
#pragma once

#include <stdint.h>

#include "d2_math.h"

namespace r2d2 {

struct Philox {
  uint32_t word[4];

  R2D2_INLINE Philox(uint64_t block, uint64_t step, uint64_t seed)
      : word{uint32_t(block), uint32_t(block >> 32), uint32_t(step), uint32_t(step >> 32)} {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(word[0]) * 0xD2511F53u, b = uint64_t(word[2]) * 0xCD9E8D57u;
      const uint32_t x0 = uint32_t(b >> 32) ^ word[1] ^ k0, x2 = uint32_t(a >> 32) ^ word[3] ^ k1;
      word[0] = x0, word[1] = uint32_t(b), word[2] = x2, word[3] = uint32_t(a);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }

  // 16 bits for one of the eight elements that share a block.
  R2D2_INLINE uint32_t bits(int piece) const {
    // Not word[piece >> 1]: a GPU has no registers with a number known only at run time and would go through memory.
    const uint32_t two = piece & 4 ? (piece & 2 ? word[3] : word[2]) : (piece & 2 ? word[1] : word[0]);
    return (two >> (16 * (piece & 1))) & 0xFFFFu;
  }
};

}  // namespace r2d2
