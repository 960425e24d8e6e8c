// Forward attention for one block of queries: online softmax over key tiles (Milakov & Gimelshein
// 2018; Dao et al. 2022), in exp2 with log2(e) folded into the scale.
//
// Everything is transposed: queries lie along the vector lanes. Then S^T = K Q^T and O^T += V^T P^T
// both read K and V element by element straight from the caller's memory (a broadcast feeds the
// FMA), nothing of K or V is repacked, and the row maxima and sums of softmax are plain lane-wise
// operations. Q is transposed once per block on the way in, O once on the way out.
//
// Key tiles start at multiples of block_kv whatever the block of queries, and lanes never mix: the
// bits of a row do not depend on block sizes, threads, or the other rows.
//
// Included inside an anonymous namespace of each kernel file, after simd.h and a `Simd` that adds
// `mr` (keys or channels per micro-tile) and `nv` (vectors of queries per panel).

constexpr int64_t block_kv = 64;
constexpr float log2_e = 1.44269504088896341f;
constexpr double ln_2 = 0.693147180559945309;

template <class S>
struct Lanes {
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;

    /// 2**x; 0 below 2**-126, NaN stays NaN. Within 1.2 ulp over [-126, 127] (1.0 with FMA).
    static vf exp2(vf x) {
        constexpr float magic = 12582912.f;  // 1.5 * 2**23: adding it rounds to an integer
        const vf clamped = x < -127.f ? S::splat(-127.f) : x;
        const vf shifted = clamped + magic;
        const vf f = clamped - (shifted - magic);
        vf p = f * 1.53458121613e-4f + 1.33999311772e-3f;
        p = p * f + 9.61848895633e-3f;
        p = p * f + 5.55032877711e-2f;
        p = p * f + 2.40226468906e-1f;
        p = p * f + 6.93147205737e-1f;
        p = p * f + 1.0f;
        const vu exponent = (vu)shifted - 0x4b400000u;  // the bits of magic
        vf y = (vf)((vu)p + (exponent << 23));
        y = x < -126.f ? vf{} : y;
        return x != x ? x : y;
    }

    /// tanh(x): odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
    static vf tanh(vf x) {
        const vf a = (vf)((vu)x & 0x7fffffffu);
        const vf z = x * x;
        vf p = z * -5.7379072366e-3f + 2.06719294397e-2f;
        p = p * z - 5.37512183108e-2f;
        p = p * z + 1.33316061091e-1f;
        p = p * z - 3.33332896724e-1f;
        const vf small = x + x * z * p;
        const vf capped = a > 20.f ? S::splat(20.f) : a;
        const vf large = 1.f - 2.f / (exp2(capped * (2.f * log2_e)) + 1.f);
        const vf signed_large = (vf)((vu)large | ((vu)x & 0x80000000u));
        const vf y = a < 0.625f ? small : signed_large;
        return x != x ? x : y;
    }
};

/// c[m][lanes] = c[m][lanes] * alpha[lanes] + sum_k a(m, k) * b[k][lanes] for MR rows m.
/// Without Accumulate, c is overwritten. a(m, k) = a[m * a_row + k * a_step].
/// The sum starts at zero and meets c once: a long series of tiles rounds c once per tile, not once
/// per key, so that 2**24 keys of equal weight still count.
template <class S, int MR, bool Accumulate>
inline void micro_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t depth,
                       float* c, const float* alpha) {
    using vf = typename S::vf;
    constexpr int NV = S::nv, W = S::W;
    vf acc[MR][NV];
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NV; ++n) acc[m][n] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vf bk[NV];
        for (int n = 0; n < NV; ++n) bk[n] = S::load(b + (k * NV + n) * W);
        for (int m = 0; m < MR; ++m) {
            const vf am = S::splat(a[m * a_row + k * a_step]);
            for (int n = 0; n < NV; ++n) acc[m][n] += am * bk[n];
        }
    }
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NV; ++n) {
            float* at = c + (m * NV + n) * W;
            if constexpr (Accumulate) acc[m][n] += S::load(at) * S::load(alpha + n * W);
            S::store(at, acc[m][n]);
        }
}

template <class S, int MR, bool Accumulate>
inline void micro_tile_tail(int rows, const float* a, int64_t a_row, int64_t a_step, const float* b,
                            int64_t depth, float* c, const float* alpha) {
    if constexpr (MR > 0) {
        if (rows == MR)
            micro_tile<S, MR, Accumulate>(a, a_row, a_step, b, depth, c, alpha);
        else
            micro_tile_tail<S, MR - 1, Accumulate>(rows, a, a_row, a_step, b, depth, c, alpha);
    }
}

/// The same for any number of rows.
template <class S, bool Accumulate>
inline void panel_product(int64_t rows, const float* a, int64_t a_row, int64_t a_step,
                          const float* b, int64_t depth, float* c, const float* alpha) {
    constexpr int MR = S::mr, N = S::nv * S::W;
    int64_t m = 0;
    for (; m + MR <= rows; m += MR)
        micro_tile<S, MR, Accumulate>(a + m * a_row, a_row, a_step, b, depth, c + m * N, alpha);
    if (m < rows)
        micro_tile_tail<S, MR - 1, Accumulate>(static_cast<int>(rows - m), a + m * a_row, a_row,
                                               a_step, b, depth, c + m * N, alpha);
}

/// dst[0, n) = float(src[0], src[stride], ...).
template <class S, class T>
inline void load_row(const typename T::storage* src, int64_t stride, int64_t n, float* dst) {
    constexpr int W = S::W;
    int64_t i = 0;
    if (stride == 1)
        for (; i + W <= n; i += W) S::store(dst + i, T::template load<S>(src + i));
    for (; i < n; i += W) {  // the tail, and strided rows: through a small buffer
        const int64_t count = n - i < W ? n - i : W;
        typename T::storage buffer[W] = {};
        for (int64_t j = 0; j < count; ++j) buffer[j] = src[(i + j) * stride];
        float wide[W];
        S::store(wide, T::template load<S>(buffer));
        for (int64_t j = 0; j < count; ++j) dst[i + j] = wide[j];
    }
}

template <class S, class T>
inline void store_row(const float* src, int64_t n, typename T::storage* dst, int64_t stride) {
    constexpr int W = S::W;
    int64_t i = 0;
    if (stride == 1)
        for (; i + W <= n; i += W) T::template store<S>(dst + i, S::load(src + i));
    for (; i < n; i += W) {
        const int64_t count = n - i < W ? n - i : W;
        float wide[W] = {};
        for (int64_t j = 0; j < count; ++j) wide[j] = src[i + j];
        typename T::storage buffer[W];
        T::template store<S>(buffer, S::load(wide));
        for (int64_t j = 0; j < count; ++j) dst[(i + j) * stride] = buffer[j];
    }
}

/// A tile of K or V as floats: in place when it is float with unit last stride, else in `scratch`.
struct Tile {
    const float* data;
    int64_t stride;
};
template <class S, class T>
inline Tile tile_of(const Rows& rows, int64_t batch, int64_t head, int64_t first, int64_t count,
                    int64_t channels, float* scratch) {
    using storage = typename T::storage;
    const storage* base = static_cast<const storage*>(rows.data) + batch * rows.stride_batch +
                          head * rows.stride_head + first * rows.stride_row;
    if constexpr (sizeof(storage) == sizeof(float))
        if (rows.stride_channel == 1) return {base, rows.stride_row};
    for (int64_t r = 0; r < count; ++r)
        load_row<S, T>(base + r * rows.stride_row, rows.stride_channel, channels,
                       scratch + r * channels);
    return {scratch, channels};
}

inline bool all_finite(const Tile& tile, int64_t rows, int64_t channels) {
    float sum = 0;  // x * 0 is 0 for finite x, else NaN
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c) sum += tile.data[r * tile.stride + c] * 0.f;
    return sum == 0;
}

template <class S>
struct Panel {  // one panel of queries: nv * W lanes
    static constexpr int N = S::nv * S::W;
    int32_t begin[N], end[N];  // visible keys, relative to the tile
    // maximum is in the units of the scores as softmax_panel keeps them: q.k if Plain, else log2.
    float alpha[N], maximum[N], sum[N];
};

/// scores -> probabilities for one panel and `keys` keys of a tile; updates maximum, sum, alpha.
/// Plain: scores are q.k alone, to be scaled by a positive number.
template <class S, bool Masked, bool Plain>
inline void softmax_panel(const ForwardArgs& args, float slope, int64_t q_first, int64_t k_first,
                          int64_t keys, float* scores, Panel<S>& panel) {
    using L = Lanes<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    constexpr int NV = S::nv, W = S::W;
    constexpr float infinity = __builtin_inff();
    for (int n = 0; n < NV; ++n) {
        const vi begin = S::load_int(panel.begin + n * W), end = S::load_int(panel.end + n * W);
        const vf old_max = S::load(panel.maximum + n * W);
        vi lane;
        for (int w = 0; w < W; ++w) lane[w] = w;
        // Exact below 2**24: the distance to the diagonal is taken in integers.
        const vi diagonal =
            lane + static_cast<int32_t>(q_first + n * W + args.seqlen_kv - args.seqlen_q - k_first);
        vf tile_max = S::splat(-infinity);
        for (int64_t k = 0; k < keys; ++k) {
            float* at = scores + (k * NV + n) * W;
            vf s = S::load(at);
            const int32_t key = static_cast<int32_t>(k);
            if constexpr (!Plain) {
                s *= args.score_scale;
                if (args.softcap != 0) s = args.softcap * L::tanh(s);
                if (slope != 0) {
                    const vf distance = S::to_float(diagonal - key);
                    s -= slope * (vf)((typename S::vu)distance & 0x7fffffffu);
                }
            }
            if constexpr (Masked) {
                const vi position = vi{} + key;
                s = ((position >= begin) & (position < end)) ? s : S::splat(-infinity);
            }
            S::store(at, s);
            tile_max = S::max(s, tile_max);
        }
        // Plain scores are scaled only after the maximum is taken off, by a scale of two floats:
        // however large they are, what exp2 sees is right to its last bits.
        const auto scaled = [&](vf difference) {
            if constexpr (!Plain) return difference;
            return difference * args.score_scale + difference * args.score_scale_low;
        };
        const vf new_max = S::max(tile_max, old_max);
        // A lane that has seen no key keeps -inf; 0 stands in, and its exponentials are 0 below.
        const vf pivot = new_max == -infinity ? vf{} : new_max;
        vf alpha = L::exp2(scaled(old_max - pivot));
        alpha = old_max == -infinity ? vf{} : alpha;
        vf sum{};
        for (int64_t k = 0; k < keys; ++k) {
            float* at = scores + (k * NV + n) * W;
            const vf s = S::load(at);
            vf p = L::exp2(scaled(s - pivot));
            p = s == -infinity ? vf{} : p;  // hidden; also where the scale is too small to tell
            S::store(at, p);
            sum += p;
        }
        sum += S::load(panel.sum + n * W) * alpha;
        S::store(panel.maximum + n * W, new_max);
        S::store(panel.sum + n * W, sum);
        S::store(panel.alpha + n * W, alpha);
    }
}

/// Whether scores can stay unscaled until the maximum is taken off.
inline bool plain(const ForwardArgs& args, float slope) {
    return args.softcap == 0 && slope == 0 && args.score_scale > 0;
}

template <class S, bool Masked>
inline void softmax_step(const ForwardArgs& args, float slope, int64_t q_first, int64_t k_first,
                         int64_t keys, float* scores, Panel<S>& panel) {
    if (plain(args, slope))
        softmax_panel<S, Masked, true>(args, slope, q_first, k_first, keys, scores, panel);
    else
        softmax_panel<S, Masked, false>(args, slope, q_first, k_first, keys, scores, panel);
}

/// O^T += V^T P^T where a hidden V row holds inf or NaN: 0 * NaN must not reach the rows that do
/// not see it. Same operations in the same order as panel_product, so visible rows keep their bits.
template <class S>
inline void accumulate_guarded(const Tile& value, int64_t channels, int64_t keys, const float* p,
                               const Panel<S>& panel, float* o) {
    using vf = typename S::vf;
    using vi = typename S::vi;
    constexpr int NV = S::nv, W = S::W;
    for (int n = 0; n < NV; ++n) {
        const vi begin = S::load_int(panel.begin + n * W), end = S::load_int(panel.end + n * W);
        for (int64_t c = 0; c < channels; ++c) {
            vf acc{};
            for (int64_t k = 0; k < keys; ++k) {
                const vf v = S::splat(value.data[k * value.stride + c]);
                vf next = acc;
                next += v * S::load(p + (k * NV + n) * W);
                const vi position = vi{} + static_cast<int32_t>(k);
                acc = ((position >= begin) & (position < end)) ? next : acc;
            }
            float* at = o + (c * NV + n) * W;
            acc += S::load(at) * S::load(panel.alpha + n * W);
            S::store(at, acc);
        }
    }
}

template <class S>
int64_t forward_scratch_floats(const ForwardArgs& args) {
    constexpr int64_t N = S::nv * S::W;
    const int64_t panels = args.block_q / N;
    const int64_t panel_floats = (sizeof(Panel<S>) + 63) / 64 * 16;
    return args.block_q * (args.head_dim + args.head_dim_v) + block_kv * N + panels * panel_floats +
           block_kv * (args.head_dim + args.head_dim_v) + 2 * (args.head_dim + args.head_dim_v) +
           64;
}

template <class S, class T>
void forward_block(const ForwardArgs& args, int64_t batch, int64_t head, int64_t q_begin,
                   float* scratch) {
    using storage = typename T::storage;
    constexpr int64_t N = S::nv * S::W;
    constexpr float infinity = __builtin_inff();
    const int64_t D = args.head_dim, Dv = args.head_dim_v, head_kv = head / args.group;
    const int64_t q_end =
        q_begin + args.block_q < args.seqlen_q ? q_begin + args.block_q : args.seqlen_q;
    const int64_t panels = (q_end - q_begin + N - 1) / N;
    const float slope =
        args.slopes
            ? args.slopes[batch * args.slopes_stride_batch + head * args.slopes_stride_head] *
                  log2_e
            : 0.f;

    // Scratch, in pieces that keep 64-byte alignment: N is a multiple of 4 floats in every set.
    Panel<S>* panel = reinterpret_cast<Panel<S>*>(scratch);
    float* scores = scratch + panels * ((sizeof(Panel<S>) + 63) / 64 * 16);
    float* q_t = scores + block_kv * N;     // [panel][D][N]
    float* o_t = q_t + panels * D * N;      // [panel][Dv][N]
    float* k_tile = o_t + panels * Dv * N;  // [block_kv][D], when K is converted
    float* v_tile = k_tile + block_kv * D;  // [block_kv][Dv], when V is converted
    float* row = v_tile + block_kv * Dv;    // one row of Q or O

    // Q, transposed. Lanes past the last query hold zeros and are never stored.
    const storage* q = static_cast<const storage*>(args.query.data) +
                       batch * args.query.stride_batch + head * args.query.stride_head;
    for (int64_t i = 0; i < panels * N; ++i) {
        const bool real = q_begin + i < q_end;
        if (real)
            load_row<S, T>(q + (q_begin + i) * args.query.stride_row, args.query.stride_channel, D,
                           row);
        float* to = q_t + (i / N) * D * N + i % N;
        for (int64_t d = 0; d < D; ++d) to[d * N] = real ? row[d] : 0.f;
        panel[i / N].maximum[i % N] = -infinity;
        panel[i / N].sum[i % N] = 0;
    }
    for (int64_t i = 0; i < panels * Dv * N; ++i) o_t[i] = 0;

    // Visible ranges grow with the query, so the first and last rows bound the block.
    const int64_t first_key = visible_begin(args.visible, q_begin);
    const int64_t last_key = visible_end(args.visible, q_end - 1);
    for (int64_t k0 = first_key / block_kv * block_kv; k0 < last_key; k0 += block_kv) {
        const int64_t keys = args.seqlen_kv - k0 < block_kv ? args.seqlen_kv - k0 : block_kv;
        const Tile key = tile_of<S, T>(args.key, batch, head_kv, k0, keys, D, k_tile);
        const Tile value = tile_of<S, T>(args.value, batch, head_kv, k0, keys, Dv, v_tile);
        int finite = -1;  // not looked at yet
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t i0 = q_begin + p * N, i1 = (i0 + N < q_end ? i0 + N : q_end) - 1;
            if (visible_end(args.visible, i1) <= k0 || visible_begin(args.visible, i0) >= k0 + keys)
                continue;  // no row of the panel sees the tile
            const bool whole =
                visible_begin(args.visible, i1) <= k0 && visible_end(args.visible, i0) >= k0 + keys;
            panel_product<S, false>(keys, key.data, key.stride, 1, q_t + p * D * N, D, scores,
                                    nullptr);
            float* o = o_t + p * Dv * N;
            if (whole) {
                softmax_step<S, false>(args, slope, i0, k0, keys, scores, panel[p]);
            } else {
                for (int64_t j = 0; j < N; ++j) {
                    const int64_t i = i0 + j < q_end ? i0 + j : q_end - 1;
                    const int64_t begin = visible_begin(args.visible, i) - k0;
                    const int64_t end = visible_end(args.visible, i) - k0;
                    panel[p].begin[j] = static_cast<int32_t>(begin < 0      ? 0
                                                             : begin > keys ? keys
                                                                            : begin);
                    panel[p].end[j] = static_cast<int32_t>(end < 0 ? 0 : end > keys ? keys : end);
                }
                softmax_step<S, true>(args, slope, i0, k0, keys, scores, panel[p]);
                if (finite < 0) finite = all_finite(value, keys, Dv);
                if (!finite) {
                    accumulate_guarded<S>(value, Dv, keys, scores, panel[p], o);
                    continue;
                }
            }
            panel_product<S, true>(Dv, value.data, 1, value.stride, scores, keys, o,
                                   panel[p].alpha);
        }
    }

    // O / sum, transposed back. A row that saw no key: 0, and LSE -inf.
    storage* out = static_cast<storage*>(args.out.data) + batch * args.out.stride_batch +
                   head * args.out.stride_head;
    float* lse = args.lse.data ? static_cast<float*>(args.lse.data) +
                                     batch * args.lse.stride_batch + head * args.lse.stride_head
                               : nullptr;
    const double unit = plain(args, slope) ? double{args.score_scale} + args.score_scale_low : 1.0;
    for (int64_t i = 0; i < q_end - q_begin; ++i) {
        const Panel<S>& own = panel[i / N];
        const float sum = own.sum[i % N], maximum = own.maximum[i % N];
        const float* from = o_t + (i / N) * Dv * N + i % N;
        for (int64_t c = 0; c < Dv; ++c) row[c] = sum == 0 ? 0.f : from[c * N] / sum;
        store_row<S, T>(row, Dv, out + (q_begin + i) * args.out.stride_row,
                        args.out.stride_channel);
        if (lse)
            lse[(q_begin + i) * args.lse.stride_row] =
                sum == 0 ? -infinity
                         : static_cast<float>((maximum * unit + __builtin_log2(sum)) * ln_2);
    }
}

template <class S>
constexpr Kernels kernels_of(const char* name) {
    return {name,
            S::nv * S::W,
            forward_block<S, F32>,
            forward_block<S, F16>,
            forward_block<S, BF16>,
            forward_scratch_floats<S>};
}
