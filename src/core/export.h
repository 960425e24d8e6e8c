// What libumfa shows to the doors; everything else is hidden.
#pragma once

#define UMFA_CORE_API __attribute__((visibility("default")))
