/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Which tasks are the vCPUs of one virtual machine, and what is known of each.
 *
 * A machine's record is a hash entry; its vCPUs' slots are claimed and given up with atomic
 * operations. What a slot says is written by the CPU that holds its task's run queue, and read by
 * others without a lock: a reader may be a moment behind, and everything decided on it is checked
 * again by the kernel when it is applied.
 */
#ifndef GODWIT_VM_H
#define GODWIT_VM_H

#define MAX_CPUS 512
#define MAX_VCPUS 64
#define MAX_VMS 8192
#define MAX_LISTED 4096

/* How a virtual machine is recognised. */
enum { VM_BY_NAMES, VM_BY_PROCESS, VM_BY_TGID, VM_BY_CGROUP };

enum { VCPU_IDLE, VCPU_QUEUED, VCPU_RUNNING };

/* The tag of Algorithm 1. */
enum { CLEAN, LENT, BORROWED };

struct vcpu {
	u32 pid;	/* 0: the slot is free */
	u32 cpu;	/* where it runs, is queued or ran last */
	u32 state;
	u32 dirty;
	u64 vtime;	/* while it is queued */
	s64 credit;	/* given back to it, not yet taken off its vruntime */
	s64 net;	/* what it borrowed less what it lent, fading with its turns */
	u64 turns;	/* how often it began to run */
};

struct vm {
	u64 runtime;	/* ns that its vCPUs ran */
	u64 lent;	/* ns of vruntime that its vCPUs paid for loans */
	u32 members;
	u32 leader;	/* pid of the vCPU that leads the machine's gang; 0: none */
	struct vcpu vcpu[MAX_VCPUS];
	u64 gang_since;	/* when it began */
	u64 led_since;	/* when its leader began to run */
	s64 account;	/* what its vCPUs paid for loans less what they got, ns of vruntime */
	u32 top;	/* no slot from here on was ever taken */
	u32 followed;	/* the slot that the others follow, and one; 0: none yet */
	/* What its threshold rests on; see adapt.h. */
	u64 window;	/* its runtime when the window began */
	u32 tighter;	/* steps from the loosest threshold */
	u32 sleeps;	/* of its vCPUs in this window, by themselves */
	u32 spins;	/* that KVM told of */
	u32 tells;	/* whether it ever did */
	u32 waits;	/* windows until a looser threshold is tried */
	u32 patience;
	u32 tries;	/* whether it is being tried */
	u32 spare;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_VMS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct vm);
} vms SEC(".maps");

/* A record is too large for the stack: new ones are copied from here. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct vm);
} blank SEC(".maps");

/* Thread-group ids or cgroup ids that the loader names. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_LISTED);
	__type(key, u64);
	__type(value, u32);
} listed SEC(".maps");

struct task_ctx {
	u64 vm;		/* key of its machine; 0: none */
	u32 index;	/* its slot there */
	u32 clock;	/* the CPU whose clock its vruntime is told by */
	u64 name;	/* what was looked at when it was last recognised */
	u64 exec;	/* its CPU time when it began to run */
	s32 mirror_cpu;	/* its place in the mirror of a queue; -1: none */
	u32 mirror_slot;
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task_ctx);
} tasks SEC(".maps");

const volatile u32 vm_by = VM_BY_NAMES;
const volatile u64 process_name[2] = {};

/*
 * A number made an index of an array of `n`, a power of two: the compiler may not take the mask
 * away because it knows the bound, since the verifier might not.
 */
#define INDEX(i, n)                        \
	({                                 \
		u32 index_ = (i);          \
		barrier_var(index_);       \
		index_ & ((n) - 1);        \
	})

static __always_inline struct vcpu *vcpu_at(struct vm *vm, u32 i)
{
	return &vm->vcpu[INDEX(i, MAX_VCPUS)];
}

static __always_inline struct task_ctx *task_ctx(struct task_struct *p)
{
	return bpf_task_storage_get(&tasks, p, NULL, 0);
}

static __always_inline struct vcpu *vcpu_of(struct task_ctx *t)
{
	struct vm *vm;
	u64 key = t->vm;

	if (!key)
		return NULL;
	vm = bpf_map_lookup_elem(&vms, &key);
	return vm ? vcpu_at(vm, t->index) : NULL;
}

static __always_inline bool is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* "CPU 3/KVM" and "CPU 3/TCG" (QEMU with debug-threads=on), "vcpu3" (cloud-hypervisor). */
static __always_inline bool is_vcpu_name(const char *comm)
{
	int i;

	if (comm[0] == 'v' && comm[1] == 'c' && comm[2] == 'p' && comm[3] == 'u')
		return is_digit(comm[4]);
	if (comm[0] != 'C' || comm[1] != 'P' || comm[2] != 'U' || comm[3] != ' ' || !is_digit(comm[4]))
		return false;
	for (i = 5; i < 9; i++) {
		if (comm[i] == '/')
			return (comm[i + 1] == 'K' && comm[i + 2] == 'V' && comm[i + 3] == 'M') ||
			       (comm[i + 1] == 'T' && comm[i + 2] == 'C' && comm[i + 3] == 'G');
		if (!is_digit(comm[i]))
			return false;
	}
	return false;
}

/* The key of the machine that `p` is a vCPU of; 0 if it is none. */
GLOBAL u64 recognise(struct task_struct *p TRUSTED)
{
	char comm[16];
	u64 key;

	if (p->flags & PF_KTHREAD)
		return 0;
	switch (vm_by) {
	case VM_BY_NAMES:
		__builtin_memcpy(comm, p->comm, sizeof(comm));
		return is_vcpu_name(comm) ? (u32)p->tgid : 0;
	case VM_BY_PROCESS:
		if (p->pid == p->tgid)
			return 0;
		__builtin_memcpy(comm, p->group_leader->comm, sizeof(comm));
		return ((u64 *)comm)[0] == process_name[0] && ((u64 *)comm)[1] == process_name[1] ?
			       (u32)p->tgid : 0;
	case VM_BY_TGID:
		key = (u32)p->tgid;
		return p->pid != p->tgid && bpf_map_lookup_elem(&listed, &key) ? key : 0;
	case VM_BY_CGROUP:
		key = BPF_CORE_READ(p, cgroups, dfl_cgrp, kn, id);
		return p->pid != p->tgid && bpf_map_lookup_elem(&listed, &key) ? key : 0;
	}
	return 0;
}

GLOBAL int vm_leave(u64 key, u32 index, u32 pid)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	struct vcpu *v;

	if (!vm)
		return 0;
	v = vcpu_at(vm, index);
	if (__sync_val_compare_and_swap(&v->pid, pid, 0) != pid)
		return 0;
	if (__sync_fetch_and_add(&vm->members, -1) == 1) {
		add(STAT_lost_ns, __sync_lock_test_and_set(&vm->account, 0));
		bpf_map_delete_elem(&vms, &key);
		count(vms_gone);
	}
	return 0;
}

static __always_inline void raise_top(struct vm *vm, u32 top)
{
	u32 seen = vm->top, was;

	while (seen < top && can_loop) {
		was = __sync_val_compare_and_swap(&vm->top, seen, top);
		if (was == seen)
			break;
		seen = was;
	}
}

/* Takes a slot in the record of machine `key`, which is made if there is none. */
GLOBAL s32 vm_join(u64 key, u32 pid, u32 cpu)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	u32 first = 0;
	u32 i;

	if (!vm) {
		struct vm *empty = bpf_map_lookup_elem(&blank, &first);

		if (!empty)
			return -ENOMEM;
		if (!bpf_map_update_elem(&vms, &key, empty, BPF_NOEXIST))
			count(vms_new);
		vm = bpf_map_lookup_elem(&vms, &key);
		if (!vm)
			return -ENOMEM;
	}
	LOOP(i, MAX_VCPUS) {
		struct vcpu *v = vcpu_at(vm, i);

		if (v->pid || __sync_val_compare_and_swap(&v->pid, 0, pid))
			continue;
		v->cpu = cpu;
		v->state = VCPU_IDLE;
		v->dirty = CLEAN;
		v->credit = 0;
		v->net = 0;
		v->turns = 0;
		__sync_fetch_and_add(&vm->members, 1);
		raise_top(vm, i + 1);
		return i;
	}
	return -ENOMEM;
}

/*
 * Sees whether `p` has become, or is no longer, a vCPU: its name may change at any time, and its
 * machine's record may have gone while it joined. Cheap when nothing has changed.
 */
static __always_inline void refresh(struct task_struct *p, struct task_ctx *t, u32 cpu)
{
	u64 name, key;
	s32 index;

	if (vm_by == VM_BY_NAMES)
		name = *(u64 *)p->comm;
	else if (vm_by == VM_BY_PROCESS)
		name = *(u64 *)p->group_leader->comm;
	else
		name = 1;
	if (name == t->name && (!t->vm || vcpu_of(t)))
		return;
	key = recognise(p);
	if (t->vm && t->vm != key) {
		vm_leave(t->vm, t->index, p->pid);
		t->vm = 0;
	}
	t->name = name;
	if (!key || (t->vm && vcpu_of(t)))
		return;
	index = vm_join(key, p->pid, cpu);
	if (index < 0) {
		/* Looked at again when it is queued next. */
		t->vm = 0;
		t->name = 0;
		count(uncoupled);
		return;
	}
	t->index = index;
	t->vm = key;
}

#endif
