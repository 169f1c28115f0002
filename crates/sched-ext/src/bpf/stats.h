/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The counters, one 64-bit number each in every CPU's copy. `stats.rs` reads them in this order;
 * a test compares the two lists.
 */
#ifndef GODWIT_STATS_H
#define GODWIT_STATS_H

#define GODWIT_STATS(X) \
	X(enqueues)        /* tasks put on a run queue */ \
	X(direct)          /* tasks that found their CPU idle and passed by the queue */ \
	X(dispatches)      /* times a CPU looked for its next task */ \
	X(switches)        /* times a task began to run */ \
	X(preempted)       /* running tasks interrupted for one that woke up */ \
	X(placed_new)      /* vCPUs given a CPU when they were created */ \
	X(placed_woken)    /* vCPUs given another CPU when they woke up */ \
	X(placed_moved)    /* vCPUs moved because a sibling was on their CPU */ \
	X(stacked)         /* vCPUs queued beside a runnable sibling */ \
	X(pulled_idle)     /* tasks taken over by a CPU that had none */ \
	X(pulled_balance)  /* tasks taken over by a CPU that had at least two fewer */ \
	X(checks)          /* candidates compared with their siblings */ \
	X(exceeded)        /* of these, with one that was too far */ \
	X(passed)          /* candidates passed over for it */ \
	X(loans)           /* times that somebody was to be moved */ \
	X(loan_refused)    /* loans not made: full list, a tag, a task that had gone */ \
	X(lent_ns)         /* vruntime that lenders have paid */ \
	X(settled)         /* debtors that were moved */ \
	X(settled_ns)      /* vruntime that they got */ \
	X(repaid_ns)       /* vruntime that machines which had got more paid in instalments */ \
	X(returned_ns)     /* vruntime that machines which had paid more got back so */ \
	X(lost_ns)         /* vruntime owed to machines that ended, less what they owed */ \
	X(carried)         /* debts that followed their debtor to another CPU */ \
	X(paid_ns)         /* as lent_ns, counted where the lender's vruntime changes */ \
	X(credited_ns)     /* what lenders paid later, when they were on no queue; negative */ \
	X(forced)          /* vCPUs run out of order beside a sibling */ \
	X(force_missed)    /* vCPUs that were gone when they were to be forced */ \
	X(kicks)           /* interrupts sent to force siblings */ \
	X(gangs)           /* vCPUs that have started a gang of their siblings */ \
	X(gang_joined)     /* siblings that began to run while their leader ran */ \
	X(gang_late_ns)    /* how long after their leader they did */ \
	X(gang_kept)       /* turns that went on because a gang's leader still ran */ \
	X(crowded)         /* decisions that did not wait any longer for another CPU's */ \
	X(timed)           /* turns ended by a timer */ \
	X(tightened)       /* steps to a tighter threshold */ \
	X(loosened)        /* and to a looser one */ \
	X(yields)          /* calls of yield */ \
	X(yields_to)       /* of these, with a sibling named to yield to */ \
	X(vms_new)         /* virtual machines noticed */ \
	X(vms_gone)        /* virtual machines that ended */ \
	X(uncoupled)       /* vCPUs that found no room in their machine's record */ \
	X(unmirrored)      /* queued tasks that found no room in the mirror of their queue */ \
	X(sampled)         /* decisions timed: one in 16 */ \
	X(sampled_ns)      /* what these took */ \
	X(distance_0) X(distance_1) X(distance_2) X(distance_3) X(distance_4) X(distance_5) \
	X(distance_6) X(distance_7) X(distance_8) X(distance_9) X(distance_10) X(distance_11) \
	X(distance_12) X(distance_13) X(distance_14) X(distance_15) \
	/* comparisons by distance, in sixteenths of the queue's size */

enum stat {
#define X(name) STAT_##name,
	GODWIT_STATS(X)
#undef X
	STATS,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64[STATS]);
} stats SEC(".maps");

static __always_inline void add(enum stat which, u64 by)
{
	u32 first = 0;
	u64 *all = bpf_map_lookup_elem(&stats, &first);

	if (all)
		all[which] += by;
}

#define count(name) add(STAT_##name, 1)

#endif
