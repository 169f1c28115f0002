/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Algorithm 1: when a vCPU is about to run while a sibling waits far back in another queue, it
 * lends vruntime to the sibling and lets its successor run.
 *
 * How ranks count. What runs on a CPU has rank 0, the first that is queued has rank 1, and the
 * size of a queue is the number queued plus the one that runs. The candidate is about to run, so
 * its own rank is 0 and the distance is the sibling's rank. With alpha 2/3 a queue of two (one
 * runs, one waits) never exceeds the threshold, in a queue of three the last one does.
 *
 * A loan. The lender is re-sorted in its own queue at once, behind the middle of it but by at
 * most a slice. The debtor is not touched: its CPU finds the loan on its own debt list at its
 * next dispatch, the only place where a queued task may be re-sorted, and moves the debtor forward
 * as far as the middle of its queue. What is left over, and the whole where the debtor runs, sleeps
 * or has ended, goes back to the lender's credit; with nobody left to get it back it is lost. So
 * lent = settled + returned + lost + what stands on the lists, and never two queues are locked.
 *
 * Bounds. One loan per debtor at a time, and a lender that has lent does not again before it ran:
 * that is the dirty tag. Nobody lends or borrows more, net, than `owe_slices`; the net fades by an
 * eighth with each turn.
 */
#ifndef GODWIT_LOANS_H
#define GODWIT_LOANS_H

const volatile u32 owe_slices = 4;

#define SETTLE_MOST 8

/* What a loan needs to know; more than five arguments do not fit a call. */
struct loan {
	u64 vm;
	u64 amount;
	u32 lender;
	u32 lender_pid;
	u32 debtor;
	u32 debtor_pid;
	u32 cpu;
};

GLOBAL bool debt_push(struct loan *l NONNULL)
{
	struct cpu_ctx *c = cpu_ctx(l->cpu);
	u32 i;

	if (!c)
		return false;
	LOOP(i, DEBTS) {
		struct debt *d = &c->debt[INDEX(i, DEBTS)];

		if (d->state || __sync_val_compare_and_swap(&d->state, 0, 1))
			continue;
		d->vm = l->vm;
		d->amount = l->amount;
		d->lender = l->lender;
		d->lender_pid = l->lender_pid;
		d->debtor = l->debtor;
		d->debtor_pid = l->debtor_pid;
		/* An exchange is a full barrier: the loan is whole before it is seen. */
		__sync_lock_test_and_set(&d->state, 2);
		__sync_fetch_and_add(&c->debts_due, 1);
		return true;
	}
	return false;
}

/* Puts what a debtor did not need to the lender's credit. */
GLOBAL int give_back(struct loan *l NONNULL, u64 amount)
{
	u64 key = l->vm;
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	struct vcpu *v;

	if (vm) {
		v = vcpu_at(vm, l->lender);
		if (v->pid == l->lender_pid) {
			__sync_fetch_and_add(&v->credit, amount);
			__sync_fetch_and_add(&v->net, amount);
			count(returned);
			add(STAT_returned_ns, amount);
			return 0;
		}
	}
	add(STAT_lost_ns, amount);
	return 0;
}

/* Takes a vCPU's credit off its vruntime; only while it is on no queue. */
static __always_inline u64 take_credit(struct vcpu *v, u64 vtime)
{
	s64 credit;

	if (!v->credit)
		return vtime;
	credit = __sync_lock_test_and_set(&v->credit, 0);
	add(STAT_credited_ns, credit);
	return vtime - credit;
}

/* Moves a queued task of `cpu` forward by `by`; only in ops.dispatch of that CPU. */
GLOBAL bool advance(u32 cpu, u32 pid, u64 by)
{
	struct task_struct *p;
	bool moved = false;
	u32 seen = zero;

	bpf_for_each(scx_dsq, p, cpu, 0) {
		struct task_ctx *t;
		struct vcpu *v;
		u64 vtime;

		if (++seen > WALK)
			break;
		if ((u32)p->pid != pid)
			continue;
		t = task_ctx(p);
		if (!t)
			break;
		vtime = p->scx.dsq_vtime - by;
		scx_bpf_dsq_move_set_vtime(ITER, vtime);
		moved = scx_bpf_dsq_move_vtime(ITER, p, cpu, 0);
		if (moved) {
			mirror_move(t, vtime);
			v = vcpu_of(t);
			if (v)
				v->vtime = vtime;
		}
		break;
	}
	return moved;
}

GLOBAL int settle_one(u32 cpu, struct loan *l NONNULL)
{
	struct scan scan = {};
	struct vm *vm;
	struct vcpu *v;
	u64 key, used = 0;

	key = l->vm;
	vm = bpf_map_lookup_elem(&vms, &key);
	v = vm ? vcpu_at(vm, l->debtor) : NULL;
	if (!v || v->pid != l->debtor_pid) {
		give_back(l, l->amount);
		return 0;
	}
	if (v->state == VCPU_QUEUED && v->cpu != cpu && v->cpu < nr_cpus) {
		l->cpu = v->cpu;
		if (debt_push(l)) {
			count(carried);
			return 0;
		}
	} else if (v->state == VCPU_QUEUED) {
		mirror_scan(cpu, v->vtime, &scan);
		if (scan.middle < 0)
			used = -scan.middle;
		if (used > l->amount)
			used = l->amount;
		if (used && !advance(cpu, l->debtor_pid, used))
			used = 0;
	}
	v->dirty = CLEAN;
	if (used) {
		__sync_fetch_and_add(&v->net, used);
		count(settled);
		add(STAT_settled_ns, used);
		add(STAT_got_ns, used);
	}
	if (used < l->amount)
		give_back(l, l->amount - used);
	return 0;
}

/* Applies the debt list of `cpu`: the first thing of each dispatch. */
GLOBAL int settle(u32 cpu)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	u32 done = zero;
	u32 i;

	if (!c)
		return 0;
	LOOP(i, DEBTS) {
		struct debt *d = &c->debt[INDEX(i, DEBTS)];
		struct loan l;

		if (d->state != 2)
			continue;
		l.vm = d->vm;
		l.amount = d->amount;
		l.lender = d->lender;
		l.lender_pid = d->lender_pid;
		l.debtor = d->debtor;
		l.debtor_pid = d->debtor_pid;
		l.cpu = cpu;
		__sync_lock_test_and_set(&d->state, 0);
		__sync_fetch_and_add(&c->debts_due, -1);
		settle_one(cpu, &l);
		if (++done >= SETTLE_MOST)
			break;
	}
	return 0;
}

static __always_inline s64 owe_most(void)
{
	return (s64)(owe_slices * slice_ns);
}

/* Whether a sibling waits too far back in its queue; counts what it saw. */
GLOBAL bool is_far(struct vcpu *v NONNULL)
{
	struct scan scan = {};
	struct cpu_ctx *c;
	u32 rank, size, bucket;

	if (v->state != VCPU_QUEUED)
		return false;
	c = cpu_ctx(v->cpu);
	if (!c)
		return false;
	mirror_scan(v->cpu, v->vtime, &scan);
	size = scan.queued + (c->running ? 1 : 0);
	rank = scan.before + (c->running ? 1 : 0);
	if (!size)
		return false;
	bucket = rank * 16 / size;
	add(STAT_distance_0 + INDEX(bucket, 16), 1);
	return rank * alpha_den >= size * alpha_num;
}

/*
 * Registers a loan of `l->amount` from a lender whose vruntime its caller changes, before the
 * debtor can see it. Takes both tags; false leaves everything as it was.
 */
GLOBAL bool lend(struct loan *l NONNULL)
{
	struct vcpu *lender, *debtor;
	u64 key = l->vm;
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);

	if (!vm)
		return false;
	lender = vcpu_at(vm, l->lender);
	debtor = vcpu_at(vm, l->debtor);
	if (lender->dirty || debtor->net + (s64)l->amount > owe_most() ||
	    lender->net - (s64)l->amount < -owe_most())
		goto refused;
	if (__sync_val_compare_and_swap(&debtor->dirty, CLEAN, BORROWED))
		goto refused;
	lender->dirty = LENT;
	l->debtor_pid = debtor->pid;
	l->lender_pid = lender->pid;
	l->cpu = debtor->cpu;
	if (!debt_push(l)) {
		debtor->dirty = CLEAN;
		lender->dirty = CLEAN;
		goto refused;
	}
	__sync_fetch_and_add(&lender->net, -l->amount);
	__sync_fetch_and_add(&vm->lent, l->amount);
	count(loans);
	add(STAT_lent_ns, l->amount);
	return true;
refused:
	count(loan_refused);
	return false;
}

/* The slot of the first sibling of slot `self` that is clean and too far away; -1: none. */
GLOBAL s32 far_sibling(u64 key, u32 self)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	bool compared = false;
	u32 i;

	if (!vm)
		return -1;
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);

		if (!v->pid || i == self || v->dirty || v->state != VCPU_QUEUED)
			continue;
		compared = true;
		if (is_far(v)) {
			count(checks);
			count(exceeded);
			return i;
		}
	}
	if (compared)
		count(checks);
	return -1;
}

/*
 * Algorithm 1 for the first of the queue of `cpu`; only in ops.dispatch of that CPU. Whoever is
 * first afterwards runs.
 */
GLOBAL int algorithm_1(u32 cpu)
{
	struct scan scan = {};
	struct loan loan = {};
	struct task_struct *p;

	if (scx_bpf_dsq_nr_queued(cpu) < 2)
		return 0;
	bpf_for_each(scx_dsq, p, cpu, 0) {
		struct task_ctx *t = task_ctx(p);
		struct vm *vm;
		struct vcpu *a;
		u64 key, vtime;
		s32 b;

		if (!t || !t->vm)
			break;
		key = t->vm;
		vm = bpf_map_lookup_elem(&vms, &key);
		if (!vm)
			break;
		a = vcpu_at(vm, t->index);
		if (a->dirty)
			break;
		b = far_sibling(key, t->index);
		if (b < 0)
			break;
		vtime = p->scx.dsq_vtime;
		mirror_scan(cpu, vtime, &scan);
		if (scan.middle < 0)
			break;
		loan.amount = scan.middle + 1;
		if (loan.amount > slice_ns)
			loan.amount = slice_ns;
		loan.vm = key;
		loan.lender = t->index;
		loan.debtor = b;
		if (!lend(&loan))
			break;
		vtime += loan.amount;
		scx_bpf_dsq_move_set_vtime(ITER, vtime);
		if (scx_bpf_dsq_move_vtime(ITER, p, cpu, 0)) {
			a->vtime = vtime;
			mirror_move(t, vtime);
			count(passed);
		} else {
			/* It was taken off the queue in between: it pays when it is queued next. */
			__sync_fetch_and_add(&a->credit, -loan.amount);
			add(STAT_credited_ns, loan.amount);
		}
		add(STAT_paid_ns, loan.amount);
		break;
	}
	return 0;
}

#endif
