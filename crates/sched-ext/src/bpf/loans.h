/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Algorithm 1: when a vCPU is about to run while a sibling waits far back in another queue, the two
 * meet half-way.
 *
 * How ranks count. What runs on a CPU has rank 0, the first that is queued has rank 1, and the
 * size of a queue is the number queued plus the one that runs. The candidate is about to run, so
 * its own rank is 0 and the distance is the sibling's rank. With alpha 2/3 a queue of two (one
 * runs, one waits) never exceeds the threshold, in a queue of three the last one does.
 *
 * A loan. Each is moved by what it needs to have its turn when the other has, at most a slice. The
 * lender is re-sorted in its own queue at once. The debtor is not touched: its CPU finds on its debt
 * list how many may be before it, and moves it at its next dispatch, the only place where a queued
 * task may be re-sorted. One that runs, sleeps or has ended needs nothing. Never two queues are locked.
 *
 * Zero-sum. What the two need differs, so it goes through an account of their machine: lenders pay in,
 * debtors take out, and what is left its vCPUs pay off, or get back, in instalments of a sixteenth of
 * what they run. So lent + repaid = settled + returned + lost with machines that ended + what stands
 * in accounts.
 *
 * More than two siblings follow one of them, the one that ran first, until it sleeps: it asks for those
 * that are too far when it is about to run, and they wait for it. In pairs they would not settle.
 *
 * Bounds. A vCPU that has lent does not again before it ran, and is asked for once at a time: that is
 * the dirty tag. A machine owes, or is owed, `owe_slices` at most; one for each vCPU where it has more.
 */
#ifndef GODWIT_LOANS_H
#define GODWIT_LOANS_H

const volatile u32 owe_slices = 4;

#define SETTLE_MOST 8
#define INSTALMENT 16

/* What a machine may owe or be owed at most, ns of vruntime. */
static __always_inline s64 owe_most(struct vm *vm)
{
	u32 slices = vm->members > owe_slices ? vm->members : owe_slices;

	return (s64)(slices * slice_ns);
}

/* `want`, but at most a slice, and what the bound of the machine leaves when its account is `account`
 * on the side that grows. */
static __always_inline u64 bounded(struct vm *vm, s64 want, s64 account)
{
	s64 room = owe_most(vm) - account;

	if (want > (s64)slice_ns)
		want = slice_ns;
	if (want > room)
		want = room;
	return want > 0 ? want : 0;
}

/* A lender pays `amount`, or (where that is negative) takes back what it could not pay. */
static __always_inline void account_lent(struct vm *vm, struct vcpu *lender, s64 amount)
{
	__sync_fetch_and_add(&vm->account, amount);
	__sync_fetch_and_add(&vm->lent, amount);
	__sync_fetch_and_add(&lender->net, -amount);
	add(STAT_lent_ns, amount);
}

GLOBAL bool debt_push(u32 cpu, struct debt *new NONNULL)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	u32 i;

	if (!c)
		return false;
	LOOP(i, DEBTS) {
		struct debt *d = &c->debt[INDEX(i, DEBTS)];

		if (d->state || __sync_val_compare_and_swap(&d->state, 0, 1))
			continue;
		d->vm = new->vm;
		d->debtor = new->debtor;
		d->debtor_pid = new->debtor_pid;
		d->meet = new->meet;
		d->turns = new->turns;
		/* An exchange is a full barrier: it is whole before it is seen. */
		__sync_lock_test_and_set(&d->state, 2);
		__sync_fetch_and_add(&c->debts_due, 1);
		return true;
	}
	return false;
}

/*
 * Takes what is to a vCPU's credit off its vruntime (or has it pay what is negative); only while it is
 * on no queue.
 */
static __always_inline u64 take_credit(struct vcpu *v, u64 vtime)
{
	s64 credit;

	if (!v->credit)
		return vtime;
	credit = __sync_lock_test_and_set(&v->credit, 0);
	add(STAT_credited_ns, credit);
	return vtime - credit;
}

/* What a vCPU whose vruntime grew by `by` pays for its machine on top; negative: what it gets back. */
static __always_inline s64 instalment(struct vm *vm, u64 by)
{
	s64 account = vm->account, part = by / INSTALMENT, pays = -account;

	if (!account)
		return 0;
	if (pays > part)
		pays = part;
	if (pays < -part)
		pays = -part;
	__sync_fetch_and_add(&vm->account, pays);
	if (pays > 0)
		add(STAT_repaid_ns, pays);
	else
		add(STAT_returned_ns, -pays);
	return pays;
}

/*
 * Moves the task `pid` of the queue of `cpu` forward until `meet` others are before it at most, by at
 * most `most`; only in ops.dispatch of that CPU. By how much it was moved.
 */
GLOBAL u64 advance(u32 cpu, u32 pid, u32 meet, u64 most)
{
	u64 there = 0, by, vtime;
	struct task_struct *p;
	u32 seen = zero;

	bpf_for_each(scx_dsq, p, cpu, 0) {
		struct task_ctx *t;
		struct vcpu *v;
		u32 before_it = seen++;

		if (before_it >= WALK)
			break;
		vtime = p->scx.dsq_vtime;
		if (before_it == meet)
			there = vtime;
		if ((u32)p->pid != pid)
			continue;
		t = task_ctx(p);
		if (!t || before_it <= meet)
			break;
		by = vtime - there + 1;
		if ((s64)by <= 0)
			break;
		if (by > most)
			by = most;
		vtime -= by;
		scx_bpf_dsq_move_set_vtime(ITER, vtime);
		if (!scx_bpf_dsq_move_vtime(ITER, p, cpu, 0))
			break;
		mirror_move(t, vtime);
		v = vcpu_of(t);
		if (v)
			v->vtime = vtime;
		return by;
	}
	return 0;
}

GLOBAL int settle_one(u32 cpu, struct debt *d NONNULL)
{
	struct vm *vm;
	struct vcpu *v;
	u64 key, got;

	key = d->vm;
	vm = bpf_map_lookup_elem(&vms, &key);
	v = vm ? vcpu_at(vm, d->debtor) : NULL;
	/* One that has had its turn since may be dirty for another reason. */
	if (!v || v->pid != d->debtor_pid || v->turns != d->turns)
		return 0;
	if (v->state == VCPU_QUEUED && v->cpu != cpu && v->cpu < nr_cpus && debt_push(v->cpu, d)) {
		count(carried);
		return 0;
	}
	v->dirty = CLEAN;
	if (v->state != VCPU_QUEUED || v->cpu != cpu)
		return 0;
	got = bounded(vm, slice_ns, -vm->account);
	if (got)
		got = advance(cpu, d->debtor_pid, d->meet, got);
	if (!got)
		return 0;
	__sync_fetch_and_add(&vm->account, -got);
	__sync_fetch_and_add(&v->net, got);
	count(settled);
	add(STAT_settled_ns, got);
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
		struct debt it = {};

		if (d->state != 2)
			continue;
		it.vm = d->vm;
		it.debtor = d->debtor;
		it.debtor_pid = d->debtor_pid;
		it.meet = d->meet;
		it.turns = d->turns;
		__sync_lock_test_and_set(&d->state, 0);
		__sync_fetch_and_add(&c->debts_due, -1);
		settle_one(cpu, &it);
		if (++done >= SETTLE_MOST)
			break;
	}
	return 0;
}

/* Has the CPU on which slot `slot` is queued move it forward, until `meet` others are before it at most. */
GLOBAL bool ask(u64 key, u32 slot, u32 meet)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	struct debt d = {};
	struct vcpu *v;

	if (!vm)
		return false;
	v = vcpu_at(vm, slot);
	if (__sync_val_compare_and_swap(&v->dirty, CLEAN, BORROWED))
		goto refused;
	d.vm = key;
	d.debtor = slot;
	d.debtor_pid = v->pid;
	d.turns = v->turns;
	d.meet = meet;
	if (v->cpu < nr_cpus && debt_push(v->cpu, &d)) {
		count(loans);
		return true;
	}
	v->dirty = CLEAN;
refused:
	count(loan_refused);
	return false;
}

/* The rank of a vCPU that waits too far back in its queue; 0: of none. Counts what it saw. */
GLOBAL u32 far_rank(struct vcpu *v NONNULL, u32 num, u32 den)
{
	struct scan scan = {};
	struct cpu_ctx *c;
	u32 rank, size, bucket;

	if (v->state != VCPU_QUEUED)
		return 0;
	c = cpu_ctx(v->cpu);
	if (!c)
		return 0;
	mirror_scan(v->cpu, v->vtime, &scan);
	size = scan.queued + (c->running ? 1 : 0);
	rank = scan.before + (c->running ? 1 : 0);
	if (!size)
		return 0;
	bucket = rank * 16 / size;
	add(STAT_distance_0 + INDEX(bucket, 16), 1);
	return rank * den >= size * num ? rank : 0;
}

struct far {
	u32 slot;
	u32 rank;
};

/* The first sibling of slot `self`, from slot `from` on, that is clean and too far away. */
GLOBAL bool far_sibling(u64 key, u32 self, u32 from, struct far *out NONNULL)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	bool compared = false;
	u32 i, num, den = alpha_den;

	if (!vm)
		return false;
	num = alpha_of(vm, &den);
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);
		u32 rank;

		if (!v->pid || i == self || i < from || v->dirty || v->state != VCPU_QUEUED)
			continue;
		compared = true;
		rank = far_rank(v, num, den);
		if (rank) {
			count(checks);
			count(exceeded);
			out->slot = i;
			out->rank = rank;
			return true;
		}
	}
	if (compared)
		count(checks);
	return false;
}

/*
 * Moves the first of the queue of `cpu`, slot `self`, back until `meet` others are before it; only in
 * ops.dispatch of that CPU.
 */
GLOBAL int delay(u32 cpu, u64 key, u32 self, u32 meet)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	u64 there = 0, vtime, paid;
	struct task_struct *p;
	u32 seen = zero;
	struct vcpu *a;

	if (!vm || !meet)
		return 0;
	a = vcpu_at(vm, self);
	bpf_for_each(scx_dsq, p, cpu, 0) {
		there = p->scx.dsq_vtime;
		if (seen++ >= meet || seen >= WALK)
			break;
	}
	bpf_for_each(scx_dsq, p, cpu, 0) {
		struct task_ctx *t = task_ctx(p);

		vtime = p->scx.dsq_vtime;
		if (!t || t->vm != key || t->index != self || before(there, vtime))
			break;
		/* Of equals, who comes last is behind. */
		paid = bounded(vm, there - vtime, vm->account);
		a->dirty = LENT;
		account_lent(vm, a, paid);
		add(STAT_paid_ns, paid);
		vtime += paid;
		scx_bpf_dsq_move_set_vtime(ITER, vtime);
		if (scx_bpf_dsq_move_vtime(ITER, p, cpu, 0)) {
			a->vtime = vtime;
			mirror_move(t, vtime);
			count(passed);
		} else {
			/* It was taken off the queue in between: it pays when it is queued next. */
			__sync_fetch_and_add(&a->credit, -paid);
		}
		break;
	}
	return 0;
}

/* The slot that the others of a machine follow, where `self` is about to run. */
static __always_inline u32 followed(struct vm *vm, u32 self)
{
	u32 slot = vm->followed;

	if (slot) {
		struct vcpu *v = vcpu_at(vm, slot - 1);

		if (v->pid && v->state != VCPU_IDLE)
			return slot - 1;
	}
	vm->followed = self + 1;
	return self;
}

/* Algorithm 1 for slot `self`, the first of the queue of `cpu`, where more than two follow one. */
GLOBAL int follow(u32 cpu, u64 key, u32 self)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	struct far far = {};
	u32 leader, rank, num, den, i;

	if (!vm)
		return 0;
	leader = followed(vm, self);
	if (leader != self) {
		struct vcpu *v = vcpu_at(vm, leader);

		if (v->state != VCPU_QUEUED)
			return 0;
		num = alpha_of(vm, &den);
		rank = far_rank(v, num, den);
		count(checks);
		if (!rank)
			return 0;
		count(exceeded);
		count(loans);
		delay(cpu, key, self, rank);
		return 0;
	}
	LOOP(i, MAX_VCPUS) {
		if (!far_sibling(key, self, far.slot, &far))
			break;
		ask(key, far.slot, 0);
		far.slot++;
	}
	return 0;
}

/*
 * Algorithm 1 for the first of the queue of `cpu`; only in ops.dispatch of that CPU. Whoever is
 * first afterwards runs.
 */
GLOBAL int algorithm_1(u32 cpu)
{
	struct far far = {};
	struct task_struct *p;
	u64 key = 0;
	u32 self = 0;
	struct vm *vm;

	bpf_for_each(scx_dsq, p, cpu, 0) {
		struct task_ctx *t = task_ctx(p);

		if (t) {
			key = t->vm;
			self = t->index;
		}
		break;
	}
	vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;
	if (!vm || vcpu_at(vm, self)->dirty || is_strict(vm))
		return 0;
	if (vm->members > 2)
		return follow(cpu, key, self);
	if (far_sibling(key, self, 0, &far) && ask(key, far.slot, far.rank / 2))
		delay(cpu, key, self, far.rank / 2);
	return 0;
}

#endif
