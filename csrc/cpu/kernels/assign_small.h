// Assignment of few units: a row is read in less time than a list of its best columns takes to keep, so every step
// reads a whole row, in float64. What counts is how long one step waits for the next: prices, the best column and the
// next row form one chain.
//   1. All rows at the starting prices, which do not depend on each other: most take their best column.
//   2. Row reduction for those that found it taken.
//   3. Shortest augmenting paths over whole rows.
//   4. Row duals as exact maxima, and the duality gap that proves the result.
#pragma once

#include "cpu/kernels/assign_memory.h"
#include "cpu/kernels/assign_scan.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Row reduction is one pass of at most this many steps for each two rows: a path costs less than many small bids.
constexpr int kRowsAStep = 2;

// The two largest reduced values of a row.
struct TopTwo {
    double first, second;
};

// A row that a path search has come to: through its column, or as the source.
struct Reached {
    double level;  // length of the path + its dual
    int32_t row, column;
};

template <class T>
class SmallSolver {
  public:
    void carve(Carver& memory, int n);
    // As Solver::solve.
    Status solve(const T* s, int64_t stride, const double* start, int64_t* indices, double* u, double* v,
                 Outcome* outcome);

  private:
    template <class C>
    Status take_best_columns(const C* price, C* r);
    bool reduce_rows();
    bool augment(int source);
    template <bool first>
    Vec<double> shorten_keys(const T* s, double level);
    void column_maxima(T* most) const;
    Status begin_cold();
    Status begin_priced();
    template <bool checked, class C>
    TopTwo scan(int i, const C* price, C* r, Vec<C>* bad) const;
    template <class Fn>
    int open_among(const Fn& wanted) const;
    double row_dual(int i) const;

    const T* row(int i) const { return s_ + i * stride_; }
    double entry(int i, int j) const { return static_cast<double>(row(i)[j]); }
    bool is_open(int j) const { return owner_[j] < 0; }
    void take(int i, int j) {
        owner_[j] = i;
        row_of_[j] = row(i);
        open_[j / 64] &= ~(uint64_t{1} << (j % 64));
    }
    void release_all();

    const T* s_ = nullptr;
    int64_t stride_ = 0;
    int n_ = 0;
    double* v_ = nullptr;            // [column, padded] prices; infinite in the padding
    double* r_ = nullptr;            // [column, padded] reduced values of one row
    double* price_ = nullptr;        // [column, padded] prices during a path search, infinite where a column is done
    double* key_ = nullptr;          // [column, padded] lengths, infinite where a column is done
    double* length_ = nullptr;       // [column] the length at which it was done
    double* tight_ = nullptr;        // [column] the reduced value of the entry taken
    Reached* reached_ = nullptr;     // [n + 1] in this order
    int32_t* owner_ = nullptr;       // [column] row, or -1
    const T** row_of_ = nullptr;     // [column] its entries
    int32_t* free_ = nullptr;        // rows
    uint64_t* open_ = nullptr;       // [column / 64] bits: nobody owns it
    int free_count_ = 0, ties_ = 0;  // ties: rows with more than one best column at the starting prices
};

template <class T>
void SmallSolver<T>::carve(Carver& memory, int n) {
    n_ = n;
    memory.take(&v_, padded(n));
    memory.take(&r_, padded(n));
    memory.take(&price_, padded(n));
    memory.take(&key_, padded(n));
    memory.take(&length_, n);
    memory.take(&tight_, n);
    memory.take(&reached_, n + 1);
    memory.take(&owner_, n);
    memory.take(&row_of_, n);
    memory.take(&free_, n);
    memory.take(&open_, padded(n) / 64);
}

// The two largest of s - price, every one of which is also written to r.
template <class T>
template <bool checked, class C>
inline TopTwo SmallSolver<T>::scan(int i, const C* price, C* r, Vec<C>* bad) const {
    constexpr int lanes = Vec<C>::lanes;
    const T* s = row(i);
    const Vec<C> least = Vec<C>::all(static_cast<C>(-INFINITY)), nothing = Vec<C>::all(0);
    Vec<C> first[2] = {least, least}, second[2] = {least, least};
    const auto step = [&](Vec<C> x, int j, int k) {
        if (checked) bad[k] = x * nothing + bad[k];
        x = x - Vec<C>::load(price + j);
        x.store(r + j);
        second[k] = vmax(vmin(x, first[k]), second[k]);
        first[k] = vmax(x, first[k]);
    };
    int j = 0;
    for (; j + 2 * lanes <= n_; j += 2 * lanes) {
        step(Vec<C>::load(s + j), j, 0);
        step(Vec<C>::load(s + j + lanes), j + lanes, 1);
    }
    for (; j < n_; j += lanes) step(Vec<C>::load_some(s + j, n_ - j), j, 0);
    C a, b;
    top_two(vmax(first[0], first[1]), vmax(vmin(first[0], first[1]), vmax(second[0], second[1])), &a, &b);
    return TopTwo{static_cast<double>(a), static_cast<double>(b)};
}

// A column whose bit in `wanted(first column of 64)` is set: an open one if there is one, else the first.
template <class T>
template <class Fn>
inline int SmallSolver<T>::open_among(const Fn& wanted) const {
    int other = 0;
    uint64_t seen = 0;
    for (int w = 0; w * 64 < n_; ++w) {
        const uint64_t mask = wanted(w * 64), open = mask & open_[w];
        if (open != 0) return w * 64 + __builtin_ctzll(open);
        if (seen == 0 && mask != 0) other = w * 64 + __builtin_ctzll(mask);
        seen |= mask;
    }
    return other;
}

template <class C>
inline uint64_t at_least(const C* x, C level) {
    constexpr int lanes = Vec<C>::lanes;
    const Vec<C> least = Vec<C>::all(level);
    uint64_t mask = 0;
    for (int k = 0; k < 64 / lanes; ++k) mask |= ge(Vec<C>::load(x + k * lanes), least) << (k * lanes);
    return mask;
}

template <class C>
inline uint64_t at_most(const C* x, Vec<C> most) {
    constexpr int lanes = Vec<C>::lanes;
    uint64_t mask = 0;
    for (int k = 0; k < 64 / lanes; ++k) mask |= ge(most, Vec<C>::load(x + k * lanes)) << (k * lanes);
    return mask;
}

// All rows, each for itself, at the prices before any column was taken: those of open columns are still the same.
template <class T>
template <class C>
Status SmallSolver<T>::take_best_columns(const C* price, C* r) {
    Vec<C> bad[2] = {Vec<C>::all(0), Vec<C>::all(0)};
    free_count_ = ties_ = 0;
    for (int i = 0; i < n_; ++i) {
        const TopTwo top = scan<true>(i, price, r, bad);
        const C level = static_cast<C>(top.first);
        ties_ += top.first == top.second ? 1 : 0;
        const int j = level > -kFar ? open_among([&](int at) { return at_least(r + at, level); }) : 0;
        if (is_open(j)) {
            take(i, j);
            if (top.second > -kFar) v_[j] += top.first - top.second;
            tight_[j] = entry(i, j) - v_[j];
        } else {
            free_[free_count_++] = i;
        }
    }
    // Only NaN is not equal to zero here.
    const bool finite = ge(bad[0] + bad[1], Vec<C>::all(0)) == (uint64_t{1} << Vec<C>::lanes) - 1;
    return finite ? Status::ok : Status::not_finite;
}

// Free rows bid for their best column what it is worth to them above their second best, and displace its owner, who
// goes on at once if the price rose and steps are left.
template <class T>
bool SmallSolver<T>::reduce_rows() {
    constexpr int lanes = Vec<double>::lanes;
    int next = 0, steps = n_ / kRowsAStep;
    for (int f = 0; f < free_count_; ++f) {
        int i = free_[f];
        for (;;) {
            MUDSC_STAT(++stat_steps);
            const TopTwo top = scan<false>(i, v_, r_, static_cast<Vec<double>*>(nullptr));
            if (!(top.first > -kFar)) return false;
            const int j = open_among([&](int at) { return at_least(r_ + at, top.first); });
            const double by = top.second > -kFar ? top.first - top.second : 0.0, before = v_[j];
            const bool rises = before + by > before;
            add_at(v_ + j / lanes * lanes, j % lanes, by);
            const int out = owner_[j];
            take(i, j);
            tight_[j] = entry(i, j) - v_[j];
            if (out < 0) break;
            if (!rises || --steps < 0) {
                free_[next++] = out;
                break;
            }
            i = out;
        }
    }
    free_count_ = next;
    return true;
}

// One step of the search: through a row column j is at level - (s_j - price_j). Lowers `key` where that is shorter and
// returns the smallest key in all lanes.
template <class T>
template <bool first>
inline Vec<double> SmallSolver<T>::shorten_keys(const T* s, double level) {
    constexpr int lanes = Vec<double>::lanes;
    const Vec<double> at = Vec<double>::all(level);
    Vec<double> least[2] = {Vec<double>::all(kFar), Vec<double>::all(kFar)};
    const auto step = [&](Vec<double> x, int j, int k) {
        Vec<double> length = at - (x - Vec<double>::load(price_ + j));
        if (!first) length = vmin(length, Vec<double>::load(key_ + j));
        length.store(key_ + j);
        least[k] = vmin(length, least[k]);
    };
    int j = 0;
    for (; j + 2 * lanes <= n_; j += 2 * lanes) {
        step(Vec<double>::load(s + j), j, 0);
        step(Vec<double>::load(s + j + lanes), j + lanes, 1);
    }
    for (; j < n_; j += lanes) step(Vec<double>::load_some(s + j, n_ - j), j, 0);
    return lowest_in_all(vmin(least[0], least[1]));
}

// One shortest augmenting path from a free row; false when there is none of finite length. Which row a column was
// reached from is not kept: it is the one that gives the column's length again.
template <class T>
bool SmallSolver<T>::augment(int source) {
    constexpr int lanes = Vec<double>::lanes;
    for (int j = 0; j < padded(n_); j += lanes) Vec<double>::load(v_ + j).store(price_ + j);
    MUDSC_STAT(++stat_paths);
    int done = 0, end;
    reached_[0] = Reached{0.0, source, -1};
    Vec<double> least = shorten_keys<true>(row(source), 0.0);
    for (;;) {
        MUDSC_STAT(++stat_dense);
        end = open_among([&](int at) { return at_most(key_ + at, least); });
        if (owner_[end] < 0) break;
        const int i = owner_[end];
        const double length = least.first(), level = length + tight_[end];
        if (!(length < kFar)) return false;
        reached_[++done] = Reached{level, i, end};
        put_at(key_ + end / lanes * lanes, end % lanes, kFar);
        put_at(price_ + end / lanes * lanes, end % lanes, kFar);
        length_[end] = length;
        least = shorten_keys<false>(row_of_[end], level);
    }
    const double length = least.first();
    if (!(length < kFar)) return false;
    double at = length;
    for (int j = end, k = done; k >= 0; --k) {
        const Reached& r = reached_[k];
        if (r.level - (entry(r.row, j) - v_[j]) != at) continue;
        take(r.row, j);
        j = r.column;
        at = k == 0 ? 0 : length_[j];
    }
    tight_[end] = entry(owner_[end], end) - v_[end];
    for (int k = 1; k <= done; ++k) {
        const int j = reached_[k].column;
        v_[j] += length - length_[j];
        tight_[j] = entry(owner_[j], j) - v_[j];
    }
    return true;
}

// The largest s_ij - v_j of row i.
template <class T>
double SmallSolver<T>::row_dual(int i) const {
    constexpr int lanes = Vec<double>::lanes;
    const T* s = row(i);
    Vec<double> most[2] = {Vec<double>::all(-kFar), Vec<double>::all(-kFar)};
    int j = 0;
    for (; j + 2 * lanes <= n_; j += 2 * lanes) {
        most[0] = vmax(Vec<double>::load(s + j) - Vec<double>::load(v_ + j), most[0]);
        most[1] = vmax(Vec<double>::load(s + j + lanes) - Vec<double>::load(v_ + j + lanes), most[1]);
    }
    for (; j < n_; j += lanes) {
        most[0] = vmax(Vec<double>::load_some(s + j, n_ - j) - Vec<double>::load(v_ + j), most[0]);
    }
    return highest(vmax(most[0], most[1]));
}

template <class T>
void SmallSolver<T>::release_all() {
    for (int j = 0; j < n_; ++j) owner_[j] = -1;
    for (int w = 0; w * 64 < n_; ++w) open_[w] = ~uint64_t{0};
    free_count_ = 0;
}

// The largest entry of every column, in `most` [padded].
template <class T>
void SmallSolver<T>::column_maxima(T* most) const {
    constexpr int lanes = Vec<T>::lanes;
    for (int i = 0; i < n_; ++i) {
        const T* s = row(i);
        int j = 0;
        for (; j + lanes <= n_; j += lanes) {
            vmax(Vec<T>::load(s + j), Vec<T>::load(i == 0 ? s + j : most + j)).store(most + j);
        }
        for (; j < n_; ++j) most[j] = i == 0 || s[j] > most[j] ? s[j] : most[j];
    }
}

// Prices of zero leave rows alone that are all equal, and find what stands out. Where many rows want the same columns
// though none of them is indifferent, every column starts at its largest entry instead.
template <class T>
Status SmallSolver<T>::begin_cold() {
    T *price = reinterpret_cast<T*>(price_), *r = reinterpret_cast<T*>(r_);
    for (int j = 0; j < padded(n_); ++j) {
        price[j] = static_cast<T>(j < n_ ? 0 : kFar);
        r[j] = static_cast<T>(-kFar);
    }
    for (int j = 0; j < n_; ++j) v_[j] = 0;
    const Status status = take_best_columns(price, r);
    if (status != Status::ok || free_count_ * 8 < n_ || ties_ * 16 > n_) return status;
    column_maxima(price);
    for (int j = 0; j < n_; ++j) v_[j] = static_cast<double>(price[j]);
    release_all();
    return begin_priced();
}

template <class T>
Status SmallSolver<T>::begin_priced() {
    for (int j = 0; j < padded(n_); ++j) r_[j] = -kFar;
    return take_best_columns(v_, r_);
}

template <class T>
Status SmallSolver<T>::solve(const T* s, int64_t stride, const double* start, int64_t* indices, double* u, double* v,
                             Outcome* outcome) {
    const int n = n_;
    s_ = s;
    stride_ = stride;
    release_all();
    for (int j = n; j < padded(n); ++j) v_[j] = key_[j] = kFar;
    if (start != nullptr) memcpy(v_, start, static_cast<size_t>(n) * sizeof(double));
    const Status status = start == nullptr ? begin_cold() : begin_priced();
    if (status != Status::ok) return status;
    for (int j = n; j < padded(n); ++j) r_[j] = -kFar;
    if (!reduce_rows()) return Status::not_converged;
    MUDSC_STAT(stat_free0 += free_count_);
    for (int f = 0; f < free_count_; ++f) {
        if (!augment(free_[f])) return Status::not_converged;
    }
    *outcome = Outcome{};
    for (int j = 0; j < n; ++j) indices[owner_[j]] = j;
    for (int i = 0; i < n; ++i) {
        const int64_t j = indices[i];
        v[i] = v_[i];
        u[i] = row_dual(i);
        outcome->add(entry(i, static_cast<int>(j)), u[i], v[i], v_[j]);
    }
    return Status::ok;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
