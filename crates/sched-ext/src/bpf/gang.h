/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Strict co-scheduling: what Algorithm 1 becomes where no distance is allowed (section 4.7).
 *
 * The vCPU that a CPU would run next becomes the leader of a gang: each CPU on which a sibling is
 * queued is claimed and interrupted, and runs that sibling. While the leader runs, a claimed CPU
 * prefers the gang's members whenever it decides. When the leader stops or its turn is over, the
 * claims end and the members that still run are interrupted.
 *
 * The ticks of CPUs come at the same moment, so all turns of a gang end at the same moment, too.
 * The first of its CPUs that decides does so for all of them: it starts the next gang, and one that
 * decides at the same time waits for it, in place of going on alone, being interrupted a moment
 * later and having that turn begin late.
 *
 * A CPU belongs to one gang at most, so several gangs run side by side where machines are smaller
 * than the host; a sibling on a CPU of another gang waits for its own turn. A claim holds for four
 * slices at most, whatever happens to its leader. A member that is ahead of its queue's clock by
 * more than the queue's period is left alone: being a member is no way to get more CPU time than
 * others.
 */
#ifndef GODWIT_GANG_H
#define GODWIT_GANG_H

const volatile u32 alpha_num = 2;
const volatile u32 alpha_den = 3;

/* Whether no distance is allowed. */
static __always_inline bool is_strict(void)
{
	return alpha_num == 0;
}

static __always_inline bool is_live(struct vm *vm, u64 now)
{
	return vm->leader && before(now, vm->gang_until);
}

/* Whether the leader has had its slice: it stops at its CPU's next decision. */
static __always_inline bool is_over(struct vm *vm, u64 now)
{
	return !vm->leader || !before(now, vm->gang_since + slice_ns);
}

/*
 * Interrupts `cpu`, so that it decides. Where the turn there is over by itself, the next one is not
 * cut short should it have begun already.
 */
static __always_inline void interrupt(u32 cpu, struct cpu_ctx *c, u64 now)
{
	bool by_itself = !before(now, c->turn_until + slice_ns / 8);

	count(kicks);
	scx_bpf_kick_cpu(cpu, by_itself ? 0 : ENUM(scx_kick_flags, SCX_KICK_PREEMPT));
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

	if (!vm || !c || is_live(vm, now))
		return false;
	if (__sync_val_compare_and_swap(&c->gang, 0, key))
		return false;
	vm->gang_since = now;
	vm->gang_until = now + 4 * slice_ns;
	vm->leader = pid;
	count(gangs);
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);
		struct cpu_ctx *at;

		if (!v->pid || i == self || v->state != VCPU_QUEUED || v->cpu == cpu)
			continue;
		at = cpu_ctx(v->cpu);
		if (!at || !is_fair(v->cpu, at, v->vtime) ||
		    __sync_val_compare_and_swap(&at->gang, 0, key))
			continue;
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
	if (!vm || !is_live(vm, bpf_ktime_get_ns())) {
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

/* A vCPU begins to run on a CPU that its machine's gang has claimed. */
static __always_inline void gang_joined(struct task_ctx *t, u32 pid, struct cpu_ctx *c)
{
	u64 key = t->vm, now = bpf_ktime_get_ns();
	struct vm *vm;

	if (c->gang != key)
		return;
	vm = bpf_map_lookup_elem(&vms, &key);
	if (vm && vm->leader != pid && is_live(vm, now)) {
		count(gang_joined);
		add(STAT_gang_late_ns, now - vm->gang_since);
	}
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

/* Whether a vCPU of this vruntime, whose turn on `cpu` is over, goes on beside its leader. */
static __always_inline bool gang_goes_on(struct task_ctx *t, u32 cpu, u64 vtime)
{
	u64 key = t->vm;
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct vm *vm;

	if (!key || !c || c->gang != key || !is_fair(cpu, c, vtime))
		return false;
	vm = bpf_map_lookup_elem(&vms, &key);
	return vm && is_live(vm, bpf_ktime_get_ns());
}

/* Whether a vCPU that is queued on `cpu` would join its leader there. */
static __always_inline bool gang_waits_for(struct task_ctx *t, u32 cpu, struct cpu_ctx *c, u64 vtime)
{
	return c->running_vm != t->vm && gang_goes_on(t, cpu, vtime);
}

static __always_inline bool gang_lead(struct task_struct *p, u32 cpu)
{
	struct task_ctx *t = task_ctx(p);

	return t && t->vm && gang_start(t->vm, t->index, p->pid, cpu);
}

/*
 * Makes the first of the queue of `cpu` a leader; only in ops.dispatch of that CPU. Whether it is
 * one now.
 */
GLOBAL bool gang_first(u32 cpu)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct task_struct *p;
	bool leads = false;

	if (!c || c->gang)
		return false;
	/* Newer kernels let it be looked at without the queue's lock. */
	if (bpf_ksym_exists(scx_bpf_dsq_peek)) {
		p = scx_bpf_dsq_peek(cpu);
		return p && gang_lead(p, cpu);
	}
	bpf_for_each(scx_dsq, p, cpu, 0) {
		leads = gang_lead(p, cpu);
		break;
	}
	return leads;
}

/* How often one CPU looks whether another has decided: some times as long as that takes. */
#define LOOKS 4000

/*
 * Ends the gang that has claimed `cpu` if its turn is over or its leader is `stops`, the task that
 * ran here, and starts the next one, unless another CPU has done so just now. Whether the first of
 * the queue leads a gang now.
 */
GLOBAL bool gang_turn(u32 cpu, u32 stops)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	bool mine = false, leads;
	struct vm *vm;
	u64 key, now = bpf_ktime_get_ns();
	u32 i;

	if (!c)
		return false;
	key = c->gang;
	vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;
	if (!vm) {
		__sync_val_compare_and_swap(&c->gang, key, 0);
		return gang_first(cpu);
	}
	if (vm->leader != stops && !is_over(vm, now))
		return false;
	LOOP(i, LOOKS) {
		if (!*(volatile u32 *)&vm->deciding &&
		    !__sync_val_compare_and_swap(&vm->deciding, 0, 1)) {
			mine = true;
			break;
		}
	}
	if (c->gang == key && (vm->leader == stops || is_over(vm, bpf_ktime_get_ns())))
		gang_end(key, cpu);
	leads = gang_first(cpu);
	if (mine)
		vm->deciding = 0;
	return leads;
}

#endif
