/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where tasks go: siblings to distinct CPUs in the three cases of Algorithm 2 (creation, wake-up,
 * migration), everything so that no CPU idles while others queue.
 *
 * A runnable sibling shuts a CPU; one that sleeps makes it less wanted, since it will come back
 * there. Where a machine has more vCPUs than there are CPUs, the least loaded is taken.
 */
#ifndef GODWIT_PLACE_H
#define GODWIT_PLACE_H

#define BALANCE_NS 50000000ULL
#define PULL_WALK 32

const volatile bool distinct = true;

/* The cost of a CPU, in the order of what matters: a sibling there, work there, having to move. */
#define COST_SIBLING (1 << 20)
#define COST_BUSY 8
#define COST_LOAD 4
#define COST_SLEEPER 3
#define COST_MOVE 2

struct siblings {
	u64 runnable[MAX_CPUS / 64];
	u64 asleep[MAX_CPUS / 64];
};

/* Too large for the stack; each CPU places one task at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct siblings);
} siblings_of SEC(".maps");

/* Where the siblings of slot `self` of machine `key` are, into this CPU's `siblings_of`. */
GLOBAL int find_siblings(u64 key, u32 self)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	struct siblings *out;
	u32 first = 0;
	u32 i;

	out = bpf_map_lookup_elem(&siblings_of, &first);
	if (!out)
		return 0;
	__builtin_memset(out, 0, sizeof(*out));
	if (!vm)
		return 0;
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);
		u32 cpu = INDEX(v->cpu, MAX_CPUS);

		if (!v->pid || i == self)
			continue;
		if (v->state == VCPU_IDLE)
			out->asleep[INDEX(cpu / 64, MAX_CPUS / 64)] |= 1ULL << (cpu % 64);
		else
			out->runnable[INDEX(cpu / 64, MAX_CPUS / 64)] |= 1ULL << (cpu % 64);
	}
	return 0;
}

static __always_inline bool has(const u64 *set, u32 cpu)
{
	return set[INDEX(cpu / 64, MAX_CPUS / 64)] & (1ULL << (cpu % 64));
}

/* Whether a runnable sibling of slot `self` of machine `key` is on `cpu`. */
GLOBAL bool has_sibling_on(u64 key, u32 self, u32 cpu)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	u32 i;

	if (!vm)
		return false;
	LOOP(i, vm->top) {
		struct vcpu *v = vcpu_at(vm, i);

		if (v->pid && i != self && v->cpu == cpu && v->state != VCPU_IDLE)
			return true;
	}
	return false;
}

/* What it costs to put a task on `cpu`, after find_siblings. */
GLOBAL u32 cost_of(u32 cpu, bool moved)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	struct siblings *siblings;
	u32 first = 0, cost, load;

	siblings = bpf_map_lookup_elem(&siblings_of, &first);
	if (!c || !siblings)
		return ~0U;
	load = load_of(cpu, c);
	cost = load * COST_LOAD;
	if (load)
		cost += COST_BUSY;
	if (moved)
		cost += COST_MOVE;
	if (has(siblings->runnable, cpu))
		cost += COST_SIBLING;
	if (has(siblings->asleep, cpu))
		cost += COST_SLEEPER;
	return cost;
}

/* The cheapest CPU for `p`, which may be put anywhere its mask allows. */
GLOBAL s32 place(struct task_struct *p TRUSTED, u64 key, u32 self, s32 prev)
{
	u32 best_cost = ~0U, start = bpf_get_prandom_u32() % MAX_CPUS;
	s32 best = prev;
	u32 i;

	find_siblings(distinct ? key : 0, self);
	LOOP(i, nr_cpus) {
		u32 cpu = (i + start) % nr_cpus, cost;

		if (!bpf_cpumask_test_cpu(cpu, p->cpus_ptr))
			continue;
		cost = cost_of(cpu, (s32)cpu != prev);
		if (cost < best_cost) {
			best_cost = cost;
			best = cpu;
		}
	}
	return best;
}

/*
 * Takes one task from the queue of CPU `from` for CPU `to`: to run at once if that one is idle,
 * else into its queue. Only in ops.dispatch of `to`.
 */
GLOBAL bool pull(u32 from, u32 to, bool idle)
{
	struct task_struct *p;
	bool moved = false;
	u32 seen = zero;

	bpf_for_each(scx_dsq, p, from, 0) {
		struct task_ctx *t;
		struct vcpu *v;
		u64 vtime;

		if (++seen > PULL_WALK)
			break;
		if (is_bound(p) || !bpf_cpumask_test_cpu(to, p->cpus_ptr))
			continue;
		t = task_ctx(p);
		if (!t)
			continue;
		if (distinct && t->vm && has_sibling_on(t->vm, t->index, to))
			continue;
		if (idle) {
			moved = scx_bpf_dsq_move(ITER, p, ENUM(scx_dsq_id_flags, SCX_DSQ_LOCAL), 0);
			break;
		}
		vtime = rebase(p->scx.dsq_vtime, from, to);
		scx_bpf_dsq_move_set_vtime(ITER, vtime);
		moved = scx_bpf_dsq_move_vtime(ITER, p, to, 0);
		if (moved) {
			t->clock = to;
			mirror_enter(t, to, p->pid, vtime);
			v = vcpu_of(t);
			if (v) {
				v->cpu = to;
				v->vtime = vtime;
			}
		}
		break;
	}
	return moved;
}

/* The CPU with the longest queue of more than `more` tasks, from `start` on; -1: none. */
GLOBAL s32 find_busiest(u32 cpu, s32 more, u32 start)
{
	s32 busiest = -1;
	u32 i;

	LOOP(i, nr_cpus) {
		u32 from = (i + start) % nr_cpus;
		s32 queued = from == cpu ? 0 : scx_bpf_dsq_nr_queued(from);

		if (queued > more) {
			more = queued;
			busiest = from;
		}
	}
	return busiest;
}

/*
 * For a CPU whose queue is empty: takes a task over. If what it ran may go on (`keeps`), only from a
 * queue of two and more, since from a shorter one the imbalance would only change its place; if
 * it idles, from whoever has one that may come.
 */
GLOBAL bool pull_idle(u32 cpu, bool keeps)
{
	u32 start = bpf_get_prandom_u32() % MAX_CPUS;
	s32 from = find_busiest(cpu, keeps ? 1 : 0, start);
	u32 i;

	if (from < 0)
		return false;
	if (pull(from, cpu, true))
		goto pulled;
	if (keeps)
		return false;
	LOOP(i, nr_cpus) {
		u32 other = (i + start) % nr_cpus;

		if (other != cpu && scx_bpf_dsq_nr_queued(other) > 0 && pull(other, cpu, true))
			goto pulled;
	}
	return false;
pulled:
	count(pulled_idle);
	return true;
}

/* Now and then: takes a task from the longest queue if that has at least two more. */
GLOBAL int pull_balance(u32 cpu)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	u64 now = bpf_ktime_get_ns();
	s32 busiest;

	if (!c || now - c->balanced_at < BALANCE_NS)
		return 0;
	c->balanced_at = now;
	busiest = find_busiest(cpu, scx_bpf_dsq_nr_queued(cpu) + 1, now % MAX_CPUS);
	if (busiest >= 0 && pull(busiest, cpu, false))
		count(pulled_balance);
	return 0;
}

#endif
