// DLPack -> TensorView: the one place that knows DLPack's codes. Both doors call it.
#pragma once

#include <string_view>

#include "core/export.h"
#include "core/tensor_view.h"
#include "umfa/dlpack.h"

namespace umfa {

/// Throws `Error` when the tensor's device, dtype or number of dimensions has no place in umfa.
/// `function` and `argument` name the caller's spelling in the message.
UMFA_CORE_API TensorView view_of(const DLTensor& tensor, std::string_view function,
                                 std::string_view argument);

}  // namespace umfa
