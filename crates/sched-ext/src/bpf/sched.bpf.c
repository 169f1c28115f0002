/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Co-scheduling of sibling vCPUs as a sched_ext scheduler: one vruntime-ordered queue per CPU,
 * siblings on distinct CPUs, and one of the couplings below.
 *
 *   select_cpu -> enqueue -> [queue of a CPU] -> dispatch -> running -> stopping -> enqueue ...
 *       place       clock      mirror, debts       settle       force      account
 *                                                  Algorithm 1
 *
 * Fairness is by vruntime, a task's CPU time over its weight (weight_of). Each CPU has its clock; a
 * task that changes CPUs keeps its distance to the clock. Weights of cgroups are not looked at.
 */
#include "kernel.h"
#include "stats.h"
#include "vm.h"
#include "queue.h"
#include "place.h"
#include "gang.h"
#include "adapt.h"
#include "loans.h"

char _license[] SEC("license") = "GPL";

#define OPS(name, args...) SEC("struct_ops/" #name) BPF_PROG(op_##name, ##args)
#define OPS_SLEEPABLE(name, args...) SEC("struct_ops.s/" #name) BPF_PROG(op_##name, ##args)

/* What couples siblings: nothing, Algorithm 1, their vCPU 0, or the first CPU. */
enum { COUPLING_NONE, COUPLING_SBCO, COUPLING_PROCESS, COUPLING_CPU };

const volatile u32 coupling = COUPLING_SBCO;

s32 exit_kind;
s64 exit_code;
char exit_reason[128];
char exit_message[512];

/* The clocks begin here, so that a vruntime is never 0, which means none in the mirror. */
#define CLOCK_START (1ULL << 40)

s32 OPS(select_cpu, struct task_struct *p, s32 prev, u64 wake_flags)
{
	struct task_ctx *t = task_ctx(p);
	bool idle = false;
	s32 cpu;

	if (!t || p->nr_cpus_allowed == 1)
		return prev;
	refresh(p, t, prev);
	if (distinct && t->vm) {
		struct vcpu *v;

		cpu = place(p, t->vm, t->index, prev);
		idle = scx_bpf_test_and_clear_cpu_idle(cpu);
		v = vcpu_of(t);
		if (v) {
			if (wake_flags & ENUM(scx_wake_flags, SCX_WAKE_FORK))
				count(placed_new);
			else if (v->cpu != (u32)cpu)
				count(placed_woken);
			v->cpu = cpu;
		}
	} else {
		cpu = scx_bpf_select_cpu_dfl(p, prev, wake_flags, &idle);
		if (!idle && (wake_flags & ENUM(scx_wake_flags, SCX_WAKE_FORK)))
			cpu = place(p, t->vm, t->index, prev);
	}
	if (idle) {
		count(direct);
		dsq_insert(p, ENUM(scx_dsq_id_flags, SCX_DSQ_LOCAL), slice_ns, 0);
	}
	return cpu;
}

void OPS(enqueue, struct task_struct *p, u64 enq_flags)
{
	struct task_ctx *t = task_ctx(p);
	s32 cpu = scx_bpf_task_cpu(p);
	struct cpu_ctx *c;
	struct vcpu *v;
	u64 vtime;

	/* A CPU's own kernel threads do what others wait for. */
	if (!t || ((p->flags & PF_KTHREAD) && p->nr_cpus_allowed == 1)) {
		count(direct);
		dsq_insert(p, ENUM(scx_dsq_id_flags, SCX_DSQ_LOCAL), slice_ns, enq_flags);
		return;
	}
	refresh(p, t, cpu);
	if (distinct && t->vm && has_sibling_on(t->vm, t->index, cpu)) {
		s32 other = is_bound(p) ? cpu : place(p, t->vm, t->index, cpu);

		if (other != cpu) {
			count(placed_moved);
			cpu = other;
		}
		if (has_sibling_on(t->vm, t->index, cpu))
			count(stacked);
	}
	c = cpu_ctx(cpu);
	if (!c)
		return;
	vtime = rebase(p->scx.dsq_vtime, t->clock, cpu);
	t->clock = cpu;
	v = vcpu_of(t);
	if (v)
		vtime = take_credit(v, vtime);
	/* Who slept gets one slice of what it missed; who waited keeps all that it is behind. */
	if ((enq_flags & ENUM(scx_enq_flags, SCX_ENQ_WAKEUP)) && before(vtime, c->clock - slice_ns))
		vtime = c->clock - slice_ns;
	if (v) {
		v->cpu = cpu;
		v->vtime = vtime;
		v->state = VCPU_QUEUED;
	}
	mirror_enter(t, cpu, p->pid, vtime);
	count(enqueues);
	dsq_insert_vtime(p, cpu, slice_ns, vtime, enq_flags);
	if (!c->running) {
		scx_bpf_kick_cpu(cpu, ENUM(scx_kick_flags, SCX_KICK_IDLE));
	} else if (enq_flags & ENUM(scx_enq_flags, SCX_ENQ_WAKEUP)) {
		u64 current = c->current_vtime + (bpf_ktime_get_ns() - c->current_since);
		bool joins = coupling == COUPLING_SBCO && has_gangs() && gang_waits_for(t, cpu, c, vtime);

		if (joins || before(vtime + slice_ns / 2, current)) {
			count(preempted);
			scx_bpf_kick_cpu(cpu, ENUM(scx_kick_flags, SCX_KICK_PREEMPT));
			return;
		}
	}
	/* What runs had its turn, and went on since nobody waited. */
	if (c->running && !before(bpf_ktime_get_ns(), c->turn_until))
		scx_bpf_kick_cpu(cpu, ENUM(scx_kick_flags, SCX_KICK_PREEMPT));
}

/* Runs a vCPU of this CPU's queue out of order. */
GLOBAL bool dispatch_forced(u32 cpu, u32 pid)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct task_struct *p;
	bool moved = false;
	u32 seen = zero;

	if (!c)
		return false;
	bpf_for_each(scx_dsq, p, cpu, 0) {
		if (++seen > WALK)
			break;
		if ((u32)p->pid != pid)
			continue;
		moved = scx_bpf_dsq_move(ITER, p, ENUM(scx_dsq_id_flags, SCX_DSQ_LOCAL), 0);
		break;
	}
	if (moved) {
		c->forced_pid = pid;
		count(forced);
	} else {
		count(force_missed);
	}
	return moved;
}

/*
 * What a task's time is divided by, 100 where it is not nice. The kernel's own nice threads count as
 * others do: khugepaged, at nice 19, holds the lock of a machine's memory while it waits for its turn,
 * which would be after a hundred of the machine's.
 */
static __always_inline u32 weight_of(struct task_struct *p)
{
	u32 weight = p->scx.weight ? p->scx.weight : 100;

	return (p->flags & PF_KTHREAD) && weight < 100 ? 100 : weight;
}

/* The vruntime of a task that runs, with what it has used of its turn so far. */
static __always_inline u64 vtime_now(struct task_struct *p, struct task_ctx *t)
{
	return p->scx.dsq_vtime + (p->se.sum_exec_runtime - t->exec) * 100 / weight_of(p);
}

/*
 * Strict co-scheduling: starts the next gang where a turn is over, then runs, or lets go on, the
 * member of a gang that this CPU is claimed for.
 */
static __always_inline bool dispatch_gang(u32 cpu, struct cpu_ctx *c, struct task_struct *prev,
					  bool keeps)
{
	struct task_ctx *t = prev ? task_ctx(prev) : NULL;
	u64 more;
	u32 pid;

	if (gang_turn(cpu, t && t->vm ? prev->pid : -1) || !c->gang)
		return false;
	more = t && keeps ? gang_goes_on(t, cpu, vtime_now(prev, t)) : 0;
	if (more) {
		count(gang_kept);
		set_slice(prev, more);
		turn_ends(cpu, c, bpf_ktime_get_ns(), more);
		return true;
	}
	pid = gang_member(cpu);
	return pid && dispatch_forced(cpu, pid);
}

void OPS(dispatch, s32 cpu, struct task_struct *prev)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	bool keeps = prev && (prev->scx.flags & ENUM(scx_ent_flags, SCX_TASK_QUEUED));
	bool chosen = false;
	u64 started = 0;
	u32 forced_pid;

	if (!c)
		return;
	count(dispatches);
	if (++c->decisions % 16 == 0)
		started = bpf_ktime_get_ns();
	/* Also where a gang has the CPU: its member may be alone here while others queue elsewhere. */
	pull_balance(cpu);
	if (coupling == COUPLING_SBCO) {
		if (c->debts_due)
			settle(cpu);
		if (has_gangs())
			chosen = dispatch_gang(cpu, c, prev, keeps);
		if (alpha_num && !chosen)
			algorithm_1(cpu);
	} else if (c->force_pid) {
		forced_pid = __sync_lock_test_and_set(&c->force_pid, 0);
		chosen = dispatch_forced(cpu, forced_pid);
	}
	if (started) {
		count(sampled);
		add(STAT_sampled_ns, bpf_ktime_get_ns() - started);
	}
	if (chosen)
		return;
	if (dsq_move_to_local(cpu) || pull_idle(cpu, keeps))
		return;
	/* It goes on; the kernel would give it a much longer slice. */
	if (keeps) {
		set_slice(prev, slice_ns);
		turn_ends(cpu, c, bpf_ktime_get_ns(), slice_ns);
	}
}

/*
 * Interrupts the CPUs on which siblings of slot `self` wait, so that they run there now. One that
 * is ahead of its share by more than it might owe is left alone: being forced is no way to get
 * more CPU time than others.
 */
GLOBAL int force_siblings(u64 key, u32 self)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	u32 i;

	if (!vm)
		return 0;
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);
		struct cpu_ctx *c;

		if (!v->pid || i == self || v->state != VCPU_QUEUED)
			continue;
		c = cpu_ctx(v->cpu);
		if (!c || before(c->clock + owe_slices * slice_ns, v->vtime))
			continue;
		c->force_pid = v->pid;
		count(kicks);
		scx_bpf_kick_cpu(v->cpu, ENUM(scx_kick_flags, SCX_KICK_PREEMPT));
	}
	return 0;
}

void OPS(running, struct task_struct *p)
{
	struct task_ctx *t = task_ctx(p);
	s32 cpu = scx_bpf_task_cpu(p);
	struct cpu_ctx *c = cpu_ctx(cpu);
	u64 vtime = p->scx.dsq_vtime, left = slice_ns;
	struct vcpu *v;

	if (!t || !c)
		return;
	mirror_leave(t);
	if (t->clock != (u32)cpu) {
		vtime = rebase(vtime, t->clock, cpu);
		t->clock = cpu;
		set_vtime(p, vtime);
	}
	/* Who runs out of order says nothing of how far this CPU has come. */
	if (before(c->clock, vtime) && c->forced_pid != (u32)p->pid)
		c->clock = vtime;
	c->forced_pid = 0;
	c->running = 1;
	c->running_vm = t->vm;
	c->current_vtime = vtime;
	c->current_since = bpf_ktime_get_ns();
	t->exec = p->se.sum_exec_runtime;
	count(switches);
	v = vcpu_of(t);
	if (v && coupling == COUPLING_SBCO && has_gangs())
		left = gang_joined(t, p->pid, c, c->current_since);
	turn_ends(cpu, c, c->current_since, left);
	if (!v)
		return;
	v->cpu = cpu;
	v->state = VCPU_RUNNING;
	__sync_fetch_and_add(&v->net, -(v->net >> 3));
	/* It has its turn: what was asked for it is no longer needed, and it may lend again. */
	v->turns++;
	v->dirty = CLEAN;
	if ((coupling == COUPLING_PROCESS && t->index == 0) || (coupling == COUPLING_CPU && cpu == 0))
		force_siblings(t->vm, t->index);
}

void OPS(stopping, struct task_struct *p, bool runnable)
{
	struct task_ctx *t = task_ctx(p);
	struct cpu_ctx *c = cpu_ctx(scx_bpf_task_cpu(p));
	u32 weight = weight_of(p);
	u64 vtime = p->scx.dsq_vtime, used, charged;
	struct vm *vm;
	struct vcpu *v;
	u64 key;

	if (!t || !c)
		return;
	c->running = 0;
	c->running_vm = 0;
	if (coupling == COUPLING_SBCO && has_gangs())
		gang_left(t, p->pid, scx_bpf_task_cpu(p));
	used = p->se.sum_exec_runtime - t->exec;
	charged = used * 100 / weight;
	vtime += charged;
	key = t->vm;
	vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;
	if (vm) {
		adapt(vm, key, __sync_fetch_and_add(&vm->runtime, used) + used);
		v = vcpu_at(vm, t->index);
		vtime = take_credit(v, vtime) + instalment(vm, charged);
		v->state = VCPU_IDLE;
	}
	set_vtime(p, vtime);
}

void OPS(quiescent, struct task_struct *p, u64 deq_flags)
{
	struct task_ctx *t = task_ctx(p);
	struct vm *vm;
	u64 key;

	if (!t)
		return;
	mirror_leave(t);
	key = t->vm;
	vm = key ? bpf_map_lookup_elem(&vms, &key) : NULL;
	if (!vm)
		return;
	vcpu_at(vm, t->index)->state = VCPU_IDLE;
	if (deq_flags & ENUM(scx_deq_flags, SCX_DEQ_SLEEP))
		__sync_fetch_and_add(&vm->sleeps, 1);
}

/*
 * KVM's directed yield: a vCPU that spins asks that a sibling run. It lends it a slice; the
 * sibling's CPU moves it forward at its next dispatch, which an interrupt brings about.
 */
GLOBAL bool yield_to(struct task_struct *from TRUSTED, struct task_struct *to TRUSTED)
{
	struct task_ctx *f = task_ctx(from), *t = task_ctx(to);
	struct vm *vm;
	u64 key;

	if (!f || !t || !f->vm || f->vm != t->vm || f->index == t->index)
		return false;
	key = f->vm;
	vm = bpf_map_lookup_elem(&vms, &key);
	if (!vm || vcpu_at(vm, t->index)->state != VCPU_QUEUED || !bounded(vm, 1, vm->account) ||
	    !ask(key, t->index, 0))
		return false;
	/* Whether the other needs it or not, it pays when its vruntime is next written. */
	account_lent(vm, vcpu_at(vm, f->index), slice_ns);
	__sync_fetch_and_add(&vcpu_at(vm, f->index)->credit, -slice_ns);
	add(STAT_paid_ns, slice_ns);
	__sync_fetch_and_add(&vm->spins, 1);
	count(yields_to);
	return true;
}

bool OPS(yield, struct task_struct *from, struct task_struct *to)
{
	bool done = false;

	count(yields);
	if (to && coupling == COUPLING_SBCO)
		done = yield_to(from, to);
	if (!to || done)
		set_slice(from, 0);
	return done;
}

struct yield_args {
	s32 from;
	s32 to;
};

/* The inner part of `yield` for a test: KVM's own calls cannot be had without KVM. */
SEC("syscall")
int yield_test(struct yield_args *args)
{
	struct task_struct *from = bpf_task_from_pid(args->from), *to;
	int done = -EINVAL;

	if (!from)
		return done;
	to = bpf_task_from_pid(args->to);
	if (to) {
		done = yield_to(from, to);
		bpf_task_release(to);
	}
	bpf_task_release(from);
	return done;
}

struct cost_args {
	u32 queued;	/* in each queue, at most as many as the mirror holds */
	u32 siblings;
	u32 turns;
	u32 spare;
	u64 ns;
};

/*
 * What a decision costs: comparing a candidate with siblings that all wait near the front of queues
 * of one size, so that none ends the search. Needs no sched_ext, so it runs on any machine.
 */
SEC("syscall")
int cost_test(struct cost_args *args)
{
	u32 queued = args->queued, siblings = args->siblings, turns = args->turns, first = 0;
	u64 key = ~0ULL, started;
	struct vm *vm, *empty = bpf_map_lookup_elem(&blank, &first);
	struct far far = {};
	u32 found = 0;
	u32 i, cpu;

	if (!empty)
		return -EINVAL;
	bpf_map_update_elem(&vms, &key, empty, 0);
	vm = bpf_map_lookup_elem(&vms, &key);
	if (!vm)
		return -ENOMEM;
	vm->top = siblings + 1;
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);

		if (i >= MAX_VCPUS)
			break;
		v->pid = i + 1;
		v->cpu = i;
		v->state = VCPU_QUEUED;
		v->vtime = CLOCK_START;
	}
	LOOP(cpu, MAX_CPUS) {
		struct cpu_ctx *c = cpu_ctx(cpu);

		if (!c || cpu > siblings)
			break;
		c->running = 1;
		LOOP(i, MIRROR)
			c->mirror[INDEX(i, MIRROR)] = i < queued ? CLOCK_START + i : 0;
	}
	started = bpf_ktime_get_ns();
	LOOP(i, turns)
		found += far_sibling(key, 0, 0, &far);
	args->ns = bpf_ktime_get_ns() - started;
	args->spare = found;
	bpf_map_delete_elem(&vms, &key);
	return 0;
}

s32 OPS(init_task, struct task_struct *p, struct scx_init_task_args *args)
{
	struct task_ctx *t = bpf_task_storage_get(&tasks, p, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (!t)
		return -ENOMEM;
	t->mirror_cpu = -1;
	return 0;
}

void OPS(exit_task, struct task_struct *p, struct scx_exit_task_args *args)
{
	struct task_ctx *t = task_ctx(p);

	if (!t)
		return;
	mirror_leave(t);
	if (t->vm)
		vm_leave(t->vm, t->index, p->pid);
	t->vm = 0;
}

void OPS(enable, struct task_struct *p)
{
	struct task_ctx *t = task_ctx(p);
	s32 cpu = scx_bpf_task_cpu(p);
	struct cpu_ctx *c = cpu_ctx(cpu);

	if (!t || !c)
		return;
	t->clock = cpu;
	set_vtime(p, c->clock);
}

s32 OPS_SLEEPABLE(init)
{
	s32 err;
	u32 i;

	nr_cpus = scx_bpf_nr_cpu_ids();
	if (nr_cpus > MAX_CPUS)
		return -EINVAL;
	LOOP(i, nr_cpus) {
		struct cpu_ctx *c = cpu_ctx(i);

		if (!c)
			return -EINVAL;
		c->clock = CLOCK_START;
		err = scx_bpf_create_dsq(i, -1);
		if (!err)
			err = turns_init(i);
		if (err)
			return err;
	}
	return 0;
}

void OPS(exit, struct scx_exit_info *info)
{
	exit_code = info->exit_code;
	bpf_probe_read_kernel_str(exit_reason, sizeof(exit_reason), info->reason);
	bpf_probe_read_kernel_str(exit_message, sizeof(exit_message), info->msg);
	/* Last: whoever sees it finds the rest. */
	__sync_lock_test_and_set(&exit_kind, (s32)info->kind);
}

SEC(".struct_ops.link")
struct sched_ext_ops godwit = {
	.select_cpu = (void *)op_select_cpu,
	.enqueue = (void *)op_enqueue,
	.dispatch = (void *)op_dispatch,
	.running = (void *)op_running,
	.stopping = (void *)op_stopping,
	.quiescent = (void *)op_quiescent,
	.yield = (void *)op_yield,
	.init_task = (void *)op_init_task,
	.exit_task = (void *)op_exit_task,
	.enable = (void *)op_enable,
	.init = (void *)op_init,
	.exit = (void *)op_exit,
	.timeout_ms = 20000,
	.name = "godwit",
};
