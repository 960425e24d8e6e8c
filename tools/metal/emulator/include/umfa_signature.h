// The types of a kernel's parameters, from its C++ type.
#pragma once

namespace umfa_backend {

template <typename F>
struct signature {
    static_assert(sizeof(F) == 0, "a kernel returns void");
};
template <typename... A>
struct signature<void(A...)> {
    static constexpr int size = sizeof...(A);
    template <int i>
    using parameter = __type_pack_element<i, A...>;
};

}  // namespace umfa_backend
