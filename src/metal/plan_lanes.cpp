#include "metal/plan_lanes.h"

#include "metal/launch_builder.h"
#include "shared/indices.h"

namespace umfa::metal {
namespace {

constexpr Slot layout[] = {{UMFA_LANES_MATRIX, "matrix"}, {UMFA_LANES_HELD, "held"}};

}  // namespace

DType matrix_dtype(DType dtype, const Capabilities& gpu) {
    return element_type(dtype, gpu).operand_bytes == 4 ? DType::f32 : dtype;
}

LaunchPlan plan_lanes(const TensorView& matrix, const TensorView& held) {
    LaunchPlan plan;
    plan.tensors = {{"matrix", matrix}, {"held", held, false, true}};
    const ElementType type = stored_type(matrix.dtype);
    LanesParams params{};
    params.row = 8;
    LaunchBuilder(plan, "umfa.self_test", {}, std::string("lanes_") + type.name, "lanes.metal",
                  UMFA_LANES_BUFFERS)
        .stores(type)
        .tensors(layout)
        .params(UMFA_LANES_PARAMS, params)
        .grid(1, 1)
        .simdgroups(1)
        .add();
    return plan;
}

}  // namespace umfa::metal
