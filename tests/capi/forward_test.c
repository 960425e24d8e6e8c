/* The C interface, used the way a C program uses it: C99, only the installed header and library.
 *
 * Each TEST is run by test_c_abi.py in a process of its own: `forward_test NAME VERSION`. A failed
 * check prints where and why, and the process ends with status 1. */
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "umfa/umfa.h"

static void fail_at(int line, const char* text, ...) {
    va_list arguments;
    fprintf(stderr, "line %d: ", line);
    va_start(arguments, text);
    vfprintf(stderr, text, arguments);
    va_end(arguments);
    fprintf(stderr, "\n  last error: %s\n", umfa_last_error());
    exit(1);
}

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) fail_at(__LINE__, "not so: %s", #condition); \
    } while (0)

#define CHECK_OK(call)                                                        \
    do {                                                                      \
        const umfa_status status_ = (call);                                   \
        if (status_ != UMFA_OK) fail_at(__LINE__, "status %d", (int)status_); \
    } while (0)

/* The call fails with `status`, and says so in the promised form, mentioning `text`. */
#define CHECK_FAILS(call, status, text) check_fails(__LINE__, (call), (status), (text))
static void check_fails(int line, umfa_status found, umfa_status expected, const char* text) {
    const char* message = umfa_last_error();
    if (found != expected) fail_at(line, "status %d, not %d", (int)found, (int)expected);
    if (strncmp(message, "[umfa_attention_", 16) != 0) fail_at(line, "no prefix");
    if (!strstr(message, text)) fail_at(line, "the message does not say '%s'", text);
}

#define TEST(name) static void name(void)
static const char* expected_version;

/* ---- tensors ---------------------------------------------------------------------------------- */

typedef struct {
    DLTensor dl;
    int64_t shape[4];
    int64_t strides[4];
} tensor;

static void* allocate(size_t bytes) {
    void* memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) exit(2);
    return memory;
}

static const DLDataType float32 = {kDLFloat, 32, 1};
static const DLDataType bfloat16 = {kDLBfloat, 16, 1};
static const DLDataType boolean = {kDLBool, 8, 1};

/* A compact float32 tensor of zeros, with strides spelled out. `t` must stay where it is. */
static void make(tensor* t, int ndim, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    const int64_t shape[4] = {n0, n1, n2, n3};
    int64_t size = 1;
    int i;
    memset(t, 0, sizeof *t);
    memcpy(t->shape, shape, sizeof shape);
    for (i = ndim - 1; i >= 0; --i) {
        t->strides[i] = size;
        size *= shape[i];
    }
    t->dl.data = allocate((size_t)size * sizeof(float));
    t->dl.device.device_type = kDLCPU;
    t->dl.ndim = ndim;
    t->dl.dtype = float32;
    t->dl.shape = t->shape;
    t->dl.strides = t->strides;
}

static uint32_t random_state = 1;
static float uniform(void) { /* in [-2, 2) */
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / (float)(1 << 22) - 2.0f;
}

static void* element(const DLTensor* t, int64_t i, int64_t j, int64_t k, int64_t l) {
    const int64_t index[4] = {i, j, k, l};
    int64_t offset = 0, compact = 1;
    int axis;
    for (axis = t->ndim - 1; axis >= 0; --axis) {
        offset += index[axis] * (t->strides ? t->strides[axis] : compact);
        compact *= t->shape[axis];
    }
    return (char*)t->data + t->byte_offset + offset * (t->dtype.bits / 8);
}

static double number(const DLTensor* t, int64_t i, int64_t j, int64_t k, int64_t l) {
    const void* address = element(t, i, j, k, l);
    float value;
    if (t->dtype.bits == 16) {
        uint16_t half;
        uint32_t bits;
        memcpy(&half, address, 2);
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, 4);
    } else {
        memcpy(&value, address, 4);
    }
    return value;
}

static void fill(DLTensor* t) {
    int64_t i, j, k, l;
    for (i = 0; i < t->shape[0]; ++i)
        for (j = 0; j < t->shape[1]; ++j)
            for (k = 0; k < t->shape[2]; ++k)
                for (l = 0; l < t->shape[3]; ++l) {
                    const float value = uniform();
                    if (t->dtype.bits == 16) { /* bfloat16: the upper half of a float */
                        uint32_t bits;
                        uint16_t half;
                        memcpy(&bits, &value, 4);
                        half = (uint16_t)(bits >> 16);
                        memcpy(element(t, i, j, k, l), &half, 2);
                    } else {
                        memcpy(element(t, i, j, k, l), &value, 4);
                    }
                }
}

/* ---- the plain double loop that results are compared with ---------------------------------------- */

static double at(const DLTensor* t, int32_t layout, int64_t b, int64_t s, int64_t h, int64_t d) {
    return layout == UMFA_LAYOUT_BSHD ? number(t, b, s, h, d) : number(t, b, h, s, d);
}

/* What a mask of one to four dimensions adds to a score. */
static double masked(const DLTensor* t, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t full[4] = {b, h, i, j};
    int64_t index[4] = {0, 0, 0, 0};
    int axis;
    for (axis = 0; axis < t->ndim; ++axis)
        index[axis] = t->shape[axis] == 1 ? 0 : full[4 - t->ndim + axis];
    if (t->dtype.code == kDLBool)
        return *(const uint8_t*)element(t, index[0], index[1], index[2], index[3]) ? 0 : -INFINITY;
    return number(t, index[0], index[1], index[2], index[3]);
}

static void check_result(int line, const DLTensor* q, const DLTensor* k, const DLTensor* v,
                         const DLTensor* out, const DLTensor* lse,
                         const umfa_attention_options* given) {
    const umfa_attention_options defaults = UMFA_ATTENTION_OPTIONS_INIT;
    const umfa_attention_options* o = given ? given : &defaults;
    const int row = o->layout == UMFA_LAYOUT_BSHD ? 1 : 2, head = 3 - row;
    const int64_t heads = q->shape[head], group = heads / k->shape[head];
    const int64_t seqlen_q = q->shape[row], seqlen_k = k->shape[row];
    const double scale = o->softmax_scale != 0 ? o->softmax_scale : 1 / sqrt((double)q->shape[3]);
    const int narrow = out->dtype.bits == 16;
    const double rtol = narrow ? 8e-3 : 1e-5, atol = narrow ? 5e-3 : 2e-5;
    double* weights = allocate((size_t)seqlen_k * sizeof(double));
    int64_t b, h, i, j, d;
    for (b = 0; b < q->shape[0]; ++b)
        for (h = 0; h < heads; ++h)
            for (i = 0; i < seqlen_q; ++i) {
                const int64_t p =
                    i + (o->causal_alignment == UMFA_ALIGNMENT_TOP_LEFT ? 0 : seqlen_k - seqlen_q);
                double total = 0;
                for (j = 0; j < seqlen_k; ++j) {
                    double score = 0;
                    for (d = 0; d < q->shape[3]; ++d)
                        score +=
                            at(q, o->layout, b, i, h, d) * at(k, o->layout, b, j, h / group, d);
                    score *= scale;
                    if (o->softcap > 0) score = o->softcap * tanh(score / o->softcap);
                    if (o->alibi_slopes)
                        score -= (double)((const float*)o->alibi_slopes->data)[h] *
                                 fabs((double)(p - j));
                    if (o->attn_mask) score += masked(o->attn_mask, b, h, i, j);
                    weights[j] = exp(score);
                    if ((o->window_offsets || o->window_size_left >= 0) &&
                        j < p - o->window_size_left)
                        weights[j] = 0;
                    if (o->causal ? j > p
                                  : (o->window_offsets || o->window_size_right >= 0) &&
                                        j > p + o->window_size_right)
                        weights[j] = 0;
                    if (o->attention_chunk > 0 &&
                        floor((double)(j + o->attention_chunk_offset) /
                              (double)o->attention_chunk) !=
                            floor((double)(p + o->attention_chunk_offset) /
                                  (double)o->attention_chunk))
                        weights[j] = 0;
                    if (o->prefix_lens && j < ((const int64_t*)o->prefix_lens->data)[b])
                        weights[j] = exp(score);
                    total += weights[j];
                }
                for (d = 0; d < v->shape[3]; ++d) {
                    const double found = at(out, o->layout, b, i, h, d);
                    double expected = 0;
                    for (j = 0; j < seqlen_k; ++j)
                        if (weights[j] > 0)
                            expected += weights[j] / total * at(v, o->layout, b, j, h / group, d);
                    if (!(fabs(found - expected) <= atol + rtol * fabs(expected)))
                        fail_at(line, "out of batch %d, row %d, head %d, channel %d: %g, not %g",
                                (int)b, (int)i, (int)h, (int)d, found, expected);
                }
                if (lse) {
                    const double found = number(lse, b, h, i, 0), expected = log(total);
                    if (total > 0 ? !(fabs(found - expected) <= 2e-5) : found != -INFINITY)
                        fail_at(line, "lse of batch %d, head %d, row %d: %g, not %g", (int)b,
                                (int)h, (int)i, found, expected);
                }
            }
    free(weights);
}
#define CHECK_RESULT(...) check_result(__LINE__, __VA_ARGS__)

/* A small problem with its own number everywhere: batch 2, 3 queries heads per key head. */
enum {
    BATCH = 2,
    SEQLEN_Q = 21,
    SEQLEN_K = 37,
    HEADS = 6,
    HEADS_K = 2,
    HEAD_DIM = 20,
    HEAD_DIM_V = 12
};
typedef struct {
    tensor query, key, value, out, lse;
} problem;

static void make_problem(problem* p, int32_t layout) {
    const int bshd = layout == UMFA_LAYOUT_BSHD;
#define SHAPE(s, h, d) BATCH, (bshd ? (s) : (h)), (bshd ? (h) : (s)), (d)
    make(&p->query, 4, SHAPE(SEQLEN_Q, HEADS, HEAD_DIM));
    make(&p->key, 4, SHAPE(SEQLEN_K, HEADS_K, HEAD_DIM));
    make(&p->value, 4, SHAPE(SEQLEN_K, HEADS_K, HEAD_DIM_V));
    make(&p->out, 4, SHAPE(SEQLEN_Q, HEADS, HEAD_DIM_V));
#undef SHAPE
    make(&p->lse, 3, BATCH, HEADS, SEQLEN_Q, 1);
    fill(&p->query.dl);
    fill(&p->key.dl);
    fill(&p->value.dl);
}

static umfa_status run(problem* p, const umfa_attention_options* options) {
    return umfa_attention_forward(&p->query.dl, &p->key.dl, &p->value.dl, &p->out.dl, &p->lse.dl,
                                  options);
}

static umfa_status warmup(problem* p, const umfa_attention_options* options) {
    return umfa_attention_warmup(&p->query.dl, &p->key.dl, &p->value.dl, &p->out.dl, &p->lse.dl,
                                 options);
}

static void check_problem(int line, problem* p, const umfa_attention_options* options) {
    const umfa_status status = run(p, options);
    if (status != UMFA_OK) fail_at(line, "status %d", (int)status);
    check_result(line, &p->query.dl, &p->key.dl, &p->value.dl, &p->out.dl, &p->lse.dl, options);
}
#define CHECK_PROBLEM(p, options) check_problem(__LINE__, (p), (options))

/* ---- tests: results ------------------------------------------------------------------------------ */

TEST(version) {
    CHECK(strcmp(umfa_version(), expected_version) == 0);
    CHECK(umfa_last_error() != NULL);
    CHECK(strlen(umfa_last_error()) == 0);
}

TEST(null_options_and_null_lse) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    CHECK_OK(umfa_attention_forward(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, NULL, NULL));
    CHECK_RESULT(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, NULL, NULL);
}

TEST(log_sum_exp) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    CHECK_PROBLEM(&p, NULL);
}

TEST(null_strides_mean_compact) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    p.query.dl.strides = p.key.dl.strides = p.value.dl.strides = NULL;
    p.out.dl.strides = p.lse.dl.strides = NULL;
    CHECK_PROBLEM(&p, NULL);
}

TEST(initialiser_is_the_default) {
    problem p, q;
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    CHECK(options.struct_size == sizeof options);
    CHECK(options.window_size_left == -1 && options.window_size_right == -1);
    make_problem(&p, UMFA_LAYOUT_BSHD);
    random_state = 1;
    make_problem(&q, UMFA_LAYOUT_BSHD);
    CHECK_OK(run(&p, NULL));
    CHECK_OK(run(&q, &options));
    CHECK(memcmp(p.out.dl.data, q.out.dl.data,
                 sizeof(float) * BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V) == 0);
}

TEST(layout_bhsd) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    options.layout = UMFA_LAYOUT_BHSD;
    make_problem(&p, UMFA_LAYOUT_BHSD);
    CHECK_PROBLEM(&p, &options);
    options.causal = 1;
    CHECK_PROBLEM(&p, &options);
}

TEST(causal_both_ways) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.causal = 1;
    CHECK_PROBLEM(&p, &options);
    options.causal_alignment = UMFA_ALIGNMENT_TOP_LEFT;
    CHECK_PROBLEM(&p, &options);
    /* More queries than keys: the first rows are empty, or the last ones see all keys. */
    make(&p.key, 4, BATCH, 9, HEADS_K, HEAD_DIM);
    make(&p.value, 4, BATCH, 9, HEADS_K, HEAD_DIM_V);
    fill(&p.key.dl);
    fill(&p.value.dl);
    CHECK_PROBLEM(&p, &options);
    options.causal_alignment = UMFA_ALIGNMENT_BOTTOM_RIGHT;
    CHECK_PROBLEM(&p, &options);
    CHECK(number(&p.lse.dl, 0, 0, 0, 0) == -INFINITY);
}

TEST(window) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.window_size_left = 5;
    CHECK_PROBLEM(&p, &options);
    options.window_size_right = 2;
    CHECK_PROBLEM(&p, &options);
    options.causal = 1;
    CHECK_PROBLEM(&p, &options);
}

TEST(prefix_and_chunks) {
    static int64_t lengths[BATCH] = {11, 0};
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    tensor prefix;
    int layout;
    make(&prefix, 1, BATCH, 1, 1, 1);
    prefix.dl.dtype.code = kDLInt;
    prefix.dl.dtype.bits = 64;
    prefix.dl.data = lengths;
    options.causal = 1;
    for (layout = 0; layout < 2; ++layout) {
        options.layout = layout;
        make_problem(&p, layout);
        options.prefix_lens = &prefix.dl;
        CHECK_PROBLEM(&p, &options);
        options.window_size_left = 3;
        CHECK_PROBLEM(&p, &options);
        options.window_size_left = -1;
        options.attention_chunk = 7;
        options.attention_chunk_offset = -3;
        CHECK_PROBLEM(&p, &options);
        options.prefix_lens = NULL;
        CHECK_PROBLEM(&p, &options);
        options.attention_chunk = options.attention_chunk_offset = 0;
    }
    options.prefix_lens = &prefix.dl;
    lengths[1] = -1;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "prefix_lens[1] is out of range; got -1");
    options.prefix_lens = NULL;
    options.attention_chunk_offset = 2;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "attention_chunk_offset needs");
}

/* The last query has the same bits alone and with the others. */
TEST(batch_invariant) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    const size_t row = sizeof(float) * HEADS * HEAD_DIM_V;
    float* whole = allocate(BATCH * row);
    problem p;
    int b;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.batch_invariant = 1;
    CHECK_PROBLEM(&p, &options);
    for (b = 0; b < BATCH; ++b)
        memcpy((char*)whole + (size_t)b * row,
               (char*)p.out.dl.data + (size_t)(b * SEQLEN_Q + SEQLEN_Q - 1) * row, row);
    p.query.dl.data = (float*)p.query.dl.data + (SEQLEN_Q - 1) * HEADS * HEAD_DIM;
    p.query.shape[1] = p.out.shape[1] = p.lse.shape[2] = 1;
    CHECK_OK(run(&p, &options));
    for (b = 0; b < BATCH; ++b)
        CHECK(memcmp((char*)whole + (size_t)b * row,
                     (char*)p.out.dl.data + (size_t)(b * SEQLEN_Q) * row, row) == 0);
    free(whole);
}

TEST(window_beside_the_diagonal) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.window_offsets = 1;
    options.window_size_left = 12;
    options.window_size_right = -3;
    CHECK_PROBLEM(&p, &options);
    options.window_size_left = INT32_MAX;
    CHECK_PROBLEM(&p, &options);
    options.window_size_right = (int64_t)1 << 31;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "2147483648");
    options.window_size_right = -((int64_t)1 << 31);
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "-2147483648");
}

/* Packed new rows in a cache with room for them. Sequences have different numbers of them. */
TEST(new_rows_of_each_sequence) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    static const int32_t used[2] = {3, 1}, starts[3] = {1, 3, 7};
    tensor cache_k, cache_v, query, new_k, new_v, used_table, starts_table, out;
    int b, j, d;
    make(&query, 4, 2, 1, 1, 8);
    make(&cache_k, 4, 2, 6, 1, 8);
    make(&cache_v, 4, 2, 6, 1, 8);
    make(&new_k, 3, 8, 1, 8, 1);
    make(&new_v, 3, 8, 1, 8, 1);
    make(&out, 4, 2, 1, 1, 8);
    make(&used_table, 1, 2, 1, 1, 1);
    make(&starts_table, 1, 3, 1, 1, 1);
    used_table.dl.dtype.code = starts_table.dl.dtype.code = kDLInt;
    used_table.dl.data = (void*)used;
    starts_table.dl.data = (void*)starts;
    options.new_key = &new_k.dl;
    options.new_value = &new_v.dl;
    options.seqused_k = &used_table.dl;
    options.cu_seqlens_k_new = &starts_table.dl;
    CHECK_OK(umfa_attention_forward(&query.dl, &cache_k.dl, &cache_v.dl, &out.dl, NULL, &options));
    for (b = 0; b < 2; ++b)
        for (j = starts[b]; j < starts[b + 1]; ++j)
            for (d = 0; d < 8; ++d) {
                const int to = ((b * 6) + used[b] + j - starts[b]) * 8 + d, from = j * 8 + d;
                CHECK(((float*)cache_k.dl.data)[to] == ((float*)new_k.dl.data)[from]);
                CHECK(((float*)cache_v.dl.data)[to] == ((float*)new_v.dl.data)[from]);
            }
    options.new_key = options.new_value = NULL;
    CHECK_FAILS(
        umfa_attention_forward(&query.dl, &cache_k.dl, &cache_v.dl, &out.dl, NULL, &options),
        UMFA_ERROR_VALUE, "cu_seqlens_k_new is for new keys");
}

TEST(scale_softcap_and_alibi) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    tensor slopes;
    int i;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.softmax_scale = 0.7;
    CHECK_PROBLEM(&p, &options);
    options.softcap = 3;
    CHECK_PROBLEM(&p, &options);
    make(&slopes, 1, HEADS, 1, 1, 1);
    for (i = 0; i < HEADS; ++i) ((float*)slopes.dl.data)[i] = 0.05f * (float)(i + 1);
    options.alibi_slopes = &slopes.dl;
    CHECK_PROBLEM(&p, &options);
}

TEST(dense_masks) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    tensor mask;
    int64_t i;
    int layout;
    options.attn_mask = &mask.dl;
    for (layout = 0; layout < 2; ++layout) {
        options.layout = layout;
        make_problem(&p, layout);
        make(&mask, 4, BATCH, HEADS, SEQLEN_Q, SEQLEN_K);
        fill(&mask.dl);
        CHECK_PROBLEM(&p, &options);
        make(&mask, 4, BATCH, 1, 1, SEQLEN_K);
        fill(&mask.dl);
        CHECK_PROBLEM(&p, &options);
        options.causal = 1;
        CHECK_PROBLEM(&p, &options);
        options.causal = 0;
        /* Booleans, one byte each, of two dimensions; the third row sees nothing. */
        make(&mask, 2, SEQLEN_Q, SEQLEN_K, 1, 1);
        mask.dl.dtype = boolean;
        for (i = 0; i < SEQLEN_Q * SEQLEN_K; ++i)
            ((uint8_t*)mask.dl.data)[i] = i / SEQLEN_K != 2 && uniform() > -1;
        CHECK_PROBLEM(&p, &options);
        CHECK(number(&p.lse.dl, 0, 0, 2, 0) == -INFINITY);
        make(&mask, 1, SEQLEN_K + 1, 1, 1, 1);
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE,
                    "attn_mask has the wrong shape; got (38,)");
        make(&mask, 1, SEQLEN_K, 1, 1, 1);
        mask.dl.dtype.code = kDLInt;
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_TYPE, "attn_mask has the wrong dtype; got int32");
    }
}

TEST(strides_and_offsets) {
    problem p;
    tensor memory;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    /* query: every second number of longer rows, starting at the second */
    make(&memory, 4, BATCH, SEQLEN_Q, HEADS, 2 * HEAD_DIM);
    p.query.dl.data = memory.dl.data;
    p.query.dl.byte_offset = sizeof(float);
    memcpy(p.query.strides, memory.strides, sizeof memory.strides);
    p.query.strides[3] = 2;
    fill(&p.query.dl);
    /* key: backwards in the sequence, stored as (heads, seqlen, head_dim, batch) */
    make(&memory, 4, HEADS_K, SEQLEN_K, HEAD_DIM, BATCH);
    p.key.dl.data = memory.dl.data;
    p.key.dl.byte_offset = (uint64_t)((SEQLEN_K - 1) * memory.strides[1]) * sizeof(float);
    p.key.strides[0] = memory.strides[3];
    p.key.strides[1] = -memory.strides[1];
    p.key.strides[2] = memory.strides[0];
    p.key.strides[3] = memory.strides[2];
    fill(&p.key.dl);
    /* value: one batch for all */
    p.value.strides[0] = 0;
    /* out: a slice of longer rows, and what lies between them must stay */
    make(&memory, 4, BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V + 3);
    memset(memory.dl.data, 0x5a, sizeof(float) * BATCH * SEQLEN_Q * HEADS * (HEAD_DIM_V + 3));
    p.out.dl.data = memory.dl.data;
    p.out.dl.byte_offset = 2 * sizeof(float);
    memcpy(p.out.strides, memory.strides, sizeof memory.strides);
    CHECK_PROBLEM(&p, NULL);
    {
        int64_t row;
        for (row = 0; row < BATCH * SEQLEN_Q * HEADS; ++row) {
            const unsigned char* bytes = (const unsigned char*)memory.dl.data +
                                         row * (HEAD_DIM_V + 3) * (int64_t)sizeof(float);
            size_t i;
            for (i = 0; i < 2 * sizeof(float); ++i) CHECK(bytes[i] == 0x5a);
            for (i = 0; i < sizeof(float); ++i)
                CHECK(bytes[(HEAD_DIM_V + 2) * sizeof(float) + i] == 0x5a);
        }
    }
}

TEST(bfloat16_tensors) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    p.query.dl.dtype = p.key.dl.dtype = p.value.dl.dtype = p.out.dl.dtype = bfloat16;
    fill(&p.query.dl);
    fill(&p.key.dl);
    fill(&p.value.dl);
    CHECK_PROBLEM(&p, NULL);
}

TEST(different_dtypes) {
    int i;
    for (i = 0; i < 16; ++i) { /* float32 arithmetic: as exact as the dtype of out */
        problem p;
        make_problem(&p, UMFA_LAYOUT_BSHD);
        if (i & 1) p.query.dl.dtype = bfloat16;
        if (i & 2) p.key.dl.dtype = bfloat16;
        if (i & 4) p.value.dl.dtype = bfloat16;
        if (i & 8) p.out.dl.dtype = bfloat16;
        fill(&p.query.dl);
        fill(&p.key.dl);
        fill(&p.value.dl);
        CHECK_PROBLEM(&p, NULL);
    }
}

TEST(quantised_keys) {
    static const DLDataType int8 = {kDLInt, 8, 1};
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    tensor codes, scales;
    int64_t b, j, h, d;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    make(&codes, 4, BATCH, SEQLEN_K, HEADS_K, HEAD_DIM);
    make(&scales, 4, BATCH, SEQLEN_K, HEADS_K, 1);
    codes.dl.dtype = int8;
    for (b = 0; b < BATCH; ++b)
        for (j = 0; j < SEQLEN_K; ++j)
            for (h = 0; h < HEADS_K; ++h) {
                const float scale = (uniform() + 3) / 127;
                memcpy(element(&scales.dl, b, j, h, 0), &scale, 4);
                for (d = 0; d < HEAD_DIM; ++d) {
                    const int8_t code = (int8_t)(uniform() * 60);
                    const float x = scale * (float)code;
                    memcpy(element(&codes.dl, b, j, h, d), &code, 1);
                    memcpy(element(&p.key.dl, b, j, h, d), &x, 4);
                }
            }
    options.key_scales = &scales.dl;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "key has scales or zero points and no format");
    options.key_format = "int8 row none float32 0 0 20";
    CHECK_OK(umfa_attention_forward(&p.query.dl, &codes.dl, &p.value.dl, &p.out.dl, &p.lse.dl,
                                    &options));
    CHECK_RESULT(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, &p.lse.dl, NULL);
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_TYPE, "key has the wrong dtype; got float32");
    options.key_format = "int8 row none float32 0 0";
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE,
                "options->key_format is not the text of a format; got 'int8 row none float32 0 0'");
}

/* Rows of multiples of one number, 127 times it among them, which rounding to int8 does not change. */
static void fill_with_codes(const tensor* t, int64_t rows, int64_t heads) {
    int64_t b, i, h, d;
    for (b = 0; b < BATCH; ++b)
        for (i = 0; i < rows; ++i)
            for (h = 0; h < heads; ++h) {
                const float scale = (uniform() + 3) / 127;
                for (d = 0; d < HEAD_DIM; ++d) {
                    const float x = scale * (d == 0 ? 127 : (float)(int)(uniform() * 60));
                    memcpy(element(&t->dl, b, i, h, d), &x, 4);
                }
            }
}

TEST(quantised_scores) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.smooth_k = 0;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "smooth_k is for a quant_mode that quantises");
    options.quant_mode = UMFA_QUANT_MODE_SAGE;
    fill_with_codes(&p.query, SEQLEN_Q, HEADS);
    fill_with_codes(&p.key, SEQLEN_K, HEADS_K);
    CHECK_OK(run(&p, &options));
    CHECK_RESULT(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, &p.lse.dl, NULL);
    options.quant_mode = UMFA_QUANT_MODE_INT8 + 1;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE,
                "options->quant_mode is unknown; got 3; expected 0 to 2");
}

TEST(dtype_of_the_result) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    tensor weights;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.out_dtype = UMFA_DTYPE_BFLOAT16;
    CHECK_OK(umfa_attention_can_run(&p.query.dl, &p.key.dl, &p.value.dl, &options));
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_TYPE,
                "out and out_dtype differ; got float32 and bfloat16; expected one dtype");
    p.out.dl.dtype = bfloat16;
    CHECK_PROBLEM(&p, &options);
    options.out_dtype = UMFA_DTYPE_BFLOAT16 + 1;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE,
                "options->out_dtype is unknown; got 4; expected 0 to 3");
    options.out_dtype = UMFA_DTYPE_FLOAT32;
    make(&weights, 4, BATCH, HEADS, SEQLEN_Q, SEQLEN_K);
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, &p.key.dl, &weights.dl, &options),
                UMFA_ERROR_TYPE, "out_dtype is for out; got float32");
}

TEST(no_keys_and_no_queries) {
    problem p;
    int i;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    memset(p.out.dl.data, 0x5a, sizeof(float) * BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V);
    p.key.shape[1] = p.value.shape[1] = 0;
    p.key.dl.data = p.value.dl.data = NULL; /* as DLPack says of tensors without elements */
    CHECK_OK(run(&p, NULL));
    for (i = 0; i < BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V; ++i)
        CHECK(((float*)p.out.dl.data)[i] == 0.0f);
    for (i = 0; i < BATCH * HEADS * SEQLEN_Q; ++i) CHECK(((float*)p.lse.dl.data)[i] == -INFINITY);
    p.query.shape[1] = p.out.shape[1] = p.lse.shape[2] = 0;
    p.query.dl.data = p.out.dl.data = p.lse.dl.data = NULL;
    CHECK_OK(run(&p, NULL));
}

/* ---- tests: struct_size -------------------------------------------------------------------------- */

TEST(struct_size_of_an_older_caller) {
    umfa_attention_options older = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    /* A caller that knows only the first fields: what lies behind is not the library's to read. */
    memset((char*)&older + offsetof(umfa_attention_options, window_size_left), 0x5a,
           sizeof older - offsetof(umfa_attention_options, window_size_left));
    older.struct_size = offsetof(umfa_attention_options, window_size_left);
    older.causal = 1;
    CHECK_OK(run(&p, &older));
    {
        umfa_attention_options same = UMFA_ATTENTION_OPTIONS_INIT;
        same.causal = 1;
        CHECK_RESULT(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, &p.lse.dl, &same);
    }
}

TEST(struct_size_of_a_newer_caller) {
    struct {
        umfa_attention_options options;
        unsigned char more[64];
    } newer = {UMFA_ATTENTION_OPTIONS_INIT, {0}};
    char size[32];
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    newer.options.struct_size = sizeof newer;
    newer.options.softcap = 2;
    CHECK_PROBLEM(&p, &newer.options); /* new fields left at 0 ask for nothing new */
    newer.more[40] = 1;
    snprintf(size, sizeof size, "%u", (unsigned)sizeof newer);
    CHECK_FAILS(run(&p, &newer.options), UMFA_ERROR_UNSUPPORTED, size);
}

TEST(struct_size_forgotten) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.struct_size = 0;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "struct_size");
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "got 0");
    options.struct_size = sizeof(size_t) - 1;
    CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "got 7");
}

/* ---- tests: errors ------------------------------------------------------------------------------- */

TEST(null_tensors) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
#define FORWARD(q, k, v, o) umfa_attention_forward(q, k, v, o, NULL, NULL)
    CHECK_FAILS(FORWARD(NULL, &p.key.dl, &p.value.dl, &p.out.dl), UMFA_ERROR_VALUE, "query");
    CHECK_FAILS(FORWARD(&p.query.dl, NULL, &p.value.dl, &p.out.dl), UMFA_ERROR_VALUE, "key");
    CHECK_FAILS(FORWARD(&p.query.dl, &p.key.dl, NULL, &p.out.dl), UMFA_ERROR_VALUE, "value");
    CHECK_FAILS(FORWARD(&p.query.dl, &p.key.dl, &p.value.dl, NULL), UMFA_ERROR_VALUE, "out");
    CHECK_FAILS(FORWARD(NULL, NULL, NULL, NULL), UMFA_ERROR_VALUE, "NULL");
#undef FORWARD
    p.key.dl.data = NULL;
    CHECK_FAILS(run(&p, NULL), UMFA_ERROR_VALUE, "key");
}

/* One field of one operand, wrong for the length of a call that must fail. */
#define WITH(field, wrong, status, text)           \
    do {                                           \
        problem p_ = p;                            \
        repoint(&p_);                              \
        (p_.field) = (wrong);                      \
        CHECK_FAILS(run(&p_, NULL), status, text); \
    } while (0)
static void repoint(problem* p) {
    tensor* tensors[5];
    int i;
    tensors[0] = &p->query, tensors[1] = &p->key, tensors[2] = &p->value;
    tensors[3] = &p->out, tensors[4] = &p->lse;
    for (i = 0; i < 5; ++i) {
        tensors[i]->dl.shape = tensors[i]->shape;
        tensors[i]->dl.strides = tensors[i]->strides;
    }
}

TEST(wrong_dtype) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    WITH(key.dl.dtype.code, kDLInt, UMFA_ERROR_TYPE, "int32");
    WITH(value.dl.dtype.code, kDLBool, UMFA_ERROR_TYPE, "bool");
    WITH(query.dl.dtype.code, kDLBool, UMFA_ERROR_TYPE, "bool");
    WITH(query.dl.dtype.code, 99, UMFA_ERROR_TYPE, "99");
    WITH(query.dl.dtype.lanes, 4, UMFA_ERROR_TYPE, "x4");
    WITH(out.dl.dtype.code, kDLInt, UMFA_ERROR_TYPE, "out has the wrong dtype; got int32");
    WITH(out.dl.dtype.bits, 64, UMFA_ERROR_UNSUPPORTED, "out has the wrong dtype; got float64");
    WITH(lse.dl.dtype, bfloat16, UMFA_ERROR_TYPE, "bfloat16");
    p.query.dl.dtype.bits = p.key.dl.dtype.bits = p.value.dl.dtype.bits = 64;
    CHECK_FAILS(run(&p, NULL), UMFA_ERROR_UNSUPPORTED, "float64");
}

TEST(wrong_device) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    /* Types are enumerators in some headers and integers in others: bytes fit both. */
    {
        const int32_t cuda = 2;
        const int32_t nonsense = 777;
        memcpy(&p.key.dl.device.device_type, &cuda, sizeof cuda);
        CHECK_FAILS(run(&p, NULL), UMFA_ERROR_VALUE, "cuda");
        memcpy(&p.key.dl.device.device_type, &nonsense, sizeof nonsense);
        CHECK_FAILS(run(&p, NULL), UMFA_ERROR_VALUE, "777");
    }
}

TEST(wrong_shape) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    WITH(key.shape[0], 1, UMFA_ERROR_VALUE, "batch");
    WITH(key.shape[3], 19, UMFA_ERROR_VALUE, "19");
    WITH(value.shape[1], 36, UMFA_ERROR_VALUE, "36");
    WITH(value.shape[2], 1, UMFA_ERROR_VALUE, "nheads");
    WITH(query.shape[2], 5, UMFA_ERROR_VALUE, "5");
    WITH(query.shape[1], -3, UMFA_ERROR_VALUE, "-3");
    WITH(query.shape[1], INT64_MAX, UMFA_ERROR_VALUE, "9223372036854775807");
    WITH(query.dl.ndim, 3, UMFA_ERROR_VALUE, "3");
    WITH(query.dl.ndim, -1, UMFA_ERROR_VALUE, "-1");
    WITH(query.dl.ndim, 1000000, UMFA_ERROR_VALUE, "1000000");
    WITH(query.dl.shape, NULL, UMFA_ERROR_VALUE, "shape");
    WITH(query.strides[0], INT64_MAX, UMFA_ERROR_VALUE, "9223372036854775807");
    WITH(query.strides[1], INT64_MIN, UMFA_ERROR_VALUE, "-9223372036854775808");
    WITH(query.dl.byte_offset, 2, UMFA_ERROR_VALUE, "aligned");
    WITH(out.shape[1], SEQLEN_Q - 1, UMFA_ERROR_VALUE, "out");
    WITH(out.shape[3], HEAD_DIM, UMFA_ERROR_VALUE, "out");
    WITH(lse.shape[1], SEQLEN_Q, UMFA_ERROR_VALUE, "lse");
    WITH(lse.dl.ndim, 2, UMFA_ERROR_VALUE, "lse");
    p.query.shape[3] = p.key.shape[3] = 0;
    CHECK_FAILS(run(&p, NULL), UMFA_ERROR_VALUE, "got 0");
    p.query.shape[3] = p.key.shape[3] = 577;
    CHECK_FAILS(run(&p, NULL), UMFA_ERROR_UNSUPPORTED, "577");
}

TEST(wrong_options) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
#define OPTION(field, wrong, text)                                    \
    do {                                                              \
        umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT; \
        options.field = (wrong);                                      \
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, text);       \
    } while (0)
    OPTION(layout, 2, "got 2");
    OPTION(layout, -1, "got -1");
    OPTION(causal, 3, "got 3");
    OPTION(causal_alignment, 2, "got 2");
    OPTION(backend, 3, "got 3");
    OPTION(window_size_left, -2, "got -2");
    OPTION(window_size_right, (int64_t)1 << 31, "2147483648");
    OPTION(window_size_left, INT64_MAX, "9223372036854775807");
    OPTION(window_size_left, INT64_MIN, "-9223372036854775808");
    OPTION(softmax_scale, NAN, "nan");
    OPTION(softmax_scale, -INFINITY, "-inf");
    OPTION(softmax_scale, 1e300, "1e+300");
    OPTION(softcap, -1, "got -1");
    OPTION(softcap, NAN, "nan");
    OPTION(softcap, INFINITY, "inf");
#undef OPTION
    {
        umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
        tensor slopes;
        make(&slopes, 1, HEADS + 1, 1, 1, 1);
        options.alibi_slopes = &slopes.dl;
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "(7,)");
        make(&slopes, 1, HEADS, 1, 1, 1);
        slopes.dl.dtype.bits = 16;
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_TYPE, "float16");
    }
}

TEST(out_must_not_overlap) {
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    WITH(out.dl.data, p.query.dl.data, UMFA_ERROR_VALUE, "overlap");
    WITH(out.dl.data, p.value.dl.data, UMFA_ERROR_VALUE, "overlap");
    WITH(lse.dl.data, p.out.dl.data, UMFA_ERROR_VALUE,
         "] lse overlaps out in memory; got overlapping ranges of addresses; "
         "expected memory of its own, since out is also written");
    WITH(out.strides[0], 0, UMFA_ERROR_VALUE, "out");
    {
        umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
        tensor slopes;
        make(&slopes, 1, HEADS, 1, 1, 1);
        options.alibi_slopes = &slopes.dl;
        slopes.dl.data = p.out.dl.data;
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "out overlaps alibi_slopes");
        slopes.dl.data = p.lse.dl.data;
        CHECK_FAILS(run(&p, &options), UMFA_ERROR_VALUE, "] lse overlaps alibi_slopes");
    }
}

TEST(failure_writes_nothing) {
    const size_t bytes = sizeof(float) * BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V;
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    size_t i;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    memset(p.out.dl.data, 0x5a, bytes);
    options.softcap = -1;
    CHECK(run(&p, &options) == UMFA_ERROR_VALUE);
    p.lse.shape[2] = 1;
    CHECK(run(&p, NULL) == UMFA_ERROR_VALUE);
    for (i = 0; i < bytes; ++i) CHECK(((unsigned char*)p.out.dl.data)[i] == 0x5a);
}

TEST(success_keeps_the_last_error) {
    problem p;
    char before[512];
    make_problem(&p, UMFA_LAYOUT_BSHD);
    CHECK(umfa_attention_forward(NULL, NULL, NULL, NULL, NULL, NULL) == UMFA_ERROR_VALUE);
    snprintf(before, sizeof before, "%s", umfa_last_error());
    CHECK_OK(run(&p, NULL));
    CHECK(strcmp(before, umfa_last_error()) == 0);
}

/* ---- tests: compiling ahead --------------------------------------------------------------------- */

TEST(warmup_computes_nothing) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    int64_t i;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    memset(p.out.dl.data, 0x5a, sizeof(float) * BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V);
    memset(p.lse.dl.data, 0x5a, sizeof(float) * BATCH * HEADS * SEQLEN_Q);
    CHECK_OK(warmup(&p, NULL));
    options.backend = UMFA_BACKEND_CPU;
    options.causal = 1;
    CHECK_OK(warmup(&p, &options));
    CHECK_OK(umfa_attention_warmup(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, NULL, &options));
    for (i = 0; i < BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V; ++i)
        CHECK(((unsigned char*)p.out.dl.data)[i * (int64_t)sizeof(float)] == 0x5a);
    for (i = 0; i < BATCH * HEADS * SEQLEN_Q; ++i)
        CHECK(((unsigned char*)p.lse.dl.data)[i * (int64_t)sizeof(float)] == 0x5a);
}

TEST(warmup_that_cannot_be) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    options.softmax_scale = NAN;
    CHECK_FAILS(
        warmup(&p, &options), UMFA_ERROR_VALUE,
        "[umfa_attention_warmup] softmax_scale is not a number of float32's range; got nan");
    options.softmax_scale = 0;
    options.backend = 9;
    CHECK_FAILS(warmup(&p, &options), UMFA_ERROR_VALUE, "options->backend is unknown; got 9");
    options.backend = UMFA_BACKEND_CPU;
    CHECK_FAILS(umfa_attention_warmup(&p.query.dl, &p.key.dl, &p.value.dl, NULL, NULL, &options),
                UMFA_ERROR_VALUE, "[umfa_attention_warmup] out is missing; got NULL");
    p.out.dl.data = p.query.dl.data;
    CHECK_FAILS(warmup(&p, &options), UMFA_ERROR_VALUE, "out overlaps query");
}

/* ---- tests: merging partial results ----------------------------------------------------------------- */

enum { PARTS = 3 };

/* Results of the keys in three parts, of which the second is empty. */
static void make_parts(problem* p, tensor* out_partial, tensor* lse_partial) {
    static const int64_t cuts[PARTS + 1] = {0, 15, 15, SEQLEN_K};
    const int64_t part_size = (int64_t)BATCH * SEQLEN_Q * HEADS;
    int64_t b, h, i, size[5] = {PARTS, BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V};
    int part;
    static int64_t shape[5];
    make(out_partial, 4, PARTS * BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V);
    make(lse_partial, 4, PARTS, BATCH, SEQLEN_Q, HEADS);
    for (part = 0; part < PARTS; ++part) {
        tensor key = p->key, value = p->value, out = p->out;
        key.shape[1] = value.shape[1] = cuts[part + 1] - cuts[part];
        key.dl.shape = key.shape;
        value.dl.shape = value.shape;
        key.dl.byte_offset = (uint64_t)(cuts[part] * key.strides[1]) * sizeof(float);
        value.dl.byte_offset = (uint64_t)(cuts[part] * value.strides[1]) * sizeof(float);
        out.dl.data = (float*)out_partial->dl.data + part * part_size * HEAD_DIM_V;
        CHECK_OK(
            umfa_attention_forward(&p->query.dl, &key.dl, &value.dl, &out.dl, &p->lse.dl, NULL));
        for (b = 0; b < BATCH; ++b)
            for (i = 0; i < SEQLEN_Q; ++i)
                for (h = 0; h < HEADS; ++h)
                    *(float*)element(&lse_partial->dl, part, b, i, h) =
                        (float)number(&p->lse.dl, b, h, i, 0);
    }
    memcpy(shape, size, sizeof shape);
    out_partial->dl.ndim = 5;
    out_partial->dl.shape = shape;
    out_partial->dl.strides = NULL;
}

TEST(combine) {
    problem p;
    tensor out_partial, lse_partial, lse;
    int64_t b, h, i;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    make_parts(&p, &out_partial, &lse_partial);
    make(&lse, 3, BATCH, SEQLEN_Q, HEADS, 1);
    memset(p.out.dl.data, 0x5a, sizeof(float) * BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V);
    CHECK_OK(umfa_attention_combine_can_run(&out_partial.dl, &lse_partial.dl, UMFA_BACKEND_AUTO));
    CHECK_OK(umfa_attention_combine_warmup(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl,
                                           UMFA_BACKEND_CPU));
    for (i = 0; i < BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V; ++i)
        CHECK(((unsigned char*)p.out.dl.data)[i * (int64_t)sizeof(float)] == 0x5a);
    CHECK_OK(umfa_attention_combine(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl,
                                    UMFA_BACKEND_CPU));
    for (b = 0; b < BATCH; ++b)
        for (i = 0; i < SEQLEN_Q; ++i)
            for (h = 0; h < HEADS; ++h)
                *(float*)element(&p.lse.dl, b, h, i, 0) = (float)number(&lse.dl, b, i, h, 0);
    CHECK_RESULT(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, &p.lse.dl, NULL);
}

TEST(combine_that_cannot_be) {
    problem p;
    tensor out_partial, lse_partial, lse;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    make_parts(&p, &out_partial, &lse_partial);
    make(&lse, 3, BATCH, SEQLEN_Q, HEADS, 1);
#define COMBINE(a, b, c, d, e) umfa_attention_combine(a, b, c, d, e)
    CHECK_FAILS(COMBINE(NULL, &lse_partial.dl, &p.out.dl, &lse.dl, 0), UMFA_ERROR_VALUE,
                "out_partial is missing");
    CHECK_FAILS(COMBINE(&out_partial.dl, &lse_partial.dl, &p.out.dl, NULL, 0), UMFA_ERROR_VALUE,
                "lse is missing");
    CHECK_FAILS(COMBINE(&out_partial.dl, &lse_partial.dl, &p.out.dl, &p.lse.dl, 0),
                UMFA_ERROR_VALUE, "] lse has the wrong shape");
    CHECK_FAILS(COMBINE(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl, 7), UMFA_ERROR_VALUE,
                "backend is unknown; got 7");
    lse.dl.data = p.out.dl.data;
    CHECK_FAILS(COMBINE(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl, 0), UMFA_ERROR_VALUE,
                "] lse overlaps out in memory; got overlapping ranges of addresses; "
                "expected memory of its own, since out is also written");
    p.out.dl.data = out_partial.dl.data;
    CHECK_FAILS(COMBINE(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl, 0), UMFA_ERROR_VALUE,
                "out overlaps out_partial");
    CHECK_FAILS(
        umfa_attention_combine_warmup(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl, 0),
        UMFA_ERROR_VALUE, "out overlaps out_partial");
    CHECK_FAILS(
        umfa_attention_combine_warmup(&out_partial.dl, &lse_partial.dl, &p.out.dl, &lse.dl, 9),
        UMFA_ERROR_VALUE, "backend is unknown; got 9");
    lse_partial.shape[0] = 2;
    CHECK_FAILS(umfa_attention_combine_can_run(&out_partial.dl, &lse_partial.dl, 0),
                UMFA_ERROR_VALUE, "lse_partial has the wrong shape; got (2, ");
#undef COMBINE
}

/* ---- tests: gradients ------------------------------------------------------------------------------- */

/* sum(out * dout) + sum(lse * dlse) */
static double loss(problem* p, const umfa_attention_options* options, const tensor* dout,
                   const tensor* dlse) {
    double sum = 0;
    int64_t i;
    CHECK_OK(umfa_attention_forward(&p->query.dl, &p->key.dl, &p->value.dl, &p->out.dl, &p->lse.dl,
                                    options));
    for (i = 0; i < BATCH * SEQLEN_Q * HEADS * HEAD_DIM_V; ++i)
        sum += (double)((float*)p->out.dl.data)[i] * ((float*)dout->dl.data)[i];
    for (i = 0; i < BATCH * HEADS * SEQLEN_Q; ++i)
        sum += (double)((float*)p->lse.dl.data)[i] * ((float*)dlse->dl.data)[i];
    return sum;
}

TEST(gradients_are_finite_differences) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    umfa_attention_gradients gradients = UMFA_ATTENTION_GRADIENTS_INIT;
    problem p;
    tensor dout, dlse, dquery, dkey, dvalue, sinks, dsinks;
    const float step = 0.05f;
    int64_t i, n;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    make(&dout, 4, BATCH, SEQLEN_Q, HEADS, HEAD_DIM_V);
    make(&dlse, 3, BATCH, HEADS, SEQLEN_Q, 1);
    make(&sinks, 1, HEADS, 1, 1, 1);
    make(&dsinks, 1, HEADS, 1, 1, 1);
    make(&dquery, 4, p.query.shape[0], p.query.shape[1], p.query.shape[2], p.query.shape[3]);
    make(&dkey, 4, p.key.shape[0], p.key.shape[1], p.key.shape[2], p.key.shape[3]);
    make(&dvalue, 4, p.value.shape[0], p.value.shape[1], p.value.shape[2], p.value.shape[3]);
    fill(&dout.dl);
    for (i = 0; i < BATCH * HEADS * SEQLEN_Q; ++i) ((float*)dlse.dl.data)[i] = uniform();
    for (i = 0; i < HEADS; ++i) ((float*)sinks.dl.data)[i] = uniform();
    options.causal = 1;
    options.learnable_sink = &sinks.dl;
    gradients.dquery = &dquery.dl;
    gradients.dkey = &dkey.dl;
    gradients.dvalue = &dvalue.dl;
    gradients.dsinks = &dsinks.dl;
    (void)loss(&p, &options, &dout, &dlse);
    CHECK_OK(umfa_attention_backward(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, &p.lse.dl,
                                     &dout.dl, &dlse.dl, &gradients, &options));
    for (n = 0; n < 4; ++n) {
        DLTensor* of[] = {&p.query.dl, &p.key.dl, &p.value.dl, &sinks.dl};
        DLTensor* found[] = {&dquery.dl, &dkey.dl, &dvalue.dl, &dsinks.dl};
        const int64_t last = n == 3 ? HEADS - 1 : 36;
        for (i = 0; i <= last; ++i) {
            float* x = (float*)of[n]->data + i;
            const float was = *x;
            double up, down, expected;
            const double own = ((float*)found[n]->data)[i];
            *x = was + step;
            up = loss(&p, &options, &dout, &dlse);
            *x = was - step;
            down = loss(&p, &options, &dout, &dlse);
            *x = was;
            expected = (up - down) / (2.0 * step);
            if (!(fabs(own - expected) <= 2e-2 * (1 + fabs(expected))))
                fail_at(__LINE__, "gradient %d [%d] is %g, not %g", (int)n, (int)i, own, expected);
        }
    }
}

TEST(gradients_that_cannot_be) {
    umfa_attention_gradients gradients = UMFA_ATTENTION_GRADIENTS_INIT;
    problem p;
    tensor dquery;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    make(&dquery, 4, p.query.shape[0], p.query.shape[1], p.query.shape[2], p.query.shape[3]);
    /* The call, and what says whether it can be. */
#define REFUSED(lse, dout, gradients, status, words)                                               \
    CHECK_FAILS(umfa_attention_backward(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl, lse, dout, \
                                        NULL, gradients, NULL),                                    \
                status, words);                                                                    \
    CHECK_FAILS(umfa_attention_backward_can_run(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl,    \
                                                lse, dout, NULL, gradients, NULL),                 \
                status, words)
    REFUSED(&p.lse.dl, &p.out.dl, NULL, UMFA_ERROR_VALUE, "gradients is missing");
    REFUSED(&p.lse.dl, &p.out.dl, &gradients, UMFA_ERROR_VALUE, "no gradient is wanted");
    gradients.dquery = &dquery.dl;
    CHECK_OK(umfa_attention_backward_can_run(&p.query.dl, &p.key.dl, &p.value.dl, &p.out.dl,
                                             &p.lse.dl, &p.out.dl, NULL, &gradients, NULL));
    REFUSED(NULL, &p.out.dl, &gradients, UMFA_ERROR_VALUE, "lse is missing");
    REFUSED(&p.lse.dl, NULL, &gradients, UMFA_ERROR_VALUE, "dout is missing");
    gradients.dsinks = &dquery.dl;
    REFUSED(&p.lse.dl, &p.out.dl, &gradients, UMFA_ERROR_VALUE,
            "dsinks is the gradient of learnable_sink");
    gradients.dsinks = NULL;
    gradients.dquery = &p.query.dl;
    REFUSED(&p.lse.dl, &p.out.dl, &gradients, UMFA_ERROR_VALUE, "overlaps query");
    gradients.struct_size = 0;
    REFUSED(&p.lse.dl, &p.out.dl, &gradients, UMFA_ERROR_VALUE,
            "gradients->struct_size is too small");
#undef REFUSED
}

/* ---- tests: weights --------------------------------------------------------------------------------- */

static void check_weights(int line, problem* p, const umfa_attention_options* options) {
    const int row = options->layout == UMFA_LAYOUT_BSHD ? 1 : 2;
    const int64_t keys = p->key.shape[row], queries = p->query.shape[row];
    const double kept = 1 - options->dropout_p;
    tensor weights;
    int64_t b, h, i, j, d, dropped = 0;
    make(&weights, 4, BATCH, HEADS, queries, keys);
    memset(weights.dl.data, 0xff, sizeof(float) * (size_t)(BATCH * HEADS * queries * keys));
    if (umfa_attention_weights(&p->query.dl, &p->key.dl, &weights.dl, options) != UMFA_OK)
        fail_at(line, "no weights");
    CHECK_OK(run(p, options));
    for (b = 0; b < BATCH; ++b)
        for (h = 0; h < HEADS; ++h)
            for (i = 0; i < queries; ++i) {
                double total = 0;
                for (j = 0; j < keys; ++j) {
                    total += fabs(number(&weights.dl, b, h, i, j));
                    dropped += number(&weights.dl, b, h, i, j) < 0;
                }
                if (!(fabs(total - 1) < 1e-5)) fail_at(line, "the weights add up to %g", total);
                for (d = 0; d < HEAD_DIM_V; ++d) {
                    double expected = 0;
                    for (j = 0; j < keys; ++j) {
                        const double weight = number(&weights.dl, b, h, i, j);
                        if (weight > 0)
                            expected +=
                                weight / kept * at(&p->value.dl, options->layout, b, j, h / 3, d);
                    }
                    if (!(fabs(at(&p->out.dl, options->layout, b, i, h, d) - expected) < 1e-4))
                        fail_at(line, "out is not the kept weights' sum");
                }
            }
    if ((dropped > 0) != (options->dropout_p > 0)) fail_at(line, "%d dropped", (int)dropped);
}

TEST(weights_of_a_call) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    tensor mask;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    check_weights(__LINE__, &p, &options);
    options.dropout_p = 0.3;
    options.dropout_seed = 5;
    check_weights(__LINE__, &p, &options);
    options.causal = 1;
    make(&mask, 4, BATCH, 1, SEQLEN_Q, SEQLEN_K);
    fill(&mask.dl);
    options.attn_mask = &mask.dl;
    check_weights(__LINE__, &p, &options);
    options.layout = UMFA_LAYOUT_BHSD;
    make_problem(&p, UMFA_LAYOUT_BHSD);
    check_weights(__LINE__, &p, &options);
}

TEST(weights_that_cannot_be) {
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    tensor weights;
    problem p;
    make_problem(&p, UMFA_LAYOUT_BSHD);
    make(&weights, 4, BATCH, HEADS, SEQLEN_Q, SEQLEN_K);
    options.qv = &p.query.dl;
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, &p.key.dl, &weights.dl, &options),
                UMFA_ERROR_UNSUPPORTED, "weights of a call with qv");
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, &p.key.dl, NULL, NULL), UMFA_ERROR_VALUE,
                "weights is missing");
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, NULL, &weights.dl, NULL), UMFA_ERROR_VALUE,
                "key is missing");
    options.qv = NULL;
    options.new_key = options.new_value = &p.key.dl;
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, &p.key.dl, &weights.dl, &options),
                UMFA_ERROR_UNSUPPORTED, "weights of a call with new_key");
    weights.shape[3] = 7;
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, &p.key.dl, &weights.dl, NULL), UMFA_ERROR_VALUE,
                "weights has the wrong shape; got (2, 6, 21, 7)");
    weights.shape[3] = SEQLEN_K;
    weights.dl.data = p.query.dl.data;
    CHECK_FAILS(umfa_attention_weights(&p.query.dl, &p.key.dl, &weights.dl, NULL), UMFA_ERROR_VALUE,
                "weights overlaps query");
}

/* ---- tests: threads ------------------------------------------------------------------------------ */

typedef struct {
    problem problem;
    int64_t window_left;
} failing_call;

static void* fails_with_its_own_text(void* argument) {
    failing_call* call = argument;
    umfa_attention_options options = UMFA_ATTENTION_OPTIONS_INIT;
    char text[32];
    int i;
    CHECK(strlen(umfa_last_error()) == 0); /* a new thread has not failed yet */
    snprintf(text, sizeof text, "got %d;", (int)call->window_left);
    options.window_size_left = call->window_left;
    for (i = 0; i < 200; ++i) CHECK_FAILS(run(&call->problem, &options), UMFA_ERROR_VALUE, text);
    return NULL;
}

TEST(last_error_belongs_to_the_thread) {
    static failing_call calls[4];
    pthread_t threads[4];
    int i;
    CHECK(umfa_attention_forward(NULL, NULL, NULL, NULL, NULL, NULL) == UMFA_ERROR_VALUE);
    for (i = 0; i < 4; ++i) {
        make_problem(&calls[i].problem, UMFA_LAYOUT_BSHD);
        calls[i].window_left = -100 - i;
    }
    for (i = 0; i < 4; ++i)
        CHECK(pthread_create(&threads[i], NULL, fails_with_its_own_text, &calls[i]) == 0);
    for (i = 0; i < 4; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(strstr(umfa_last_error(), "query"));
    CHECK(strstr(umfa_last_error(), "got -1") == NULL);
}

static void* computes(void* argument) {
    int i;
    for (i = 0; i < 20; ++i) CHECK_PROBLEM((problem*)argument, NULL);
    return NULL;
}

TEST(many_threads_at_once) {
    static problem problems[4];
    pthread_t threads[4];
    int i;
    for (i = 0; i < 4; ++i) make_problem(&problems[i], UMFA_LAYOUT_BSHD);
    for (i = 0; i < 4; ++i) CHECK(pthread_create(&threads[i], NULL, computes, &problems[i]) == 0);
    for (i = 0; i < 4; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
}

/* ---- main ---------------------------------------------------------------------------------------- */

#define ENTRY(name) {#name, name}
static const struct {
    const char* name;
    void (*run)(void);
} tests[] = {
    ENTRY(version),
    ENTRY(null_options_and_null_lse),
    ENTRY(log_sum_exp),
    ENTRY(null_strides_mean_compact),
    ENTRY(initialiser_is_the_default),
    ENTRY(layout_bhsd),
    ENTRY(causal_both_ways),
    ENTRY(window),
    ENTRY(window_beside_the_diagonal),
    ENTRY(prefix_and_chunks),
    ENTRY(batch_invariant),
    ENTRY(new_rows_of_each_sequence),
    ENTRY(scale_softcap_and_alibi),
    ENTRY(dense_masks),
    ENTRY(strides_and_offsets),
    ENTRY(bfloat16_tensors),
    ENTRY(different_dtypes),
    ENTRY(quantised_keys),
    ENTRY(quantised_scores),
    ENTRY(dtype_of_the_result),
    ENTRY(no_keys_and_no_queries),
    ENTRY(struct_size_of_an_older_caller),
    ENTRY(struct_size_of_a_newer_caller),
    ENTRY(struct_size_forgotten),
    ENTRY(null_tensors),
    ENTRY(wrong_dtype),
    ENTRY(wrong_device),
    ENTRY(wrong_shape),
    ENTRY(wrong_options),
    ENTRY(out_must_not_overlap),
    ENTRY(failure_writes_nothing),
    ENTRY(success_keeps_the_last_error),
    ENTRY(warmup_computes_nothing),
    ENTRY(warmup_that_cannot_be),
    ENTRY(combine),
    ENTRY(combine_that_cannot_be),
    ENTRY(gradients_are_finite_differences),
    ENTRY(gradients_that_cannot_be),
    ENTRY(weights_of_a_call),
    ENTRY(weights_that_cannot_be),
    ENTRY(last_error_belongs_to_the_thread),
    ENTRY(many_threads_at_once),
};

int main(int argc, char** argv) {
    size_t i;
    if (argc != 3) return 2;
    expected_version = argv[2];
    for (i = 0; i < sizeof tests / sizeof tests[0]; ++i)
        if (strcmp(argv[1], tests[i].name) == 0) {
            tests[i].run();
            return 0;
        }
    fprintf(stderr, "no test is called %s\n", argv[1]);
    return 2;
}
