// Short lists of each row's best columns. A list is made at some column duals v and stays useful while they rise: the
// key of an entry, its reduced value at that time, only overestimates the present one, and no column left out can
// exceed the row's threshold. Keys fall along the list, so most readers stop after a few entries.
#pragma once

#include "cpu/kernels/assign_scan.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

template <class T>
struct Entry {
    double key;  // s - v when the list was made
    T s;
    int32_t column;
};

// Memory for making one list; one a thread.
struct ListScratch {
    int32_t* columns;  // [n]
    double* r;         // [n]
    double* copy;      // [n]
};

// The k-th largest (from 1) of x[0..n), which is reordered.
inline double kth_largest(double* x, int n, int k) {
    int low = 0, high = n - 1;
    const int want = k - 1;
    while (low < high) {
        const double pivot = x[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) ++i;
            while (x[j] < pivot) --j;
            if (i <= j) {
                const double t = x[i];
                x[i++] = x[j];
                x[j--] = t;
            }
        }
        if (want <= j) {
            high = j;
        } else if (want >= i) {
            low = i;
        } else {
            break;
        }
    }
    return x[want];
}

template <class T>
inline void sort_by_key(Entry<T>* list, int count) {
    for (int a = 1; a < count; ++a) {
        const Entry<T> e = list[a];
        int b = a;
        for (; b > 0 && list[b - 1].key < e.key; --b) list[b] = list[b - 1];
        list[b] = e;
    }
}

constexpr int kBlock = 4;  // lists are read in blocks; `room` is a multiple, and the last block is filled up

// How lists are made for n columns: `room` entries, of which at least `least` are used.
struct ListPlan {
    int least, room;
    bool wide;  // level among 32 group maxima instead of 16
};

inline ListPlan list_plan(int n) {
    if (n >= 2048) return ListPlan{20, 48, true};
    return ListPlan{5, 16, false};
}

// Fills `list` with the best columns of a row, at least min(n, plan.least) and at most plan.room; returns how many. No
// column left out has a reduced value above *threshold (minus infinity: none is left out). `turn` rotates which of many
// equal columns are kept, so that rows with the same ties do not all want the same few.
template <bool checked, class T, class C>
inline int make_list(const T* row,      // [n]
                     const C* price,    // [padded(n)] v rounded to C; null: v is zero
                     const double* v,   // [n]
                     double v_largest,  // bounds |v|
                     int n, const ListPlan& plan, uint32_t turn, const ListScratch& scratch, Entry<T>* list,
                     double* threshold, C* bad) {
    C best[kRun];
    group_maxima<checked>(row, price, n, best, bad);
    int found = n;
    *threshold = -INFINITY;
    if (n <= plan.room) {
        for (int j = 0; j < n; ++j) scratch.columns[j] = j;
    } else {
        const C level = plan.wide ? kth_maximum<32>(best, plan.least) : kth_maximum<16>(best, plan.least);
        found = columns_above(row, price, n, level, scratch.columns);
        *threshold = static_cast<double>(level);
        // r below the level in C may be this much above it in float64.
        if (sizeof(C) == 4 && price != nullptr) *threshold += 0x1p-23 * (fabs(*threshold) + v_largest) + 0x1p-149;
    }
    int kept = 0;
    if (found <= plan.room) {
        for (; kept < found; ++kept) {
            const int j = scratch.columns[kept];
            list[kept] = Entry<T>{static_cast<double>(row[j]) - v[j], row[j], j};
        }
        sort_by_key(list, kept);
    } else {
        for (int k = 0; k < found; ++k) {
            const int j = scratch.columns[k];
            scratch.copy[k] = scratch.r[k] = static_cast<double>(row[j]) - v[j];
        }
        const double cut = kth_largest(scratch.copy, found, plan.room);
        if (cut > *threshold) *threshold = cut;
        for (int k = 0; k < found; ++k) {
            const int j = scratch.columns[k];
            if (scratch.r[k] > cut) list[kept++] = Entry<T>{scratch.r[k], row[j], j};
        }
        sort_by_key(list, kept);
        for (int k = static_cast<int>(turn % static_cast<uint32_t>(found)); kept < plan.room;
             k = k + 1 == found ? 0 : k + 1) {
            const int j = scratch.columns[k];
            if (scratch.r[k] == cut) list[kept++] = Entry<T>{cut, row[j], j};
        }
    }
    for (int k = kept; k % kBlock != 0; ++k) list[k] = Entry<T>{-INFINITY, static_cast<T>(-INFINITY), 0};
    return kept;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
