/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The adaptive threshold: each machine's after what its vCPUs are seen to do with their time.
 *
 *   window ends:  they spin   -> a step tighter, and longer until the next try to loosen
 *                 they do not -> a step looser, once the time since the last failure is over
 *
 * Where KVM tells that a vCPU spins (pause-loop exits, which call `yield`), that is counted. Elsewhere
 * it can't be told work from spinning, but one that sleeps by itself does not spin: a machine
 * whose vCPUs sleep often is let loose, since what waits for a wake-up loses by being held together, and
 * one whose vCPUs never do may as well run together. A window is so much CPU time of the machine; nothing
 * depends on a clock.
 */
#ifndef GODWIT_ADAPT_H
#define GODWIT_ADAPT_H

#define WINDOW_NS 200000000ULL
/* So many turns for one spin, or for one sleep, are few or many. */
#define RARE 16
#define OFTEN 4
#define PATIENCE 4
#define MOST_PATIENCE 4096

/* A window of `vm` has ended, in which its vCPUs have run for `ran`. */
GLOBAL int judge(u64 key, u64 ran)
{
	struct vm *vm = bpf_map_lookup_elem(&vms, &key);
	u32 turns = ran / slice_ns, sleeps, spins, failed;
	bool costly, cheap;

	if (!vm)
		return 0;
	sleeps = __sync_lock_test_and_set(&vm->sleeps, 0);
	spins = __sync_lock_test_and_set(&vm->spins, 0);
	if (spins)
		vm->tells = 1;
	costly = vm->tells ? spins * OFTEN > turns : sleeps * RARE < turns;
	cheap = vm->tells ? spins * RARE < turns : sleeps * OFTEN > turns;
	failed = vm->tries;
	vm->tries = 0;
	if (!vm->patience)
		vm->patience = PATIENCE;
	if (costly) {
		if (failed && vm->patience < MOST_PATIENCE)
			vm->patience *= 2;
		if (vm->tighter < STEPS) {
			vm->tighter++;
			vm->waits = vm->patience;
			count(tightened);
		}
	} else if (cheap && vm->tighter) {
		if (vm->waits) {
			vm->waits--;
		} else {
			vm->tighter--;
			vm->tries = 1;
			count(loosened);
		}
	}
	return 0;
}

/* A machine's vCPUs have run for `runtime` in all. */
static __always_inline void adapt(struct vm *vm, u64 key, u64 runtime)
{
	u64 began = vm->window;

	if (adaptive && runtime - began >= WINDOW_NS &&
	    __sync_val_compare_and_swap(&vm->window, began, runtime) == began)
		judge(key, runtime - began);
}

#endif
