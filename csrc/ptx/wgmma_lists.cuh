// The registers of a wgmma accumulator, N / 2 floats d, as text (LT_LISTS_N) and as operands
// (LT_OUTS_N): macros of the wgmma*.cuh files alone. Each list is the one before it and some more.
#pragma once

#define LT_LIST0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LT_LIST1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LT_LIST2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LT_LIST3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LT_LIST4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LT_LIST5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LT_LIST6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LT_LIST7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LT_LIST8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LT_LIST9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LT_LIST10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LT_LIST11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LT_LIST12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define LT_LIST13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define LT_LIST14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define LT_LIST15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define LT_OUT(i)                                                                                 \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), \
      "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define LT_LISTS_16 LT_LIST0
#define LT_OUTS_16 LT_OUT(0)
#define LT_LISTS_32 LT_LISTS_16 ", " LT_LIST1
#define LT_OUTS_32 LT_OUTS_16, LT_OUT(1)
#define LT_LISTS_64 LT_LISTS_32 ", " LT_LIST2 ", " LT_LIST3
#define LT_OUTS_64 LT_OUTS_32, LT_OUT(2), LT_OUT(3)
#define LT_LISTS_80 LT_LISTS_64 ", " LT_LIST4
#define LT_OUTS_80 LT_OUTS_64, LT_OUT(4)
#define LT_LISTS_96 LT_LISTS_80 ", " LT_LIST5
#define LT_OUTS_96 LT_OUTS_80, LT_OUT(5)
#define LT_LISTS_128 LT_LISTS_96 ", " LT_LIST6 ", " LT_LIST7
#define LT_OUTS_128 LT_OUTS_96, LT_OUT(6), LT_OUT(7)
#define LT_LISTS_192 LT_LISTS_128 ", " LT_LIST8 ", " LT_LIST9 ", " LT_LIST10 ", " LT_LIST11
#define LT_OUTS_192 LT_OUTS_128, LT_OUT(8), LT_OUT(9), LT_OUT(10), LT_OUT(11)
#define LT_LISTS_256 LT_LISTS_192 ", " LT_LIST12 ", " LT_LIST13 ", " LT_LIST14 ", " LT_LIST15
#define LT_OUTS_256 LT_OUTS_192, LT_OUT(12), LT_OUT(13), LT_OUT(14), LT_OUT(15)
