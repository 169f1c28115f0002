/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Strict co-scheduling: what Algorithm 1 becomes where no distance is allowed (section 4.7).
 *
 * The vCPU that a CPU would run next becomes the leader of a gang: each CPU on which a sibling is
 * queued is claimed, interrupted unless it is about to decide anyway, and runs that sibling. While the leader runs, a claimed CPU
 * prefers the gang's members whenever it decides. When the leader stops or its turn is over, the
 * claims end and the members that still run are interrupted.
 *
 * Turns end by timers, those of a gang's members when that of its leader does. The first of its CPUs
 * that decides does so for all of them: it starts the next gang. The others find that done when they
 * decide, a moment later, so nobody has to be interrupted and no turn begins late.
 *
 * A CPU belongs to one gang at most, so several gangs run side by side where machines are smaller
 * than the host; a sibling on a CPU of another gang waits for its own turn. A claim is worth nothing
 * once a slice has passed, whatever happens to its leader. A member that is ahead of its queue's
 * clock by more than the queue's period is left alone: being a member is no way to get more CPU time
 * than others.
 */
#ifndef GODWIT_GANG_H
#define GODWIT_GANG_H

const volatile u32 alpha_num = 2;
const volatile u32 alpha_den = 3;
/* Whether each machine's threshold follows what its distance costs it (adapt.h); else all have alpha. */
const volatile bool adaptive = false;

/* Steps between alpha and no distance at all. */
#define STEPS 4

/* Whether some machine may be allowed no distance. */
static __always_inline bool has_gangs(void)
{
	return alpha_num == 0 || adaptive;
}

/* Whether a machine is allowed no distance. */
static __always_inline bool is_strict(struct vm *vm)
{
	return alpha_num == 0 || (adaptive && vm->tighter >= STEPS);
}

/* The threshold of a machine, a share of a queue's size: its numerator, and its denominator in `den`. */
static __always_inline u32 alpha_of(struct vm *vm, u32 *den)
{
	u32 tighter = vm->tighter;

	*den = alpha_den * STEPS;
	return alpha_num * (adaptive && tighter <= STEPS ? STEPS - tighter : STEPS);
}

/* Whether there is no gang, or its leader has had its slice and stops at its CPU's next decision. */
static __always_inline bool is_over(struct vm *vm, u64 now)
{
	return !vm->leader || !before(now, vm->gang_since + slice_ns);
}

/* Whether the turn on a CPU ends now by itself: its timer has just found it over, or is about to. */
static __always_inline bool is_ending(struct cpu_ctx *c, u64 now)
{
	return c->running && before(c->turn_until, now + slice_ns / 8);
}

/* Has `cpu` decide at once. */
static __always_inline void interrupt(u32 cpu, struct cpu_ctx *c, u64 now)
{
	if (is_ending(c, now))
		return;
	count(kicks);
	scx_bpf_kick_cpu(cpu, ENUM(scx_kick_flags, SCX_KICK_PREEMPT));
}

/* Whether a task of this vruntime may run out of order on `cpu`. */
static __always_inline bool is_fair(u32 cpu, struct cpu_ctx *c, u64 vtime)
{
	return !before(c->clock + slice_ns * (load_of(cpu, c) + 1), vtime);
}

/* Ends the gang of a machine: frees its CPUs and stops the members that run. */
GLOBAL int gang_end(u64 key, u32 cpu)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	u64 now = bpf_ktime_get_ns();
	u32 i;

	if (vm)
		vm->leader = 0;
	LOOP(i, nr_cpus) {
		struct cpu_ctx *c = cpu_ctx(i);

		if (!c || c->gang != key)
			continue;
		__sync_val_compare_and_swap(&c->gang, key, 0);
		if (i != cpu && c->running_vm == key)
			interrupt(i, c, now);
	}
	return 0;
}

/* Makes slot `self` of machine `key`, which is about to run on `cpu`, a leader if it may be one. */
GLOBAL bool gang_start(u64 key, u32 self, u32 pid, u32 cpu)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	struct cpu_ctx *c = cpu_ctx(cpu);
	u64 now = bpf_ktime_get_ns();
	u32 i;

	if (!vm || !c || !is_over(vm, now))
		return false;
	if (__sync_val_compare_and_swap(&c->gang, 0, key))
		return false;
	vm->gang_since = now;
	vm->leader = pid;
	count(gangs);
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);
		struct cpu_ctx *at;
		struct vm *other;
		u64 was;

		if (!v->pid || i == self || v->state == VCPU_IDLE || v->cpu == cpu)
			continue;
		at = cpu_ctx(v->cpu);
		if (!at || (v->state == VCPU_QUEUED && !is_fair(v->cpu, at, v->vtime)))
			continue;
		was = at->gang;
		other = was ? bpf_map_lookup_elem(&vms, &was) : NULL;
		if ((other && !is_over(other, now)) ||
		    __sync_val_compare_and_swap(&at->gang, was, key) != was)
			continue;
		if (v->state == VCPU_QUEUED)
			interrupt(v->cpu, at, now);
	}
	return true;
}

/* The pid of the member that `cpu`, which a gang has claimed, is to run; 0: none. */
GLOBAL u32 gang_member(u32 cpu)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct vm *vm;
	u64 key;
	u32 i;

	if (!c)
		return 0;
	key = c->gang;
	if (!key)
		return 0;
	vm = bpf_map_lookup_elem(&vms, &key);
	if (!vm || is_over(vm, bpf_ktime_get_ns())) {
		__sync_val_compare_and_swap(&c->gang, key, 0);
		return 0;
	}
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);

		if (v->pid && v->cpu == cpu && v->state == VCPU_QUEUED && is_fair(cpu, c, v->vtime))
			return v->pid;
	}
	return 0;
}

/*
 * A vCPU begins to run; for how long, where its machine's gang has claimed its CPU: until its leader's
 * turn is over. Else a slice.
 */
static __always_inline u64 gang_joined(struct task_ctx *t, u32 pid, struct cpu_ctx *c, u64 now)
{
	u64 key = t->vm;
	struct vm *vm;

	if (c->gang != key)
		return slice_ns;
	vm = bpf_map_lookup_elem(&vms, &key);
	if (!vm || is_over(vm, now))
		return slice_ns;
	if (vm->leader == pid) {
		vm->led_since = now;
	} else {
		count(gang_joined);
		/* Otherwise it is there before its leader. */
		if (!before(vm->led_since, vm->gang_since))
			add(STAT_gang_late_ns, now - vm->led_since);
	}
	return vm->gang_since + slice_ns - now;
}

/* A vCPU stops: if it leads a gang, that ends. */
static __always_inline bool gang_left(struct task_ctx *t, u32 pid, u32 cpu)
{
	u64 key = t->vm;
	struct vm *vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;

	if (!vm || vm->leader != pid)
		return false;
	gang_end(key, cpu);
	return true;
}

/* How long a vCPU of this vruntime, whose turn on `cpu` is over, may go on beside its leader. */
static __always_inline u64 gang_goes_on(struct task_ctx *t, u32 cpu, u64 vtime)
{
	u64 key = t->vm, now = bpf_ktime_get_ns();
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct vm *vm;

	if (!key || !c || c->gang != key || !is_fair(cpu, c, vtime))
		return 0;
	vm = bpf_map_lookup_elem(&vms, &key);
	return vm && !is_over(vm, now) ? vm->gang_since + slice_ns - now : 0;
}

/* Whether a vCPU that is queued on `cpu` would join its leader there. */
static __always_inline bool gang_waits_for(struct task_ctx *t, u32 cpu, struct cpu_ctx *c, u64 vtime)
{
	return c->running_vm != t->vm && gang_goes_on(t, cpu, vtime);
}

/* Whether `p` is a vCPU that may lead a gang. */
static __always_inline bool may_lead(struct task_struct *p)
{
	struct task_ctx *t = task_ctx(p);
	u64 key = t ? t->vm : 0;
	struct vm *vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;

	return vm && is_strict(vm);
}

static __always_inline bool gang_lead(struct task_struct *p, u32 cpu)
{
	struct task_ctx *t = task_ctx(p);

	return t && may_lead(p) && gang_start(t->vm, t->index, p->pid, cpu);
}

/*
 * Makes the first of the queue of `cpu` a leader, or only looks whether it may be one; only in
 * ops.dispatch of that CPU. Whether it is, or may be.
 */
GLOBAL bool gang_first(u32 cpu, bool looks)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct task_struct *p;
	bool leads = false;

	if (!c || c->gang)
		return false;
	/* Newer kernels let it be looked at without the queue's lock. */
	if (bpf_ksym_exists(scx_bpf_dsq_peek)) {
		p = scx_bpf_dsq_peek(cpu);
		return p && (looks ? may_lead(p) : gang_lead(p, cpu));
	}
	bpf_for_each(scx_dsq, p, cpu, 0) {
		leads = looks ? may_lead(p) : gang_lead(p, cpu);
		break;
	}
	return leads;
}

/*
 * Two CPUs that decide at the same time and know nothing of each other would each start a gang that
 * the other has no CPU for. So of the CPUs that share a cache one decides at a time. It waits, some
 * times as long as a decision takes; where that is not enough, and where machines span caches, some
 * gangs are not whole, but a CPU is claimed by one of them only in any case.
 */
#define LOOKS 4000
#define DOMAINS 64

struct deciding {
	u32 cpus;
	u32 spare[15];	/* no two on one cache line */
} deciding[DOMAINS];

/* Which cache each CPU has. */
const volatile u8 domain_of[MAX_CPUS] = {};

static __always_inline u32 *deciding_at(u32 cpu)
{
	u32 domain = domain_of[INDEX(cpu, MAX_CPUS)];

	return &deciding[INDEX(domain, DOMAINS)].cpus;
}

GLOBAL bool decide_alone(u32 cpu)
{
	u32 *taken = deciding_at(cpu);
	u32 i;

	LOOP(i, LOOKS) {
		if (!*(volatile u32 *)taken && !__sync_val_compare_and_swap(taken, 0, 1))
			return true;
	}
	count(crowded);
	return false;
}

/* Whether the gang `key` still has the CPUs that it claimed; it has not if `stops` leads it. */
static __always_inline bool gang_holds(u64 key, u32 stops)
{
	struct vm *vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;

	return vm && vm->leader != stops && !is_over(vm, bpf_ktime_get_ns());
}

/*
 * Ends the gang that has claimed `cpu` if its turn is over or its leader is `stops`, the task that
 * ran here, and starts the next one, unless another CPU has done so just now. Whether the first of
 * the queue leads a gang now.
 */
GLOBAL bool gang_turn(u32 cpu, u32 stops)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	bool alone, leads = false;
	u64 key;

	if (!c || gang_holds(c->gang, stops) || (!c->gang && !gang_first(cpu, true)))
		return false;
	alone = decide_alone(cpu);
	key = c->gang;
	if (!gang_holds(key, stops)) {
		if (key)
			gang_end(key, cpu);
		leads = gang_first(cpu, false);
	}
	if (alone)
		*(volatile u32 *)deciding_at(cpu) = 0;
	return leads;
}

#endif
