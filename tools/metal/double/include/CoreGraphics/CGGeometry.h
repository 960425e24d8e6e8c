// Double of CoreGraphics: the one constant that umfa refers to, so that the framework is loaded.
#pragma once

typedef double CGFloat;
typedef struct {
    CGFloat x, y;
} CGPoint;
typedef struct {
    CGFloat width, height;
} CGSize;
typedef struct {
    CGPoint origin;
    CGSize size;
} CGRect;

#ifdef __cplusplus
extern "C"
#else
extern
#endif
    const CGRect CGRectNull;
