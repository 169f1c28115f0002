/* SPDX-License-Identifier: GPL-2.0 */
/*
 * One run queue per CPU: a DSQ ordered by vruntime, and a mirror of the vruntimes in it.
 *
 * The mirror is what ordinates are counted in. Walking a DSQ takes its lock at every step; the
 * mirror is an array that is read without one, so an ordinate costs one pass over memory. It
 * follows the queue: a task takes a slot when it is put on a DSQ and gives it up when it runs,
 * sleeps or ends.
 */
#ifndef GODWIT_QUEUE_H
#define GODWIT_QUEUE_H

#define MIRROR 128
#define PROBES 16
#define WALK 256	/* how far a DSQ is walked at most */
#define DEBTS 32

const volatile u64 slice_ns = 3000000;
u32 nr_cpus;

/* What is due on a CPU: a vCPU that is queued there is to be moved forward. */
struct debt {
	u32 state;	/* 0 free, 1 being written, 2 to be settled */
	u32 debtor;	/* its slot in the machine's record, and who that was */
	u32 debtor_pid;
	u32 meet;	/* how many are to be before it at most */
	u64 vm;
	u64 turns;	/* how often it had run */
};

struct cpu_ctx {
	u64 clock;	/* vruntime that this CPU has come to */
	u64 current_vtime;
	u64 current_since;
	u64 balanced_at;
	u32 running;
	u32 debts_due;
	u32 force_pid;	/* to run next out of order */
	u32 forced_pid;	/* on its way to run so */
	u64 decisions;
	u64 mirror[MIRROR];
	struct debt debt[DEBTS];
	u64 gang;	/* key of the machine whose gang has claimed it; 0: none */
	u64 running_vm;	/* key of the machine whose vCPU runs; 0: none */
	u64 turn_until;	/* when the turn of what runs is over */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_CPUS);
	__type(key, u32);
	__type(value, struct cpu_ctx);
} cpus SEC(".maps");

/* What ends turns on a CPU: the kernel itself looks at slices only at its ticks. */
struct turn {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_CPUS);
	__type(key, u32);
	__type(value, struct turn);
} turns SEC(".maps");

static __always_inline struct cpu_ctx *cpu_ctx(u32 cpu)
{
	return bpf_map_lookup_elem(&cpus, &cpu);
}

static __always_inline bool before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

/* What runs on `cpu`, where this is called, has `left` until its turn is over. */
static __always_inline void turn_ends(u32 cpu, struct cpu_ctx *c, u64 now, u64 left)
{
	struct turn *turn = bpf_map_lookup_elem(&turns, &cpu);

	c->turn_until = now + left;
	if (turn)
		bpf_timer_start(&turn->timer, left, BPF_F_TIMER_CPU_PIN);
}

/* A turn may be over: has its CPU decide, if somebody waits there. */
static int turn_over(void *map, u32 *cpu, struct turn *turn)
{
	struct cpu_ctx *c = cpu_ctx(*cpu);
	u64 now = bpf_ktime_get_ns();

	if (!c || !c->running)
		return 0;
	if (before(now, c->turn_until)) {
		bpf_timer_start(&turn->timer, c->turn_until - now, BPF_F_TIMER_CPU_PIN);
		return 0;
	}
	if (scx_bpf_dsq_nr_queued(*cpu) <= 0)
		return 0;
	count(timed);
	scx_bpf_kick_cpu(*cpu, ENUM(scx_kick_flags, SCX_KICK_PREEMPT));
	return 0;
}

static __always_inline s32 turns_init(u32 cpu)
{
	struct turn *turn = bpf_map_lookup_elem(&turns, &cpu);
	s32 err;

	if (!turn)
		return -EINVAL;
	err = bpf_timer_init(&turn->timer, &turns, CLOCK_MONOTONIC);
	return err ? err : bpf_timer_set_callback(&turn->timer, turn_over);
}

static __always_inline void mirror_leave(struct task_ctx *t)
{
	struct cpu_ctx *c;

	if (t->mirror_cpu < 0)
		return;
	c = cpu_ctx(t->mirror_cpu);
	if (c)
		c->mirror[INDEX(t->mirror_slot, MIRROR)] = 0;
	t->mirror_cpu = -1;
}

GLOBAL int mirror_enter(struct task_ctx *t NONNULL, u32 cpu, u32 hash, u64 vtime)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	u32 i;

	if (!c)
		return 0;
	mirror_leave(t);
	LOOP(i, PROBES) {
		u32 slot = INDEX(hash + i * 7, MIRROR);

		if (c->mirror[slot] || __sync_val_compare_and_swap(&c->mirror[slot], 0, vtime))
			continue;
		t->mirror_slot = slot;
		t->mirror_cpu = cpu;
		return 0;
	}
	count(unmirrored);
	return 0;
}

static __always_inline void mirror_move(struct task_ctx *t, u64 vtime)
{
	struct cpu_ctx *c;

	if (t->mirror_cpu < 0)
		return;
	c = cpu_ctx(t->mirror_cpu);
	if (c)
		c->mirror[INDEX(t->mirror_slot, MIRROR)] = vtime;
}

struct scan {
	u32 queued;
	u32 before;	/* how many have a smaller vruntime */
};

/* Where `vtime` stands in the queue of a CPU. */
GLOBAL int mirror_scan(u32 cpu, u64 vtime, struct scan *out NONNULL)
{
	struct cpu_ctx *c = cpu_ctx(cpu);
	u32 queued = zero, ahead = zero, i;

	if (!c)
		return 0;
	LOOP(i, MIRROR) {
		u64 v = c->mirror[INDEX(i, MIRROR)];
		s64 d = v - vtime;

		if (!v)
			continue;
		queued++;
		ahead += d < 0;
	}
	out->queued = queued;
	out->before = ahead;
	return 0;
}

/* A vruntime told by the clock of one CPU, told by that of another. */
static __always_inline u64 rebase(u64 vtime, u32 from, u32 to)
{
	struct cpu_ctx *f, *g;

	if (from == to)
		return vtime;
	f = cpu_ctx(from);
	g = cpu_ctx(to);
	return f && g ? vtime - f->clock + g->clock : vtime;
}

static __always_inline u32 load_of(u32 cpu, struct cpu_ctx *c)
{
	s32 queued = scx_bpf_dsq_nr_queued(cpu);

	return (queued > 0 ? queued : 0) + c->running;
}

/* Whether `p` may be put on a CPU other than its own. */
static __always_inline bool is_bound(struct task_struct *p)
{
	return p->nr_cpus_allowed == 1 || p->migration_disabled;
}

#endif
