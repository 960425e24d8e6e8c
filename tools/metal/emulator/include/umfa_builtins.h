// Built-in arguments of kernels by number: the launchers write their names, every back end answers.
#pragma once

namespace umfa_backend {

enum launch : unsigned {
    thread_position_in_grid,
    threadgroup_position_in_grid,
    threadgroups_per_grid,
    thread_position_in_threadgroup,
    threads_per_threadgroup,
    threads_per_grid,
    thread_index_in_threadgroup,
    thread_index_in_simdgroup,
    simdgroup_index_in_threadgroup,
    threads_per_simdgroup,
    simdgroups_per_threadgroup,
    thread_index_in_quadgroup,
    quadgroup_index_in_threadgroup,
    quadgroups_per_threadgroup,
};

}  // namespace umfa_backend
