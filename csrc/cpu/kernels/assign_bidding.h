// Bidding: free rows take the columns they value most and raise their prices.
#pragma once

#include "cpu/kernels/assign_market.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Row reduction is done in passes; after `budget` steps of a pass the rows that are displaced wait for the next.
struct BidPlan {
    int passes;
    int64_t budget;
};

inline BidPlan bid_plan(int n) {
#ifdef MUDSC_ASSIGN_STATS
    return BidPlan{tune_passes, tune_budget8 * static_cast<int64_t>(n) / 8};
#endif
    return BidPlan{3, 4 * static_cast<int64_t>(n)};
}

// Free rows bid for their best column what it is worth to them above their second best, and displace its owner, who
// goes on at once if the price rose. Rows still free are left in m.free. displaced: [n] scratch.
template <class T>
Status reduce_rows(Market<T>& m, int32_t* displaced) {
    const int n = m.size();
    const BidPlan plan = bid_plan(n);
    for (int pass = 0; pass < plan.passes && m.free_count > 0; ++pass) {
        int next = 0;
        int64_t steps = plan.budget;
        for (int f = 0; f < m.free_count; ++f) {
            int i = m.free[f];
            if ((f & 63) == 0 && m.stopped()) return Status::interrupted;
            for (;;) {
                MUDSC_STAT(++stat_steps);
                Choice c = m.best_of(i);
                bool rises = c.second < c.first && n > 1 && m.raise(c.column, c.first - c.second);
                if (!rises && m.owner(c.column) >= 0) m.choose_among_equals(i, &c);
                const int out = m.owner(c.column);
                m.take(i, c.column, c.s);
                if (out < 0) break;
                if (!rises || --steps < 0) {
                    displaced[next++] = out;
                    break;
                }
                i = out;
            }
        }
        for (int f = 0; f < next; ++f) m.free[f] = displaced[f];
        m.free_count = next;
    }
    return Status::ok;
}

// An auction in which bids exceed what is needed, by less from round to round: brings prices near the optimum in time
// that row reduction and shortest paths need for a few rows, where all rows compete for the same columns.
template <class T>
Status auction(Market<T>& m) {
    const double range = m.largest_range();
    if (m.stopped()) return Status::interrupted;
    const double n = m.size();
    const int64_t most_steps = 200 * static_cast<int64_t>(m.size());
    for (double extra = range / 8; extra > range / (4 * n * n) && m.free_count > 0; extra /= 5) {
        m.release_all();
        int64_t steps = 0;
        while (m.free_count > 0 && ++steps < most_steps) {
            if ((steps & 255) == 0 && m.stopped()) return Status::interrupted;
            MUDSC_STAT(++stat_steps);
            const int i = m.free[--m.free_count];
            const Choice c = m.best_of(i);
            m.raise(c.column, c.first - c.second + extra);
            const int out = m.owner(c.column);
            m.take(i, c.column, c.s);
            if (out >= 0) m.free[m.free_count++] = out;
        }
        const bool done = m.free_count == 0;
        m.release_all();
        if (!done) break;
    }
    return Status::ok;
}

template <class T>
bool stuck(const Market<T>& m) {
    return m.free_count > m.size() / 3;
}

// Row reduction got nowhere: what columns share stands in the way, or many rows compete for the same few.
template <class T>
Status bid_anew(Market<T>& m, int32_t* displaced) {
    m.release_all();
    m.price_columns();
    Status status = m.make_all_lists(true, false);
    if (status == Status::ok) status = reduce_rows(m, displaced);
    if (status != Status::ok || !stuck(m)) return status;
    status = auction(m);
    return status == Status::ok ? reduce_rows(m, displaced) : status;
}

// Leaves few rows free.
template <class T>
Status bid(Market<T>& m, int32_t* displaced) {
    const Status status = reduce_rows(m, displaced);
    return status == Status::ok && stuck(m) ? bid_anew(m, displaced) : status;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
