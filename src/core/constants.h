// Numbers and limits that the core and the kernels share. Kernel files include this: nothing here emits code.
#pragma once

namespace umfa {

constexpr double log2_e = 1.4426950408889634;
constexpr double ln_2 = 0.6931471805599453;

constexpr int max_head_dim = 576;    // of query and key: DeepSeek's latent 512 + 64
constexpr int max_head_dim_v = 512;  // of value

}  // namespace umfa
