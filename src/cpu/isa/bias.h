// A dense mask, in units of log2 and as scores are held: -inf where a key is hidden.

/// W elements of the mask from `at` on, `stride` apart; those past `count` are 0.
template <class S>
inline typename S::vf mask_values(MaskKind kind, const char* at, int64_t stride, int64_t count) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    if (kind == MaskKind::boolean) {
        const uint8_t* shown = reinterpret_cast<const uint8_t*>(at);
        vf x{};
        for (int i = 0; i < W && i < count; ++i) x[i] = shown[i * stride] ? 0.f : -__builtin_inff();
        return x;
    }
    const auto load = [&](auto element) {
        using T = decltype(element);
        const auto* from = reinterpret_cast<const typename T::storage*>(at);
        if (stride == 1 && count >= W) return T::template load<S>(from);
        typename T::storage buffer[W];
        gather(from, stride, count < W ? count : int64_t{W}, buffer, W);
        return T::template load<S>(buffer);
    };
    const vf x = kind == MaskKind::f32   ? load(F32{})
                 : kind == MaskKind::f16 ? load(F16{})
                                         : load(BF16{});
    return x * log2_e;
}

inline int64_t size_of(const Mask& mask) {
    return mask.kind == MaskKind::boolean ? 1 : mask.kind == MaskKind::f32 ? 4 : 2;
}

inline const char* mask_at(const Mask& mask, int64_t batch, int64_t head, int64_t row,
                           int64_t key) {
    return static_cast<const char*>(mask.data) +
           (batch * mask.stride_batch + head * mask.stride_head + row * mask.stride_row +
            key * mask.stride_key) *
               size_of(mask);
}

/// to[key][lane] for the keys [first, last) of a tile that begins at `tile`, and `rows` queries from
/// `row` on. Writes whole vectors of keys: up to W - 1 keys past `last`.
template <class S>
inline void mask_panel(const Mask& mask, int64_t batch, int64_t head, int64_t row, int64_t rows,
                       int64_t tile, int64_t first, int64_t last, float* to) {
    using vf = typename S::vf;
    constexpr int W = S::W, N = S::nv * S::W;
    for (int64_t k = first; k < last; k += W) {
        const int64_t count = last - k;
        if (mask.stride_row == 0) {  // the same for every query
            const vf x = mask_values<S>(mask.kind, mask_at(mask, batch, head, row, tile + k),
                                        mask.stride_key, count);
            for (int i = 0; i < W; ++i)
                for (int n = 0; n < S::nv; ++n) S::store(to + (k + i) * N + n * W, S::splat(x[i]));
            continue;
        }
        for (int n = 0; n < S::nv; ++n) {
            vf x[W];
            for (int r = 0; r < W; ++r)
                x[r] = n * W + r < rows
                           ? mask_values<S>(mask.kind,
                                            mask_at(mask, batch, head, row + n * W + r, tile + k),
                                            mask.stride_key, count)
                           : vf{};
            S::transpose(x);
            for (int i = 0; i < W; ++i) S::store(to + (k + i) * N + n * W, x[i]);
        }
    }
}
