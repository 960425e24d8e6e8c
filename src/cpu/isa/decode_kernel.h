// Forward attention for few queries over many keys (decoding): the queries of all heads that share
// a key head go over K and V together, so each byte of the cache is read once. Channels lie along
// the vector lanes, K and V are read where they are, and the keys are cut into parts that run on
// their own and are merged (flash-decoding, Dao et al. 2023).
//
// Parts are `decode_part` keys long whatever the machine, and rows never mix: the bits of a row do
// not depend on threads or on other rows. Included after forward_kernel.h.

constexpr int64_t decode_tile = 64;  // keys per softmax step: with D=128, 16 KiB of bfloat16
constexpr int decode_rows = 4;       // rows at a time: 16 accumulators with 4 vectors of channels

template <class S, class U>
struct DecodeScratch {
    int64_t depth, channels;  // units of a row of Q and channels of a row of O, whole vectors
    int64_t query, out, scores, sum, row, size;

    explicit DecodeScratch(const ForwardArgs& args) {
        constexpr int64_t W = S::W;
        const int64_t rows = args.group * args.seqlen_q;
        depth = ((args.head_dim + U::E - 1) / U::E + W - 1) / W * W;
        channels = (args.head_dim_v + W - 1) / W * W;
        query = 0;                              // [row][depth]
        out = query + rows * depth;             // [row][channels]
        scores = out + rows * channels;         // [decode_rows][decode_tile]
        sum = scores + decode_rows * decode_tile;  // [row][W], to be added up
        row = sum + rows * W;                   // [row]: maximum
        size = row + (rows + 15) / 16 * 16;
    }
};

/// Lane i becomes the sum of the lanes of x[i].
template <class S>
inline typename S::vf sum_each(typename S::vf (&x)[S::W]) {
    for (int half = S::W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            x[i] = S::interleave_low(x[i], x[i + half]) + S::interleave_high(x[i], x[i + half]);
    return x[0];
}

/// q.k of R rows and `keys` keys of a tile.
template <class S, class U, int R>
__attribute__((noinline)) void decode_scores(const typename U::storage* key, const Rows& layout,
                                             int64_t keys, int64_t ahead, int64_t channels,
                                             const float* query, int64_t depth, float* scores) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    const int64_t whole = layout.stride_channel == 1 ? channels / (W * U::E) * W : 0;
    for (int64_t k0 = 0; k0 < keys; k0 += W) {
        vf sum[R][W];
        for (int j = 0; j < W; ++j) {
            const bool real = k0 + j < keys;
            const typename U::storage* row = key + (real ? k0 + j : keys - 1) * layout.stride_row;
            if (real && k0 + j < ahead)
                prefetch_rows<S>(row + decode_tile * layout.stride_row, layout, 0, 1, channels);
            vf acc[R];
            for (int r = 0; r < R; ++r) acc[r] = vf{};
            for (int64_t u = 0; u < whole; u += W) {
                const vf k = U::from_row(row + u * U::E);
                for (int r = 0; r < R; ++r)
                    acc[r] = U::fma(acc[r], S::load(query + r * depth + u), k);
            }
            for (int64_t u = whole; u < depth; u += W) {
                const vf k = row_units<S, U>(row, layout.stride_channel, u, channels);
                for (int r = 0; r < R; ++r)
                    acc[r] = U::fma(acc[r], S::load(query + r * depth + u), k);
            }
            for (int r = 0; r < R; ++r) sum[r][j] = acc[r];
        }
        for (int r = 0; r < R; ++r) S::store(scores + r * decode_tile + k0, sum_each<S>(sum[r]));
    }
}

/// Scores of one row -> probabilities, in place; keys outside [begin, end) get 0. Returns what O so
/// far is to be multiplied with. `diagonal`: the row's own key, relative to the tile.
template <class S, bool Plain>
inline float decode_softmax(const Scoring& scoring, int64_t begin, int64_t end, int64_t keys,
                            int32_t diagonal, float* scores, float& maximum, float* sum) {
    using L = Lanes<S>;
    using vf = typename S::vf;
    using vi = typename S::vi;
    using vu = typename S::vu;
    constexpr int W = S::W;
    constexpr float infinity = __builtin_inff();
    vi lane;
    for (int w = 0; w < W; ++w) lane[w] = w;
    const vi first = vi{} + static_cast<int32_t>(begin), last = vi{} + static_cast<int32_t>(end);
    vf highest = S::splat(maximum);
    for (int64_t k = 0; k < keys; k += W) {
        const vi key = lane + static_cast<int32_t>(k);
        vf s = S::load(scores + k);
        if constexpr (!Plain) {
            s *= scoring.scale;
            if (scoring.softcap != 0) s = scoring.softcap * L::tanh(s);
            if (scoring.slope != 0)
                s -= scoring.slope * (vf)((vu)S::to_float(diagonal - key) & 0x7fffffffu);
        }
        s = ((key >= first) & (key < last)) ? s : S::splat(-infinity);
        S::store(scores + k, s);
        highest = S::max(s, highest);
    }
    float now = highest[0];
    for (int i = 1; i < W; ++i) now = highest[i] > now ? highest[i] : now;
    const float pivot = now == -infinity ? 0.f : now;
    vf total{};
    for (int64_t k = 0; k < keys; k += W) {
        const vf s = S::load(scores + k);
        vf p = exponential<S, Plain>(scoring, s - pivot);
        p = s == -infinity ? vf{} : p;
        S::store(scores + k, p);
        total += p;
    }
    const float alpha =
        maximum == -infinity ? 0.f : exponential<S, Plain>(scoring, S::splat(maximum - pivot))[0];
    maximum = now;
    S::store(sum, S::load(sum) * alpha + total);
    return alpha;
}

/// O = O * alpha + P V for R rows and keys [first, last); the sum over the tile meets O once.
template <class S, class T, int R>
__attribute__((noinline)) void decode_values(const typename T::storage* value, const Rows& layout,
                                             int64_t first, int64_t last, int64_t ahead,
                                             int64_t channels, const float* p, const float* alpha,
                                             float* out, int64_t pitch) {
    using vf = typename S::vf;
    using storage = typename T::storage;
    constexpr int W = S::W, V = 4;
    int64_t c0 = 0;
    if (layout.stride_channel == 1)
        for (; c0 + V * W <= channels; c0 += V * W) {
            vf acc[R][V];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) acc[r][v] = vf{};
            for (int64_t k = first; k < last; ++k) {
                const storage* row = value + k * layout.stride_row + c0;
                if (k < ahead)
                    prefetch_rows<S>(row + decode_tile * layout.stride_row, layout, 0, 1, V * W);
                vf x[V];
                for (int v = 0; v < V; ++v) x[v] = T::template load<S>(row + v * W);
                for (int r = 0; r < R; ++r) {
                    const vf pr = S::splat_bits(p + r * decode_tile + k);
                    for (int v = 0; v < V; ++v) acc[r][v] += pr * x[v];
                }
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    float* to = out + r * pitch + c0 + v * W;
                    S::store(to, S::load(to) * alpha[r] + acc[r][v]);
                }
        }
    for (; c0 < channels; c0 += W) {
        vf acc[R];
        for (int r = 0; r < R; ++r) acc[r] = vf{};
        for (int64_t k = first; k < last; ++k) {
            const vf x = row_units<S, FloatUnits<S, T>>(value + k * layout.stride_row,
                                                        layout.stride_channel, c0, channels);
            for (int r = 0; r < R; ++r) acc[r] += S::splat_bits(p + r * decode_tile + k) * x;
        }
        for (int r = 0; r < R; ++r) {
            float* to = out + r * pitch + c0;
            S::store(to, S::load(to) * alpha[r] + acc[r]);
        }
    }
}

template <class S, class T>
inline bool rows_finite(const typename T::storage* rows, const Rows& layout, int64_t first,
                        int64_t last, int64_t channels) {
    typename S::vf sum{};  // x * 0 is 0 for finite x, else NaN
    for (int64_t k = first; k < last; ++k)
        for (int64_t c = 0; c < channels; c += S::W)
            sum += row_units<S, FloatUnits<S, T>>(rows + k * layout.stride_row,
                                                  layout.stride_channel, c, channels) *
                   0.f;
    for (int i = 0; i < S::W; ++i)
        if (sum[i] != 0) return false;
    return true;
}

/// O / sum of one row, and its LSE. A row that saw no key: 0, and LSE -inf.
template <class S, class T>
inline void write_row(const ForwardArgs& args, int64_t batch, int64_t head, int64_t row,
                      const float* o, float maximum, float sum) {
    constexpr int W = S::W;
    using storage = typename T::storage;
    storage* to = static_cast<storage*>(args.out.data) + batch * args.out.stride_batch +
                  head * args.out.stride_head + row * args.out.stride_row;
    for (int64_t c = 0; c < args.head_dim_v; c += W) {
        storage buffer[W];
        T::template store<S>(buffer, sum == 0 ? typename S::vf{} : S::load(o + c) / sum);
        for (int64_t i = 0; i < W && c + i < args.head_dim_v; ++i)
            to[(c + i) * args.out.stride_channel] = buffer[i];
    }
    store_lse(args, scoring_of(args, batch, head), batch, head, row, maximum, sum);
}

/// All rows of one key head over keys [key_begin, key_end). `part`, when not null, receives for each
/// row O undivided, its maximum and its sum; else the result is written.
template <class S, class U>
void decode_keys(const ForwardArgs& args, int64_t batch, int64_t head_kv, int64_t key_begin,
                    int64_t key_end, float* memory, float* part) {
    using T = typename U::type;
    using storage = typename U::storage;
    constexpr int W = S::W;
    constexpr float infinity = __builtin_inff();
    const int64_t D = args.head_dim, Dv = args.head_dim_v, Sq = args.seqlen_q;
    const int64_t rows = args.group * Sq;
    const DecodeScratch<S, U> at(args);
    float *query = memory + at.query, *out = memory + at.out, *scores = memory + at.scores;
    float *sum = memory + at.sum, *maximum = memory + at.row;
    const auto row_of = [&](const Rows& where, int64_t r) {
        return static_cast<storage*>(where.data) + batch * where.stride_batch +
               (head_kv * args.group + r / Sq) * where.stride_head + r % Sq * where.stride_row;
    };
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t u = 0; u < at.depth; u += W)
            S::store(query + r * at.depth + u,
                     row_units<S, U>(row_of(args.query, r), args.query.stride_channel, u, D));
        for (int64_t c = 0; c < at.channels; ++c) out[r * at.channels + c] = 0;
        for (int i = 0; i < W; ++i) sum[r * W + i] = 0;
        maximum[r] = -infinity;
    }
    const auto kv = [&](const Rows& where, int64_t k) {
        return static_cast<const storage*>(where.data) + batch * where.stride_batch +
               head_kv * where.stride_head + k * where.stride_row;
    };

    const int64_t first_key = visible_begin(args.visible, int64_t{0});
    const int64_t last_key = visible_end(args.visible, Sq - 1);
    const int64_t stop = last_key < key_end ? last_key : key_end;
    int64_t k0 = key_begin;
    if (first_key > k0) k0 = first_key / decode_tile * decode_tile;
    for (; k0 < stop; k0 += decode_tile) {
        const int64_t keys = stop - k0 < decode_tile ? stop - k0 : decode_tile;
        const int64_t ahead = stop - k0 - decode_tile;  // keys of this tile with one a tile later
        const storage *key = kv(args.key, k0), *value = kv(args.value, k0);
        for (int64_t r0 = 0; r0 < rows; r0 += decode_rows) {
            const int count = static_cast<int>(rows - r0 < decode_rows ? rows - r0 : decode_rows);
            // The first rows to come this way bring the next tile.
            const int64_t wanted = r0 == 0 ? ahead : 0;
            const auto with_rows = [&](auto&& f) {
                switch (count) {
                    case 1: return f(Constant<1>{});
                    case 2: return f(Constant<2>{});
                    case 3: return f(Constant<3>{});
                    default: return f(Constant<decode_rows>{});
                }
            };
            with_rows([&](auto R) {
                decode_scores<S, U, decltype(R)::value>(key, args.key, keys, wanted, D,
                                                        query + r0 * at.depth, at.depth, scores);
            });
            float alpha[decode_rows];
            int64_t begin[decode_rows], end[decode_rows], low = keys, high = 0;
            bool same = true;
            for (int r = 0; r < count; ++r) {
                const int64_t i = (r0 + r) % Sq;
                begin[r] = clamp_key(visible_begin(args.visible, i) - k0, keys);
                end[r] = clamp_key(visible_end(args.visible, i) - k0, keys);
                low = begin[r] < low ? begin[r] : low;
                high = end[r] > high ? end[r] : high;
                same = same && begin[r] == begin[0] && end[r] == end[0];
                const Scoring scoring =
                    scoring_of(args, batch, head_kv * args.group + (r0 + r) / Sq);
                const int32_t diagonal =
                    static_cast<int32_t>(i + args.seqlen_kv - args.seqlen_q - k0);
                alpha[r] = (scoring.plain ? decode_softmax<S, true> : decode_softmax<S, false>)(
                    scoring, begin[r], end[r], keys, diagonal, scores + r * decode_tile,
                    maximum[r0 + r], sum + (r0 + r) * W);
            }
            float* o = out + r0 * at.channels;
            if (low >= high) continue;
            // A hidden row of V may hold NaN, and 0 * NaN is NaN: then each row takes its own keys.
            // What it leaves out would add zeros.
            if (same || rows_finite<S, T>(value, args.value, low, high, Dv))
                with_rows([&](auto R) {
                    decode_values<S, T, decltype(R)::value>(value, args.value, low, high, wanted,
                                                            Dv, scores, alpha, o, at.channels);
                });
            else
                for (int r = 0; r < count; ++r)
                    decode_values<S, T, 1>(value, args.value, begin[r], end[r], 0, Dv,
                                           scores + r * decode_tile, alpha + r,
                                           o + r * at.channels, at.channels);
        }
    }

    for (int64_t r = 0; r < rows; ++r) {
        float total = 0;
        for (int i = 0; i < W; ++i) total += sum[r * W + i];
        if (part) {
            float* to = part + r * (at.channels + 2);
            for (int64_t c = 0; c < at.channels; ++c) to[c] = out[r * at.channels + c];
            to[at.channels] = maximum[r];
            to[at.channels + 1] = total;
        } else {
            write_row<S, T>(args, batch, head_kv * args.group + r / Sq, r % Sq,
                            out + r * at.channels, maximum[r], total);
        }
    }
}

/// Merges the parts of one row, in order. `stride`: floats from one part of the row to the next.
template <class S, class T>
void decode_merge(const ForwardArgs& args, int64_t batch, int64_t head, int64_t row,
                  const float* part, int64_t stride, int64_t parts, float* memory) {
    using vf = typename S::vf;
    constexpr int W = S::W;
    constexpr float infinity = __builtin_inff();
    const int64_t channels = (args.head_dim_v + W - 1) / W * W;
    const Scoring scoring = scoring_of(args, batch, head);
    float maximum = -infinity, total = 0;
    for (int64_t s = 0; s < parts; ++s) {
        const float m = part[s * stride + channels];
        maximum = m > maximum ? m : maximum;
    }
    for (int64_t c = 0; c < channels; ++c) memory[c] = 0;
    for (int64_t s = 0; s < parts; ++s) {
        const float* from = part + s * stride;
        const float m = from[channels];
        if (m == -infinity) {
            // It saw no key, or only such as weigh nothing beside any other; a NaN has to show.
            total += from[channels + 1];
            continue;
        }
        const vf difference = S::splat(m - maximum);
        const float weight = scoring.plain ? exponential<S, true>(scoring, difference)[0]
                                           : exponential<S, false>(scoring, difference)[0];
        for (int64_t c = 0; c < channels; c += W)
            S::store(memory + c, S::load(memory + c) + S::load(from + c) * weight);
        total += from[channels + 1] * weight;
    }
    write_row<S, T>(args, batch, head, row, memory, maximum, total);
}

template <class S, class U>
int64_t decode_scratch_floats(const ForwardArgs& args) {
    return DecodeScratch<S, U>(args).size;
}

/// Floats that one row of a part takes.
template <class S>
int64_t decode_row_floats(const ForwardArgs& args) {
    return (args.head_dim_v + S::W - 1) / S::W * S::W + 2;
}

/// Everything for one element type.
template <class S, class U>
constexpr DtypeKernels dtype_kernels{
    {forward_block<S, U>, forward_scratch_floats<S, U>},
    {decode_keys<S, U>, decode_merge<S, typename U::type>, decode_scratch_floats<S, U>,
     decode_row_floats<S>}};
