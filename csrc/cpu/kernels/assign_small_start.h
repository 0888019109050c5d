// How an assignment of few units begins: starting prices, and rounds in which rows bid for columns. The bids of a round
// are made at the same prices, so that no row waits for another, and in float32 where the matrix is: what a column is
// worth to a row is then taken from the matrix again, and a bid rounded down. So a column that is taken is the best of
// its row at the prices exactly, or up to rounding in float64 for prices in float64.
#pragma once

#include "cpu/kernels/assign_small_state.h"
#include "cpu/status.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr double kMostInFloat32 = 1e30;  // prices beyond it might overflow float32
#ifdef MUDSC_ASSIGN_STATS
static int kMostRounds = 10, kFewFree = 1;
#else
constexpr int kMostRounds = 10;  // of bids
constexpr int kFewFree = 1;      // rows for which another round is no longer worth it
#endif

inline double down_to(double x, double) { return x; }
inline float down_to(double x, float) {
    const float near = static_cast<float>(x);
    if (static_cast<double>(near) <= x) return near;
    int32_t bits;
    memcpy(&bits, &near, sizeof bits);
    bits = near > 0 ? bits - 1 : near < 0 ? bits + 1 : INT32_MIN + 1;
    float below;
    memcpy(&below, &bits, sizeof below);
    return below;
}

// Begins in prices of type C.
template <class T, class C>
class SmallStart {
  public:
    explicit SmallStart(SmallState<T>& state)
        : m_(state), price_(reinterpret_cast<C*>(state.price)), r_(reinterpret_cast<C*>(state.r)) {}

    // Leaves prices in state.v, owners, and the rows that are still free. not_finite: the matrix holds NaN or an
    // infinity. not_converged: prices left the range of C, or those given are of no help.
    Status from_nothing(bool trusted);
    Status from_prices(bool trusted, const double* start);

  private:
    struct Best {
        C first, second;  // the two largest reduced values of a row
        int column;       // of the first
    };

    template <bool checked>
    Best best_of(int i, Vec<C>* products) const;
    bool take_all(bool exact, bool checked);
    bool take(int i, const Best& b, bool exact, C* price);
    void bid();
    void price_columns();
    Status finish() const;

    SmallState<T>& m_;
    C *price_, *r_;        // [column, padded]
    int ties_ = 0;         // rows with more than one best column
    bool narrow_ = false;  // prices left the range of C
    Best best_[kSmallAssignment];
    C raised_[kSmallAssignment];
};

// `products`, if `checked`, takes up all entries, in pairs to save steps: what is not finite leaves it so.
template <class T, class C>
template <bool checked>
inline typename SmallStart<T, C>::Best SmallStart<T, C>::best_of(int i, Vec<C>* products) const {
    constexpr int lanes = Vec<C>::lanes;
    const T* s = m_.row(i);
    const int n = m_.n;
    const Vec<C> least = Vec<C>::all(static_cast<C>(-INFINITY));
    Vec<C> first[2] = {least, least}, second[2] = {least, least};
    const auto step = [&](Vec<C> x, int j, int k) {
        x = x - Vec<C>::load(price_ + j);
        x.store(r_ + j);
        second[k] = vmax(vmin(x, first[k]), second[k]);
        first[k] = vmax(x, first[k]);
    };
    int j = 0;
    for (; j + 2 * lanes <= n; j += 2 * lanes) {
        const Vec<C> x = Vec<C>::load(s + j), y = Vec<C>::load(s + j + lanes);
        if (checked) *products = x * y + *products;
        step(x, j, 0);
        step(y, j + lanes, 1);
    }
    for (; j < n; j += lanes) {
        const Vec<C> x = Vec<C>::load_some(s + j, n - j);
        if (checked) *products = x * x + *products;
        step(x, j, 0);
    }
    Best b;
    top_two(vmax(first[0], first[1]), vmax(vmin(first[0], first[1]), vmax(second[0], second[1])), &b.first, &b.second);
    const bool found = b.first > static_cast<C>(-INFINITY);
    b.column = found ? m_.open_among([&](int at) { return at_least(r_ + at, b.first); }) : 0;
    return b;
}

// Row i takes the column that was its best, and raises its price to where the second best is worth as much. False where
// that is no rise and the column taken or not the best after all. Prices may have risen since b was found. `exact`: b
// holds no rounding.
template <class T, class C>
inline bool SmallStart<T, C>::take(int i, const Best& b, bool exact, C* price) {
    const int j = b.column;
    double second = static_cast<double>(b.second);
    if (sizeof(C) < 8 && !exact) second += 0x1p-23 * fabs(second);
    const double worth = m_.entry(i, j), most = worth - second, before = static_cast<double>(price[j]);
    const C after = most < kFar ? down_to(most, C()) : price[j];
    if (static_cast<double>(after) > before) {
        if (sizeof(C) < 8 && !(fabs(static_cast<double>(after)) < kMostInFloat32)) {
            narrow_ = true;
            return false;
        }
        price[j] = after;
    } else if (!m_.is_open(j) || (most < before && worth - before < largest_reduced(m_, i, price_))) {
        return false;
    }
    m_.take(i, j);
    return true;
}

// All rows, each for itself, at the starting prices; false when the matrix holds NaN or an infinity, if `checked`.
template <class T, class C>
bool SmallStart<T, C>::take_all(bool exact, bool checked) {
    Vec<C> products = Vec<C>::all(0);
    m_.release_all();
    ties_ = 0;
    for (int j = 0; j < m_.n; ++j) raised_[j] = price_[j];
    for (int i = 0; i < m_.n; ++i) {
        const Best b = checked ? best_of<true>(i, &products) : best_of<false>(i, nullptr);
        ties_ += b.first == b.second ? 1 : 0;
        if (!m_.is_open(b.column) || !take(i, b, exact, raised_)) m_.free[m_.free_count++] = i;
    }
    for (int j = 0; j < m_.n; ++j) price_[j] = raised_[j];
    if (!checked || shows_finite(products)) return true;
    for (int i = 0; i < m_.n; ++i) {
        if (!all_finite(m_.row(i), m_.n)) return false;
    }
    return true;
}

// Rounds of bids, which displace owners.
template <class T, class C>
void SmallStart<T, C>::bid() {
    for (int round = 0; round < kMostRounds && m_.free_count > kFewFree && !narrow_; ++round) {
        const int count = m_.free_count;
        MUDSC_STAT(stat_steps += count);
        // Of equal columns a row takes an open one that no row before it wants.
        uint64_t open[kSmallAssignment / 64];
        for (int w = 0; w * 64 < m_.n; ++w) open[w] = m_.open[w];
        for (int f = 0; f < count; ++f) {
            best_[f] = best_of<false>(m_.free[f], nullptr);
            m_.open[best_[f].column / 64] &= ~(uint64_t{1} << (best_[f].column % 64));
        }
        for (int w = 0; w * 64 < m_.n; ++w) m_.open[w] = open[w];
        int taken = 0;
        m_.free_count = 0;
        for (int f = 0; f < count; ++f) {
            const int i = m_.free[f], out = m_.owner[best_[f].column];
            const bool took = take(i, best_[f], false, price_);
            taken += took ? 1 : 0;
            if (!took || out >= 0) m_.free[m_.free_count++] = took ? out : i;
        }
        if (taken * 4 < count) break;
    }
}

// Every column at its largest entry.
template <class T, class C>
void SmallStart<T, C>::price_columns() {
    constexpr int lanes = Vec<C>::lanes, width = 64 / lanes;
    int j = 0;
    for (; j + 64 <= m_.n; j += 64) {
        Vec<C> most[width];
        for (int k = 0; k < width; ++k) most[k] = Vec<C>::load(m_.row(0) + j + k * lanes);
        for (int i = 1; i < m_.n; ++i) {
            const T* s = m_.row(i) + j;
            for (int k = 0; k < width; ++k) most[k] = vmax(Vec<C>::load(s + k * lanes), most[k]);
        }
        for (int k = 0; k < width; ++k) most[k].store(price_ + j + k * lanes);
    }
    for (; j < m_.n; j += lanes) {
        const int left = m_.n - j < lanes ? m_.n - j : lanes;
        Vec<C> most = Vec<C>::load_some(m_.row(0) + j, left);
        for (int i = 1; i < m_.n; ++i) most = vmax(Vec<C>::load_some(m_.row(i) + j, left), most);
        C out[lanes];
        most.store(out);
        for (int k = 0; k < left; ++k) price_[j + k] = out[k];
    }
    for (j = 0; j < m_.n; ++j) narrow_ |= sizeof(C) < 8 && !(fabs(static_cast<double>(price_[j])) < kMostInFloat32);
}

template <class T, class C>
Status SmallStart<T, C>::finish() const {
    for (int j = 0; j < m_.n; ++j) m_.v[j] = static_cast<double>(price_[j]);
    return narrow_ ? Status::not_converged : Status::ok;
}

// Prices of zero leave rows alone that are all equal, and find what stands out. Where many rows want the same columns
// though none of them is indifferent, every column starts at its largest entry instead.
template <class T, class C>
Status SmallStart<T, C>::from_nothing(bool trusted) {
    const int n = m_.n;
    for (int j = 0; j < padded(n); ++j) {
        price_[j] = static_cast<C>(j < n ? 0 : kFar);
        r_[j] = static_cast<C>(-kFar);
    }
    if (!take_all(true, !trusted)) return Status::not_finite;
    if (m_.free_count * 8 >= n && ties_ * 16 <= n) {
        price_columns();
        if (!narrow_) take_all(false, false);
    }
    bid();
    return finish();
}

template <class T, class C>
Status SmallStart<T, C>::from_prices(bool trusted, const double* start) {
    const int n = m_.n;
    for (int j = 0; j < padded(n); ++j) {
        price_[j] = static_cast<C>(j < n ? start[j] : kFar);
        r_[j] = static_cast<C>(-kFar);
    }
    if (!take_all(false, !trusted)) return Status::not_finite;
    if (!worth_starting_from(m_.free_count, n)) return Status::not_converged;
    bid();
    return finish();
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
