//! The adaptive threshold on whole machines.

use godwit_sched::adaptive::Change;
use godwit_sched::policy::{Alpha, Policy};
use godwit_sched::sim::workload::Workload;
use godwit_sched::sim::{Costs, Simulator};

const MS: u64 = 1_000_000;

/// How long dedup takes beside seven machines that compute; its alpha's changes, theirs, and its
/// last alpha.
fn dedup(policy: Policy, seed: u64) -> (u64, Vec<Change>, usize, Option<Alpha>) {
    let mut sim = Simulator::new(4, policy, Costs::DEFAULT, seed);
    let others: Vec<_> =
        (1..8).map(|i| Workload::SuperPi.start(&mut sim, 4, 0, i * 37 * MS)).collect();
    let vm = Workload::Dedup.start(&mut sim, 4, 1_500 * MS, 500 * MS);
    let ended = sim.run_until_end(vm, 60_000 * MS).expect("ends");
    let s = sim.scheduler();
    assert_eq!(s.audit(), Ok(()));
    let of_others = others.iter().map(|vm| s.alpha_changes(*vm).len()).sum();
    (ended, s.alpha_changes(vm).to_vec(), of_others, s.alpha_of(vm))
}

#[test]
fn a_machine_that_waits_is_drawn_together_and_says_why() {
    for seed in 0..2 {
        let (ended, changes, of_others, alpha) = dedup(Policy::ADAPTIVE, seed);
        assert!(changes.len() >= 4, "{changes:?}");
        assert!(alpha <= Alpha::new(1, 6), "{alpha:?}");
        let range = Alpha::ZERO..=Alpha::THESIS;
        assert!(changes.iter().all(|c| range.contains(&c.to)), "{changes:?}");
        assert!(changes[0].to_string().contains("wasted on distance"), "{}", changes[0]);
        assert_eq!(of_others, 0, "who computes is left alone");
        let (fixed, none, ..) = dedup(Policy::SBCO, seed);
        assert!(none.is_empty());
        assert!(ended < fixed, "seed {seed}: {ended} beside {fixed}");
        assert_eq!(dedup(Policy::ADAPTIVE, seed).1, changes, "one seed, one result");
    }
}
