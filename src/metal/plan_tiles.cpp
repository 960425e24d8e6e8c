#include "metal/plan_tiles.h"

#include <algorithm>
#include <span>

#include "core/error.h"
#include "metal/plan_codes.h"
#include "shared/forward_shapes.h"
#include "shared/indices.h"
#include "shared/threadgroup_memory.h"

namespace umfa::metal {
namespace {

constexpr Slot layout[] = {
    {UMFA_FORWARD_QUERY, "query"},
    {UMFA_FORWARD_KEY, "key"},
    {UMFA_FORWARD_VALUE, "value"},
    {UMFA_FORWARD_OUT, "out"},
    {UMFA_FORWARD_LSE, "lse"},
    {UMFA_FORWARD_MASK, "attn_mask"},
    {UMFA_FORWARD_SLOPES, "alibi_slopes"},
    {UMFA_FORWARD_SINKS, "learnable_sink"},
    {UMFA_FORWARD_ROTARY_COS, "rotary_cos"},
    {UMFA_FORWARD_ROTARY_SIN, "rotary_sin"},
    {UMFA_FORWARD_QV, "qv"},
};

struct Shape {
    int d, dv, bk, qf, simdgroups, split;
    bool one_tile;
    int fences;
    int first_family, last_family;
};
#define UMFA_ROW(...) {__VA_ARGS__},
constexpr Shape shapes_16[] = {UMFA_FORWARD_SHAPES_16(UMFA_ROW)};
constexpr Shape shapes_32[] = {UMFA_FORWARD_SHAPES_32(UMFA_ROW)};
constexpr Shape shapes_widened[] = {UMFA_FORWARD_SHAPES_WIDENED(UMFA_ROW)};
constexpr Shape alternatives_16[] = {UMFA_FORWARD_ALTERNATIVES_16(UMFA_ROW)};
constexpr Shape alternatives_32[] = {UMFA_FORWARD_ALTERNATIVES_32(UMFA_ROW)};
constexpr Shape alternatives_widened[] = {UMFA_FORWARD_ALTERNATIVES_WIDENED(UMFA_ROW)};
#undef UMFA_ROW

using Shapes = std::span<const Shape>;

Shapes shapes_for(const ElementType& type) {
    return type.operand_bytes == 2  ? Shapes(shapes_16)
           : type.staged_bytes == 2 ? Shapes(shapes_widened)
                                    : Shapes(shapes_32);
}
Shapes alternatives_for(const ElementType& type) {
    return type.operand_bytes == 2  ? Shapes(alternatives_16)
           : type.staged_bytes == 2 ? Shapes(alternatives_widened)
                                    : Shapes(alternatives_32);
}

bool is_for(const Shape& shape, const Capabilities& gpu) {
    const int family = static_cast<int>(gpu.family);
    return shape.first_family <= family && family <= shape.last_family;
}

const Shape* first_fit(Shapes shapes, int64_t head_dim, int64_t head_dim_v,
                       const Capabilities& gpu) {
    for (const Shape& shape : shapes)
        if (shape.d >= head_dim && shape.dv >= head_dim_v && is_for(shape, gpu)) return &shape;
    return nullptr;
}

std::string default_name(const char* type, const Shape& shape) {
    return std::string("forward_") + type + "_d" + std::to_string(shape.d) + "_v" +
           std::to_string(shape.dv) + "_k" + std::to_string(shape.bk);
}

std::string alternative_name(const char* type, const Shape& shape) {
    return default_name(type, shape) + "_q" + std::to_string(shape.qf) + "_f" +
           std::to_string(shape.fences);
}

/// The alternative to a default shape that tuning chose.
const Shape* chosen_instead(const Shape& usual, const ElementType& type, const Capabilities& gpu) {
    if (gpu.tiles.empty()) return nullptr;
    for (const Shape& shape : alternatives_for(type))
        if (shape.d == usual.d && shape.dv == usual.dv && is_for(shape, gpu) &&
            std::count(gpu.tiles.begin(), gpu.tiles.end(), alternative_name(type.name, shape)))
            return &shape;
    return nullptr;
}

/// The alternative with fewer simdgroups where those of the usual shape would leave cores idle: its
/// threadgroups are more, and each reads the keys again. H200 (132 multiprocessors), D = 64, eight
/// simdgroups against four: 1.10 times the time with 128 threadgroups of eight, 0.94 with 256.
const Shape* smaller_instead(const Shape& usual, const ElementType& type, const Problem& problem,
                             const Capabilities& gpu) {
    const int64_t rows = 8 * usual.qf * usual.simdgroups / usual.split;
    int64_t threadgroups = 0;
    for (int64_t b = 0; b < problem.batch; ++b)
        threadgroups += (problem.sequence(b).seqlen_q + rows - 1) / rows * problem.nheads_q;
    if (2 * threadgroups >= 3 * int64_t{gpu.cores}) return nullptr;
    for (const Shape& shape : alternatives_for(type))
        if (shape.d == usual.d && shape.dv == usual.dv && shape.bk == usual.bk &&
            shape.qf == usual.qf && shape.fences == usual.fences &&
            shape.simdgroups < usual.simdgroups && is_for(shape, gpu))
            return &shape;
    return nullptr;
}

}  // namespace

Tiles tiles_of(const Problem& problem, const Capabilities& gpu) {
    const ElementType type = element_type(problem, gpu);
    const Shape* shape = first_fit(shapes_for(type), problem.head_dim, problem.head_dim_v, gpu);
    if (!shape)
        fail(ErrorKind::internal, problem.function, "no tile shape",
             std::to_string(std::max(problem.head_dim, problem.head_dim_v)),
             "one in forward_shapes.h for every head_dim");
    const Shape* other = chosen_instead(*shape, type, gpu);
    if (!other) other = smaller_instead(*shape, type, problem, gpu);
    const std::string name =
        other ? alternative_name(type.name, *other) : default_name(type.name, *shape);
    if (other) shape = other;
    const Simdgroups simdgroups = fit_simdgroups(shape->simdgroups, shape->split, gpu);
    return {shape->d,        shape->dv,        shape->bk,
            shape->qf,       simdgroups.count, shape->split,
            shape->one_tile, shape->fences,    name + simdgroups.suffix};
}

std::vector<std::vector<std::string>> tile_choices(const Capabilities& gpu) {
    std::vector<std::vector<std::string>> all;
    for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
        const ElementType type = element_type(dtype, gpu);
        const Shape* last = nullptr;
        for (const Shape& shape : alternatives_for(type)) {
            if (!is_for(shape, gpu)) continue;
            if (!last || shape.d != last->d || shape.dv != last->dv)
                all.push_back({default_name(type.name,
                                            *first_fit(shapes_for(type), shape.d, shape.dv, gpu))});
            all.back().push_back(alternative_name(type.name, shape));
            last = &shape;
        }
    }
    return all;
}

bool is_tile_choice(const std::string& kernel) {
    const auto is_of = [&](const char* type, Shapes shapes) {
        return std::any_of(shapes.begin(), shapes.end(), [&](const Shape& shape) {
            return alternative_name(type, shape) == kernel;
        });
    };
    return is_of("f16", alternatives_16) || is_of("bf16", alternatives_16) ||
           is_of("f32", alternatives_32) || is_of("bf16_as_f32", alternatives_widened);
}

/// Whether a lane reads the mask of its keys at once. A tile of one fragment has no more than a pair. The
/// order in which keys are added depends on it, and so on where the mask lies.
static bool mask_runs(const Problem& problem, const Tiles& tiles) {
    if (!problem.mask || tiles.bk == 8 || problem.batch_invariant) return false;
    const TensorView& mask = problem.mask->view;
    return has_aligned_runs(mask, std::min(tiles.bk / 4, 128 / bits_of(mask.dtype)));
}

LaunchBuilder tile_launch(LaunchPlan& plan, const Problem& problem, const ForwardResults& results,
                          const Capabilities& gpu, const Tiles& tiles) {
    const ElementType type = element_type(problem, gpu);
    LaunchBuilder builder(plan, problem.function, constants_of(problem, results), tiles.kernel,
                          "forward.metal", UMFA_FORWARD_BUFFERS);
    builder.computes(type)
        .shape(tiles.d, tiles.dv, tiles.bk, tiles.qf, tiles.simdgroups, tiles.split, tiles.one_tile,
               tiles.fences)
        .constant(constant::whole_channels, has_dims(problem, tiles.d, tiles.dv))
        .constant(constant::mask_runs, mask_runs(problem, tiles))
        .tensors(layout)
        .params(UMFA_FORWARD_PARAMS, forward_params(problem, results))
        .simdgroups(tiles.simdgroups)
        .threadgroup_bytes(forward_bytes(tiles.d, tiles.dv, tiles.bk, tiles.qf, tiles.simdgroups,
                                         tiles.split, tiles.one_tile, type.staged_bytes));
    bind_codes(builder, problem, forward_codes);
    return builder;
}

double tile_seconds(const Problem& problem, const Tiles& tiles, double keys,
                    const Capabilities& gpu) {
    const int channels = tiles.d + tiles.dv + (problem.qv ? tiles.dv : 0);
    return core_seconds({2.0 * tiles.rows() * keys * channels, 0}, gpu);
}

}  // namespace umfa::metal
