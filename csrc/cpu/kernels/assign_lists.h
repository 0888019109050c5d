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

// What is known of a row beside its list.
struct RowState {
    double threshold;  // no column left out has a larger reduced value; minus infinity: none is left out
    int32_t count;     // entries in the list
};

// Memory for making one list; one a thread.
struct ListScratch {
    int32_t* columns;  // [n + kRun]
    double* r;         // [n]
    double* copy;      // [n]
};

constexpr int kBlock = 4;  // lists are read in blocks; `room` is a multiple, and the last block is filled up
constexpr int kLargestRoom = 48;

// How lists are made for n columns: `room` entries, of which at least `least` are used. Longer lists have to be made
// anew less often but cost more to make; measured best over families of problems.
struct ListPlan {
    int least, room;
    bool wide;  // level among 32 group maxima instead of 16
};

inline ListPlan list_plan(int n) {
    if (n < 512) return ListPlan{5, 16, false};
    if (n < 3072) return ListPlan{7, 20, false};
    return ListPlan{12, 32, true};
}

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

// Puts entries in the order of falling keys, equal ones in the order given. key: [padded to 8].
template <class T>
inline void place_by_key(const T* row, const int32_t* columns, double* key, int count, Entry<T>* list) {
    int64_t rank[kLargestRoom + 8];
    uint8_t taken[kLargestRoom + 8];
    const int pad = (count + 7) & ~7;
    for (int a = count; a < pad; ++a) key[a] = -INFINITY;
    for (int a = 0; a < pad; a += 8) {
        int64_t above[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int b = 0; b < count; ++b) {
            for (int k = 0; k < 8; ++k) above[k] += key[b] > key[a + k] ? 1 : 0;
        }
        for (int k = 0; k < 8; ++k) rank[a + k] = above[k];
    }
    memset(taken, 0, sizeof taken);
    for (int a = 0; a < count; ++a) {
        const int64_t at = rank[a] + taken[rank[a]]++;
        list[at] = Entry<T>{key[a], row[columns[a]], columns[a]};
    }
}

inline float next_above(float x) { return nextafterf(x, INFINITY); }
inline double next_above(double x) { return nextafter(x, static_cast<double>(INFINITY)); }

// Chooses the best `room` of too many columns, equal ones from a place that differs from row to row.
template <class T>
inline double cut_to_room(const T* row, const double* v, int found, int room, uint32_t turn,
                          const ListScratch& scratch) {
    double* r = scratch.r;
    int32_t* columns = scratch.columns;
    for (int k = 0; k < found; ++k) {
        scratch.copy[k] = r[k] = static_cast<double>(row[columns[k]]) - v[columns[k]];
    }
    const double cut = kth_largest(scratch.copy, found, room);
    // The equal ones first, while all columns are still there.
    int32_t equal[kLargestRoom];
    int above = 0, kept = 0;
    for (int k = 0; k < found; ++k) above += r[k] > cut ? 1 : 0;
    for (int k = static_cast<int>(turn % static_cast<uint32_t>(found)); kept < room - above;
         k = k + 1 == found ? 0 : k + 1) {
        if (r[k] == cut) equal[kept++] = columns[k];
    }
    int at = 0;
    for (int k = 0; k < found; ++k) {
        if (r[k] > cut) columns[at++] = columns[k];
    }
    for (int k = 0; k < kept; ++k) columns[at++] = equal[k];
    return cut;
}

// Fills a row's list with its best columns, at least min(n, plan.least) and at most plan.room. Clears *finite when
// the row holds NaN or an infinity, if `checked`.
template <bool priced, bool checked, class T, class C>
inline void make_list(const T* row,      // [n]
                      const C* price,    // [padded(n)] v rounded to C; not read unless priced
                      const double* v,   // [n]
                      double v_largest,  // bounds |v|
                      int n, const ListPlan& plan, uint32_t turn, const ListScratch& scratch, Entry<T>* list,
                      RowState* state, bool* finite) {
    C best[kRun];
    int32_t* columns = scratch.columns;
    int found = n;
    double threshold = -INFINITY;
    if (n <= plan.room) {
        if (checked) group_maxima<priced, checked>(row, price, n, best, finite);
        for (int j = 0; j < n; ++j) columns[j] = j;
    } else {
        group_maxima<priced, checked>(row, price, n, best, finite);
        C top;
        const C level = plan.wide ? kth_maximum<32>(best, plan.least, &top) : kth_maximum<16>(best, plan.least, &top);
        threshold = static_cast<double>(level);
        // r below the level in C may be this much above it in float64.
        if (sizeof(C) == 4 && priced) threshold += 0x1p-23 * (fabs(threshold) + v_largest) + 0x1p-149;
        found = columns_above<priced>(row, price, n, level, 0, plan.room + 1, columns);
        if (found > plan.room) {
            // Too many: by equal columns at the level mostly. Those above it, then equal ones from a place that differs
            // from row to row.
            const C above = next_above(level);
            found = top > level ? columns_above<priced>(row, price, n, above, 0, plan.room + 1, columns) : 0;
            if (found > plan.room) {
                found = columns_above<priced>(row, price, n, above, 0, n, columns);
                const double cut = cut_to_room(row, v, found, plan.room, turn, scratch);
                threshold = cut > threshold ? cut : threshold;
                found = plan.room;
            } else {
                const int from = static_cast<int>(turn % static_cast<uint32_t>(n));
                found += columns_equal<priced>(row, price, n, level, from, plan.room - found, columns + found);
                found += columns_equal<priced>(row, price, from, level, 0, plan.room - found, columns + found);
            }
        }
    }
    double key[kLargestRoom + 8];
    for (int k = 0; k < found; ++k) key[k] = static_cast<double>(row[columns[k]]) - v[columns[k]];
    place_by_key(row, columns, key, found, list);
    for (int k = found; k % kBlock != 0; ++k) list[k] = Entry<T>{-INFINITY, static_cast<T>(-INFINITY), 0};
    state->threshold = threshold;
    state->count = found;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
